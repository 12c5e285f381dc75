"""Attention of one to a few queries against a paged cache: memory-bound. One rung a file."""
