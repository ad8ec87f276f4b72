"""Cases for ONNX graphs and networks of PyTorch: each was once found in one of the two only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from batchnorm.surgery.fold.onnx import fold_onnx
from tests.surgery.fold.onnx.graphs import Graph, assert_same, ops


def _split_after(g: Graph, x: str) -> str:
    g.nodes.append(_split(g, g.conv(x, 6, 4, (1, 1)), "a", "b"))
    return g.call("Concat", g.call("Relu", g.norm("a", 2)), g.call("Sigmoid", g.norm("b", 4)), axis=1)


def _split_before(g: Graph, x: str) -> str:
    g.nodes.append(_split(g, g.norm(g.call("Relu", g.conv(x, 6, 4, (1, 1))), 6), "a", "b"))
    return g.call("Add", g.conv("a", 3, 2, pads=[1, 1, 1, 1]), g.conv("b", 3, 4, (1, 1)))


def _split(g: Graph, x: str, *parts: str) -> onnx.NodeProto:
    return helper.make_node("Split", [x, g.constant([2, 4])], parts, axis=-3)


def _difference(g: Graph, x: str) -> str:
    return g.call("Sub", g.norm(g.conv(x, 4, 4, (1, 1)), 4), g.norm(g.conv(x, 4, 4, (1, 1)), 4))


def _constant_in_a_concatenation(g: Graph, x: str) -> str:
    return g.norm(g.call("Concat", g.random(1, 2, 6, 6), g.conv(x, 4, 4, (1, 1)), axis=1), 6)


def _sum_in_python(g: Graph, x: str) -> str:
    first = g.norm(g.conv(x, 4, 4, pads=[1, 1, 1, 1]), 4)
    return g.call("Add", g.call("Add", first, g.constant(np.array(0.0))), g.norm(x, 4))


def _twice_in_a_concatenation(g: Graph, x: str) -> str:
    y = g.norm(g.call("Relu", x), 4)
    return g.conv(g.call("Concat", y, y, axis=1), 3, 8, pads=[1, 1, 1, 1])


def _read_by_two_sums(g: Graph, x: str) -> str:
    """FastViT's mixer, after an exporter has merged its two equal batch normalizations."""
    y = g.norm(x, 4)
    return g.call("Sub", g.call("Add", g.conv(x, 4, 4, pads=[1, 1, 1, 1], group=4), y), y)


def _read_by_a_sum_and_a_convolution(g: Graph, x: str) -> str:
    y = g.norm(x, 4)
    return g.call("Mul", g.call("Add", y, g.conv(x, 4, 4, (1, 1))), g.conv(y, 4, 4, pads=[1, 1, 1, 1]))


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (_split_after, 3), (_split_before, 3), (_difference, 3), (_constant_in_a_concatenation, 1), (_sum_in_python, 3),
        (_twice_in_a_concatenation, 3), (_read_by_two_sums, 3), (_read_by_a_sum_and_a_convolution, 3),
    ],
)  # fmt: skip
def test_every_layer_is_folded(build: Callable[[Graph, str], str], batch: int) -> None:
    g = Graph()
    x = g.call("Tanh", g.input("n" if batch > 1 else 1, 4, 6, 6))
    model = g.model(g.call("Relu", build(g, x)))
    folded, report = fold_onnx(model)
    assert "BatchNormalization" not in ops(folded) and report.remaining == 0 and not report.left
    assert_same(model, folded, (batch, 4, 6, 6))
