"""The exception for a user's mistake, and the check that raises it most often."""

from __future__ import annotations

from collections.abc import Iterable


class ComparisonError(ValueError):
    """An argument cannot be compared; the message says what must hold, what came, and what to do.

    Attributes:
        rank: The process that failed, if several train together and not all fail alike.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def check_among(name: str, value: str, allowed: Iterable[str]) -> None:
    """Check that an argument is one of the allowed values.

    Raises:
        ComparisonError: If it is not.
    """
    if value not in allowed:
        raise ComparisonError(f"{name} must be among {', '.join(allowed)}, got {value!r}. Choose from these.")
