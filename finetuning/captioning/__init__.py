"""Say in words what is in an image."""
