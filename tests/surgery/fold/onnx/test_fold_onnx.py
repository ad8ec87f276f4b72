"""Where batch normalization goes in an ONNX graph, and what keeps it where it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from batchnorm.surgery.fold.onnx import fold_onnx
from tests.surgery.fold.onnx.graphs import Graph, assert_same, initializer, ops


def conv_kinds(x: str, g: Graph) -> dict[str, tuple[Callable[[], str], int]]:
    """Layers of 4 channels, and the channels of their results."""
    return {
        "conv": (lambda: g.conv(x, 6, 4, pads=[1, 1, 1, 1]), 6),
        "conv without bias": (lambda: g.call("Conv", x, g.random(6, 4, 3, 3), strides=[2, 2]), 6),
        "grouped": (lambda: g.conv(x, 6, 4, group=2, dilations=[2, 1]), 6),
        "depthwise": (lambda: g.conv(x, 4, 4, group=4, auto_pad="SAME_LOWER", strides=[2, 1]), 4),
        "asymmetric": (lambda: g.conv(x, 5, 4, (2, 3), pads=[0, 2, 1, 0]), 5),
        "valid": (lambda: g.conv(x, 5, 4, auto_pad="VALID"), 5),
        "pointwise": (lambda: g.conv(x, 5, 4, (1, 1)), 5),
        "transposed": (
            lambda: g.call("ConvTranspose", x, g.random(4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
            3,
        ),
        "transposed, groups": (
            lambda: g.call(
                "ConvTranspose", x, g.random(4, 3, 3, 2), g.random(6), group=2, strides=[2, 3], output_padding=[1, 0],
                pads=[1, 0, 0, 1],
            ),
            6,
        ),
        "transposed, output_shape": (
            lambda: g.call("ConvTranspose", x, g.random(4, 3, 3, 3), strides=[2, 2], output_shape=[15, 16]), 3,
        ),
        "transposed, pointwise": (lambda: g.call("ConvTranspose", x, g.random(4, 3, 1, 1)), 3),
    }  # fmt: skip


KINDS = list(conv_kinds("x", Graph()))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_after_a_convolution_goes_into_it(kind: str) -> None:
    g = Graph()
    layer, channels = conv_kinds(g.input("n", 4, "h", "w"), g)[kind]
    model = g.model(g.norm(layer(), channels))
    folded, report = fold_onnx(model, inputs=[(2, 4, 8, 8)])
    assert len(ops(folded)) == 1 and report.remaining == 0 and report.before == 1
    assert [(c.was, c.now) for c in report.changed] == [
        (f"BatchNormalization({channels})", f"in {model.graph.node[0].name}")
    ]
    assert report.how == "onnxruntime"
    assert_same(model, folded, (3, 4, 8, 8) if "output_shape" in kind else (3, 4, 9, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_before_a_convolution_goes_into_it_and_the_border_is_right(kind: str) -> None:
    g = Graph()
    layer, _ = conv_kinds(g.norm(g.input("n", 4, "h", "w"), 4), g)[kind]
    model = g.model(layer())
    folded, report = fold_onnx(model, inputs=[(2, 4, 8, 8)])
    assert report.remaining == 0 and "BatchNormalization" not in ops(folded)
    at_border = kind not in ("conv without bias", "grouped", "valid", "pointwise", "transposed, pointwise")
    assert ("ConstantOfShape" in ops(folded)) == at_border
    assert_same(model, folded, (3, 4, 8, 8) if "output_shape" in kind else (3, 4, 9, 12))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_other_ranks_fold_on_both_sides(op: str, dims: int) -> None:
    g = Graph()
    x = g.norm(g.input("n", 4, *("d", "h", "w")[:dims]), 4)
    size = (3,) * dims
    y = g.call(op, x, g.random(4, 4, *size), pads=[1] * 2 * dims, strides=[2] * dims)
    model = g.model(g.norm(y, 4))
    folded, report = fold_onnx(model)
    assert report.remaining == 0
    assert_same(model, folded, (3, 4, *(7, 6, 5)[:dims]))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["none", "vector", "row", "scalar"])
@pytest.mark.parametrize("opset", [9, 20])
def test_gemm_folds_on_both_sides(transposed: int, bias: str, opset: int) -> None:
    g = Graph()
    shapes = {"vector": (5,), "row": (1, 5), "scalar": ()}
    inputs = [g.random(*((5, 4) if transposed else (4, 5)))]
    if bias != "none":
        inputs.append(g.random(*shapes[bias]))
    elif opset < 11:
        inputs.append(g.constant(np.zeros(1)))
    x = g.norm(g.input("n", 4), 4)
    model = g.model(g.norm(g.call("Gemm", x, *inputs, transB=transposed, alpha=0.5, beta=2.0), 5), opset=opset)
    folded, report = fold_onnx(model)
    assert ops(folded) == ["Gemm"] and report.remaining == 0
    assert_same(model, folded, (7, 4))


def test_matmul_and_addition_fold_on_both_sides() -> None:
    g = Graph()
    y = g.call("MatMul", g.norm(g.input("n", 4), 4), g.random(4, 5))
    model = g.model(g.norm(g.call("Add", g.random(5), y), 5))
    folded, report = fold_onnx(model)
    assert ops(folded) == ["MatMul", "Add"] and report.remaining == 0
    assert_same(model, folded, (7, 4))


def test_a_matmul_that_has_no_addition_gets_one() -> None:
    g = Graph()
    model = g.model(g.norm(g.call("MatMul", g.input("n", 4), g.random(4, 5)), 5))
    folded, _ = fold_onnx(model)
    assert ops(folded) == ["MatMul", "Add"]
    assert_same(model, folded, (7, 4))


def test_matmul_on_sequences_folds_through_a_transposition() -> None:
    g = Graph()
    y = g.call("MatMul", g.input("n", "length", 4), g.random(4, 5))
    y = g.norm(g.call("Transpose", y, perm=[0, 2, 1]), 5)
    model = g.model(g.call("Relu", y))
    folded, report = fold_onnx(model)
    assert report.remaining == 0
    assert_same(model, folded, (2, 9, 4))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda g, x: g.call("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), ""),
        (lambda g, x: g.call("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), ""),
        (lambda g, x: g.call("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), ""),
        (
            lambda g, x: g.call("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
            "AveragePool next to it counts padded zeros",
        ),
        (lambda g, x: g.call("GlobalAveragePool", x), ""),
        (lambda g, x: g.call("GlobalMaxPool", x), ""),
        (lambda g, x: g.call("Identity", g.call("Dropout", x)), ""),
        (lambda g, x: g.call("Transpose", g.call("Transpose", x, perm=[2, 3, 1, 0]), perm=[3, 2, 0, 1]), ""),
        (lambda g, x: g.call("ReduceMean", x, g.constant([2, -1])), ""),
        (
            lambda g, x: g.call("Relu", g.call("ReduceMean", x, g.constant([1]))),
            "a mean over its channels is next to it",
        ),
        (lambda g, x: g.call("Reshape", x, g.constant([0, 0, 1, -1])), ""),
        (lambda g, x: g.call("Squeeze", g.call("Unsqueeze", x, g.constant([2])), g.constant([2])), ""),
        (lambda g, x: g.call("Pad", x, g.constant([0, 0, 1, 1, 0, 0, 0, 1]), mode="reflect"), ""),
        (lambda g, x: g.call("Pad", x, g.constant([0, 0, 1, 1, 0, 0, 0, 1])), "padding with a constant"),
        (lambda g, x: g.call("Resize", x, "", g.constant(np.array([1, 1, 2, 2.0])), mode="linear"), ""),
        (lambda g, x: g.call("Relu", x), "Relu reads its result; it follows Relu"),
    ],
)
def test_operations_in_between_are_passed_or_named(between: Callable[[Graph, str], str], reason: str) -> None:
    """Batch normalization, this, and batch normalization: the two become one, or both stay."""
    g = Graph()
    y = between(g, g.norm(g.input("n", 4, 8, "w"), 4, scale=[1.0, 0.5, 2.0, 0.2]))
    model = g.model(g.norm(y, 1 if "over its channels" in reason else 4))
    folded, report = fold_onnx(model)
    if reason:
        assert reason in "; ".join(change.reason for change in report.left)
        assert folded == model
    else:
        assert report.remaining == 1 and len(ops(folded)) == len(ops(model)) - 1
        assert_same(model, folded, (3, 4, 8, 10))


def test_small_constants_that_are_computed_are_stored() -> None:
    """The bounds of a Clip, as exporters write them; runtimes fuse it only if they are stored."""
    g = Graph()
    y = g.norm(g.conv(g.input("n", 4, 10, 12), 4, 4), 4)
    low = g.call("CastLike", g.constant(np.array(-0.5, np.float32)), y)
    six = g.call("Neg", g.constant(np.array(-6.0, np.float32)))
    large = g.call("Neg", g.random(1, 4, 8, 10))
    model = g.model(g.call("Add", g.call("Clip", y, low, six), large), six)
    folded, report = fold_onnx(model)
    assert report.remaining == 0
    assert sorted(ops(folded)) == ["Add", "Clip", "Conv", "Neg", "Neg"]  # a result and a large one stay computed
    clip = next(node for node in folded.graph.node if node.op_type == "Clip")
    low = initializer(folded, clip.input[1])
    assert low == -0.5 and low.shape == ()
    assert_same(model, folded, (3, 4, 10, 12))


@pytest.mark.parametrize("kind", ["FLOAT16", "INT4"])  # overflows to -inf; has no type in NumPy
def test_constants_that_overflow_or_have_4_bits_are_no_obstacle(kind: str) -> None:
    g = Graph()
    y = g.norm(g.conv(g.input("n", 4, 10, 12), 4, 4), 4)
    given = g.constant(np.array(-1e30 if kind == "FLOAT16" else -1.5, np.float32))
    small = g.call("Cast", given, to=getattr(onnx.TensorProto, kind))
    model = g.model(g.call("Max", y, g.call("Cast", small, to=onnx.TensorProto.FLOAT)), opset=21)
    folded, report = fold_onnx(model)
    assert report.remaining == 0
    assert_same(model, folded, (3, 4, 10, 12))


def test_a_negative_scale_does_not_go_through_max_pooling() -> None:
    g = Graph()
    y = g.call("MaxPool", g.conv(g.input("n", 4, "h", "w"), 4, 4), kernel_shape=[2, 2])
    model = g.model(g.norm(y, 4, scale=[1.0, -1.0, 0.0, 1.0]))
    folded, report = fold_onnx(model)
    assert report.left[0].reason.startswith("MaxPool next to it does not commute with a negative scale")
    assert folded == model


def test_flattening_repeats_the_channels() -> None:
    g = Graph()
    y = g.norm(g.input("n", 3, 2, 4), 3)
    model = g.model(g.call("Gemm", g.call("Flatten", y), g.random(24, 5), g.random(5)))
    folded, report = fold_onnx(model)
    assert ops(folded) == ["Flatten", "Gemm"] and report.remaining == 0
    assert_same(model, folded, (5, 3, 2, 4))


def test_concatenation_splits_what_comes_after_it_and_places_what_comes_before() -> None:
    g = Graph()
    x = g.input("n", 4, "h", "w")
    a, b = g.conv(x, 3, 4, (1, 1)), g.norm(g.call("Relu", x), 4)
    y = g.call("Concat", a, g.call("Relu", g.conv(x, 2, 4, (1, 1))), b, axis=1)
    model = g.model(g.conv(y, 5, 9, (1, 1)))
    folded, report = fold_onnx(model)
    assert report.remaining == 0
    assert_same(model, folded, (3, 4, 6, 6))

    g = Graph()
    x = g.input("n", 4, "h", "w")
    y = g.call("Concat", g.conv(x, 3, 4, (1, 1)), g.conv(x, 2, 4, (1, 1)), axis=-3)
    model = g.model(g.norm(y, 5))
    folded, report = fold_onnx(model)
    assert report.remaining == 0
    assert_same(model, folded, (3, 4, 6, 6))


def test_addition_takes_the_shift_once() -> None:
    g = Graph()
    x = g.input("n", 4, "h", "w")
    y = g.call("Add", g.conv(x, 3, 4), g.conv(g.call("Relu", x), 3, 4))
    model = g.model(g.norm(y, 3))
    folded, report = fold_onnx(model)
    assert report.remaining == 0 and "in conv" in report.changed[0].now
    assert_same(model, folded, (3, 4, 6, 6))


@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 4, 1, 1), (1, 1, 6)])
def test_a_constant_that_is_added_takes_the_shift(shape: tuple[int, ...]) -> None:
    g = Graph()
    y = g.call("Conv", g.input("n", 4, "h", 6), g.random(4, 4, 1, 1))
    model = g.model(g.norm(g.call("Add", y, g.random(*shape)), 4))
    folded, report = fold_onnx(model)
    assert report.remaining == 0 and ops(folded) == ["Conv", "Add"]
    assert_same(model, folded, (3, 4, 5, 6))


def test_parallel_branches_become_one_convolution() -> None:
    """RepVGG: a 3×3 and a 1×1 convolution and batch normalization of one input."""
    g = Graph()
    x = g.call("Relu", g.input("n", 4, "h", "w"))
    large = g.norm(g.call("Conv", x, g.random(4, 2, 3, 3), pads=[1, 1, 1, 1], group=2), 4)
    small = g.norm(g.call("Conv", x, g.random(4, 2, 1, 1), group=2), 4)
    y = g.call("Add", g.call("Add", large, small), g.norm(x, 4), name="sum")
    model = g.model(g.call("Relu", y))
    folded, report = fold_onnx(model)
    assert ops(folded) == ["Relu", "Conv", "Relu"] and report.remaining == 0
    assert {change.now for change in report.changed} == {"in sum.call"}
    assert_same(model, folded, (3, 4, 6, 7))


def test_a_chain_of_batch_norms_becomes_one() -> None:
    g = Graph()
    model = g.model(g.norm(g.norm(g.norm(g.input("n", 4, 5, 5), 4), 4), 4))
    folded, report = fold_onnx(model)
    assert ops(folded) == ["BatchNormalization"] and report.remaining == 1
    assert "it follows an input; it is a result of the network" in report.left[0].reason
    assert_same(model, folded, (3, 4, 5, 5))


def test_several_readers_absorb_it_if_all_can() -> None:
    g = Graph()
    x = g.norm(g.call("Relu", g.input("n", 4, "h", "w")), 4)
    model = g.model(g.conv(x, 3, 4, pads=[1, 1, 1, 1]), g.norm(x, 4), g.conv(x, 2, 4, (1, 1)))
    folded, report = fold_onnx(model)
    assert report.remaining == 1 and len(report.changed) == 1
    assert report.changed[0].now.count(",") == 2
    assert_same(model, folded, (3, 4, 6, 6))


def test_one_reader_that_cannot_absorb_it_keeps_it_for_all() -> None:
    g = Graph()
    x = g.norm(g.call("Relu", g.input("n", 4, "h", "w")), 4)
    model = g.model(g.conv(x, 3, 4), g.call("Sigmoid", x))
    folded, report = fold_onnx(model)
    assert report.left[0].reason == "it follows Relu; Sigmoid reads its result"
    assert folded == model

    g = Graph()
    y = g.conv(g.input("n", 4, "h", "w"), 4, 4)
    model = g.model(g.norm(y, 4), y)
    folded, report = fold_onnx(model)
    assert report.left[0].reason == "its input is also read by the network's output; it is a result of the network"
    assert folded == model
