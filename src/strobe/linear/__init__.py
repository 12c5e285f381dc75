"""Matrix products with the weights: a small ladder of its own."""

from strobe.linear.projection import Projection, empty_weight

__all__ = ["Projection", "empty_weight"]
