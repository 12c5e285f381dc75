"""Attention of one to a few queries against a cache, paged or dense: memory-bound. One rung a file."""
