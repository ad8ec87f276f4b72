"""How far two results of a model differ."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

from batchnorm.models.data.outputs import check_unchanged, difference, outputs, same_containers


def test_a_difference_is_relative_to_the_largest_value() -> None:
    found = difference({"y": torch.tensor([8.0, 1.0])}, {"y": torch.tensor([8.0, 1.5])})
    assert found.relative == 0.0625 and not found.is_rounding
    assert difference(torch.ones(2), torch.ones(2) + 1e-6).is_rounding


@pytest.mark.parametrize(
    "other", [torch.ones(3), torch.ones(2).double(), torch.tensor([1.0, float("nan")]), [torch.ones(2)]]
)
def test_other_shapes_dtypes_structures_and_nonfinite_values_differ_infinitely(other: object) -> None:
    assert difference(torch.ones(2), other).relative == float("inf")


def test_the_error_names_the_caller_and_the_cause() -> None:
    with pytest.raises(ValueError, match="f expects a model whose output stays the same, .* 1.0e\\+00 .* A cause; the"):
        check_unchanged("f", torch.ones(2), torch.zeros(2), "A cause")


def test_tensors_are_found_in_containers_and_objects() -> None:
    y = torch.ones(2)
    held = SimpleNamespace(y=y, more=[{"a": y}, None, 3])
    held.itself = held
    assert len(outputs((held, y))) == 3
    assert len(outputs(torch.distributions.Normal(y, y))) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (OrderedDict(a=torch.ones(1)), {"a": torch.ones(1)}), ([torch.ones(1)], (torch.ones(1),)),
        (SimpleNamespace(a=torch.ones(1)), {"a": torch.ones(1)}), ({"a": torch.ones(1)}, {"b": torch.ones(1)}),
        ({"a": torch.ones(1)}, {"a": None}), ([torch.ones(1)], [torch.ones(1), None]),
        (SimpleNamespace(a=torch.ones(1)), SimpleNamespace(b=torch.ones(1))),
    ],
)  # fmt: skip
def test_other_containers_are_distinguished(one: object, other: object) -> None:
    assert same_containers(one, one) and same_containers(other, other)
    assert not same_containers(one, other)
    assert difference(one, other).relative == float("inf")
