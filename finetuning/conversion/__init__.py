"""From the ways that people keep pictures and captions to one that training reads. A source is one file here."""
