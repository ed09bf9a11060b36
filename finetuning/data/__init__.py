"""Imagefolder reading and checking, images, captions, transforms and the order of the rows."""
