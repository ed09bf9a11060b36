"""From the ways that people keep images and captions to one that training reads. A source is one file here."""
