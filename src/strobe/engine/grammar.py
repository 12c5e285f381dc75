"""What the engine asks of a grammar that its output must keep to.

This module imports no torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Matcher(Protocol):
    """Where one sequence stands in its grammar."""

    @property
    def finished(self) -> bool:
        """True where the text is whole and can go no further."""
        ...

    @property
    def failed(self) -> bool:
        """True where the grammar outgrew its bounds: the sequence is given up."""
        ...

    def allowed(self) -> np.ndarray:
        """bool `[tokens]`: what may come next, an end token included; the vocabulary may go on after it."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a token that was allowed."""
        ...


class Grammar(Protocol):
    """A compiled grammar, shared by all who ask for it."""

    def matcher(self) -> Matcher:
        """A new matcher, at the start of the text."""
        ...
