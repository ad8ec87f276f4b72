"""The exception for invalid arguments, and the check that raises it most often."""

from __future__ import annotations

from collections.abc import Iterable


class ComparisonError(ValueError):
    """A comparison cannot run with these arguments, or its model failed.

    The message states the requirement, the value received, and the fix.

    Attributes:
        rank: The process that failed, if several train together and some did not fail in the same way.
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
