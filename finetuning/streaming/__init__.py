"""Datasets that are read as they come, in flat memory: shards, and the order and pictures of a run on them."""
