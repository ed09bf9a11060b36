"""Imagefolder reading and checking, pictures, captions, transforms and the order of the rows."""
