"""Merging: streamed tensors, the methods, post-hoc averages, and the sweep over ratios."""
