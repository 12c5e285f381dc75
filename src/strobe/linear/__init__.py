"""Matrix products with the weights: a small ladder of its own."""

from strobe.linear.api import apply, empty_weight

__all__ = ["apply", "empty_weight"]
