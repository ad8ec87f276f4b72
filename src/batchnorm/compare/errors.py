"""What a user's mistake raises here."""

from __future__ import annotations


class ComparisonError(ValueError):
    """What was given cannot be compared; the message says what must hold, what came, and what to do."""
