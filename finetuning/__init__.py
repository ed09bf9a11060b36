"""What the scripts share. Importable from the checkout, nothing to install."""
