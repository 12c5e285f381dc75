"""Attention over many queries: compute-bound. One rung a file; ladder.py gives the order."""
