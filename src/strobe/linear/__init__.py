"""Matrix products with the weights: a small ladder of its own."""

from strobe.linear.api import apply

__all__ = ["apply"]
