"""Errors that quote other errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import batchnorm
from batchnorm._options import as_clause, in_one_line


@pytest.mark.parametrize(
    ("error", "line", "clause"),
    [
        (ValueError("x must be finite."), "ValueError: x must be finite", "x must be finite"),
        (RuntimeError("first:\n  second..."), "RuntimeError: first", "first: second"),
        (KeyError(), "KeyError", "KeyError"),
        (ValueError("x" * 400), "ValueError: " + "x" * 400, "x" * 300),
    ],
    ids=["period", "lines", "empty", "long"],
)
def test_a_quoted_error_ends_without_a_period(error: Exception, line: str, clause: str) -> None:
    assert (in_one_line(error), as_clause(error)) == (line, clause)


def test_a_message_continues_after_the_period_of_a_quoted_error() -> None:
    class Stubborn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("I take nothing.")

    with pytest.raises(ValueError, match="ValueError: I take nothing. Pass a tensor"):
        batchnorm.fold(torch.nn.Sequential(torch.nn.BatchNorm2d(3), Stubborn()), torch.rand(1, 3, 4, 4))


def test_no_source_puts_a_period_after_an_error_that_may_have_one() -> None:
    quoted = re.compile(r"\{(error|raised|exception)\}\. ")
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(batchnorm.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if quoted.search(line)
    ]
    assert found == []
