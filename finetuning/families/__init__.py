"""What a model is made of. A family is one file here, and one line in table.py."""
