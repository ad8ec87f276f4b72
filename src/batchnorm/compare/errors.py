"""The exception that `batchnorm.compare` raises for a user's mistake."""

from __future__ import annotations


class ComparisonError(ValueError):
    """An argument cannot be compared; the message says what must hold, what came, and what to do.

    Attributes:
        rank: The process that failed, if several train together and not all fail alike.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
