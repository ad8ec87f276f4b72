from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.surgery.fold.onnx import fold_onnx, folding
from tests.surgery.fold.onnx.graphs import Graph, initializer, ops, with_shapes

TOLERANCE = 1e-5  # relative to the largest value, float32


def run(model: onnx.ModelProto, **feeds: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def assert_same(model: onnx.ModelProto, folded: onnx.ModelProto, *shapes: Any, tolerance: float = TOLERANCE) -> None:
    """Equal results at sizes that folding did not see, by this test's own runs."""
    onnx.checker.check_model(folded, full_check=True)
    generator = np.random.default_rng(7)
    kinds = [helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input]
    held = {tensor.name for tensor in model.graph.initializer}
    names = [i.name for i in model.graph.input if i.name not in held]
    feeds = {
        name: generator.normal(size=shape).astype(kind) for name, kind, shape in zip(names, kinds, shapes, strict=False)
    }
    for found, right in zip(run(folded, **feeds), run(model, **feeds), strict=True):
        assert found.dtype == right.dtype and found.shape == right.shape
        largest = np.abs(right.astype(float)).max()
        assert largest > 0
        assert np.abs(found.astype(float) - right.astype(float)).max() <= tolerance * largest


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
def test_what_stands_between_lets_it_through_or_is_named(between: Callable[[Graph, str], str], reason: str) -> None:
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


def test_several_readers_take_it_up_where_all_can() -> None:
    g = Graph()
    x = g.norm(g.call("Relu", g.input("n", 4, "h", "w")), 4)
    model = g.model(g.conv(x, 3, 4, pads=[1, 1, 1, 1]), g.norm(x, 4), g.conv(x, 2, 4, (1, 1)))
    folded, report = fold_onnx(model)
    assert report.remaining == 1 and len(report.changed) == 1
    assert report.changed[0].now.count(",") == 2
    assert_same(model, folded, (3, 4, 6, 6))


def test_a_reader_that_cannot_keeps_it_for_all() -> None:
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


def test_a_reused_weight_is_copied_and_not_changed_for_others() -> None:
    g = Graph()
    x, weight, bias = g.input("n", 4, "h", "w"), g.random(4, 4, 1, 1, name="w"), g.random(4, name="b")
    y = g.call("Relu", g.norm(g.call("Conv", x, weight, bias), 4))
    y = g.call("Conv", y, weight, bias)
    model = g.model(g.norm(g.call("Conv", g.call("Relu", y), weight, bias), 4))
    folded, report = fold_onnx(model)
    assert report.remaining == 0
    assert np.array_equal(initializer(folded, "w"), initializer(model, "w"))
    assert len(folded.graph.initializer) == 6
    assert_same(model, folded, (3, 4, 6, 6))


def test_shared_statistics_stay_for_the_one_that_is_left() -> None:
    g = Graph()
    x = g.input("n", 4, "h", "w")
    statistics = [g.random(4), g.random(4), g.random(4), g.constant(np.full(4, 0.7))]
    y = g.call("BatchNormalization", g.conv(x, 4, 4, (1, 1)), *statistics)
    model = g.model(g.call("BatchNormalization", g.call("Relu", y), *statistics))
    folded, report = fold_onnx(model)
    assert ops(folded) == ["Conv", "Relu", "BatchNormalization"] and report.remaining == 1
    assert_same(model, folded, (3, 4, 6, 6))


@pytest.mark.parametrize("how", ["Constant", "Identity", "Transpose", "initializers listed as inputs"])
def test_constants_are_found_wherever_they_are(how: str) -> None:
    g = Graph()
    x = g.input("n", 4, "h", "w")
    model = g.model(g.norm(g.conv(x, 3, 4, (1, 1)), 3), opset=8 if "listed" in how else 20)
    held, nodes = list(model.graph.initializer), list(model.graph.node)
    del model.graph.node[:]
    for tensor in held:
        if how == "Constant":
            model.graph.node.append(helper.make_node("Constant", [], [tensor.name], value=tensor))
        elif how == "initializers listed as inputs":
            model.ir_version = 3
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            copy = numpy_helper.from_array(numpy_helper.to_array(tensor).T.copy(), f"{tensor.name}.0")
            if how == "Identity":
                copy = numpy_helper.from_array(numpy_helper.to_array(tensor), f"{tensor.name}.0")
                model.graph.node.append(helper.make_node("Identity", [copy.name], [f"{tensor.name}.1"]))
                copy_name = f"{tensor.name}.1"
            else:
                copy_name = copy.name
            model.graph.node.append(helper.make_node(how, [copy_name], [tensor.name]))
            model.graph.initializer.append(copy)
    if how != "initializers listed as inputs":
        kept = [t for t in model.graph.initializer if t.name not in {h.name for h in held}]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    folded, report = fold_onnx(model)
    assert ops(folded) == ["Conv"] and report.remaining == 0 and len(folded.graph.initializer) == 2
    assert len(folded.graph.input) == (3 if "listed" in how else 1)
    assert_same(model, folded, (3, 4, 6, 6))


def test_what_the_caller_may_replace_is_no_constant() -> None:
    g = Graph()
    model = g.model(g.norm(g.conv(g.input("n", 4, "h", "w"), 3, 4, (1, 1)), 3))
    model.graph.input.append(helper.make_tensor_value_info("c0", TensorProto.FLOAT, [3, 4, 1, 1]))
    folded, report = fold_onnx(model)
    assert report.left[0].reason.startswith("the weight of the Conv next to it is given by the caller")
    assert folded == model


def test_training_mode_is_left() -> None:
    g = Graph()
    y = g.conv(g.input("n", 4, "h", "w"), 3, 4)
    statistics = [g.random(3), g.random(3), g.random(3), g.constant(np.ones(3))]
    g.nodes.append(helper.make_node("BatchNormalization", [y, *statistics], ["z", "m", "v"], training_mode=1))
    model = g.model("z")
    folded, report = fold_onnx(model)
    assert report.left[0].reason.startswith("it uses the batch's statistics: it is in training mode")
    assert folded == model


def test_what_a_body_reads_from_outside_is_not_changed() -> None:
    """The branches of an If read the convolution's result, its weight and a batch normalization's result."""
    g = Graph()
    x = g.input("n", 3, "h", "w")
    weight = g.random(3, 3, 1, 1, name="w")
    first = g.norm(g.call("Conv", x, weight), 3, name="first")
    inner = g.call("Conv", g.call("Relu", first), weight, name="inner")
    last = g.norm(inner, 3, name="last")
    condition = g.call("Greater", g.call("ReduceSum", x, keepdims=0), g.constant(np.array(0.0)))

    def body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(nodes, "body", [], [value])

    then = body(helper.make_node("Add", [first, inner], ["a"]), helper.make_node("Conv", ["a", weight], ["t"]))
    other = body(
        helper.make_node("BatchNormalization", [last, *g.nodes[1].input[1:]], ["b"], name="deep"),
        helper.make_node("Conv", ["b", weight], ["e"]),
    )
    model = g.model(g.call("If", condition, then_branch=then, else_branch=other), last)
    folded, report = fold_onnx(model)
    assert [change.path for change in report.changed] == ["first.call"]
    reasons = {change.path: change.reason for change in report.left}
    assert "its input is also read by If" in reasons["last.call"]
    assert reasons["deep"] == f"it is in the body of If {model.graph.node[-1].name}, which is not looked into"
    assert report.before == 3 and report.remaining == 2
    assert np.array_equal(initializer(folded, "w"), initializer(model, "w"))
    for seed in range(4):  # both branches
        x_value = np.random.default_rng(seed).normal(size=(2, 3, 4, 4)).astype(np.float32)
        for found, right in zip(run(folded, x=x_value), run(model, x=x_value), strict=True):
            assert np.abs(found - right).max() <= TOLERANCE * np.abs(right).max()


def test_a_loop_keeps_what_its_body_reads() -> None:
    g = Graph()
    y = g.norm(g.conv(g.input("n", 3, "h", "w"), 3, 3, (1, 1)), 3, name="normed")
    kinds = (TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT)
    shapes = ([], [], ["n", 3, "h", "w"])
    values = [helper.make_tensor_value_info(f"i{i}", *each) for i, each in enumerate(zip(kinds, shapes, strict=True))]
    body = helper.make_graph(
        [helper.make_node("Add", ["i2", y], ["sum"]), helper.make_node("Identity", ["i1"], ["go on"])],
        "body",
        values,
        [
            helper.make_tensor_value_info("go on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, shapes[2]),
        ],
    )
    looped = g.call("Loop", g.constant(np.array(3)), "", "x", body=body)
    model = g.model(g.call("Reshape", looped, g.constant([-1, 3, 4, 4])))
    folded, report = fold_onnx(model, inputs=(2, 3, 4, 4))
    assert ops(folded) == ["Conv", "Loop", "Reshape"] and report.remaining == 0
    assert_same(model, folded, (2, 3, 4, 4))


def test_functions_are_written_out() -> None:
    g = Graph()
    y = g.conv(g.input("n", 3, "h", "w"), 3, 3, (1, 1))
    statistics = [g.random(3), g.random(3), g.random(3), g.constant(np.ones(3))]
    names = ["x0", "s", "b", "m", "v"]
    opset = [helper.make_opsetid("", 20)]
    function = helper.make_function(
        "mine", "Norm", names, ["y0"], [helper.make_node("BatchNormalization", names, ["y0"])], opset
    )
    g.nodes.append(helper.make_node("Norm", [y, *statistics], ["z"], domain="mine"))
    graph = helper.make_graph(
        g.nodes, "g", g.inputs, [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)], g.initializers
    )
    model = with_shapes(
        helper.make_model(
            graph, functions=[function], opset_imports=[*opset, helper.make_opsetid("mine", 1)], ir_version=10
        )
    )
    folded, report = fold_onnx(model)
    assert ops(folded) == ["Conv"] and report.notes == ("functions are written out, where they are called",)
    assert_same(model, folded, (2, 3, 4, 4))


@pytest.mark.parametrize(("dtype", "how", "tolerance"), [(np.float16, "onnxruntime", 1e-2)])
def test_half_precision(dtype: Any, how: str, tolerance: float) -> None:
    g = Graph(dtype)
    x = g.norm(g.input("n", 4, "h", "w"), 4)
    model = g.model(g.norm(g.conv(x, 3, 4, pads=[1, 1, 1, 1]), 3))
    folded, report = fold_onnx(model)
    assert report.remaining == 0 and report.how == how
    assert {t.data_type for t in folded.graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}
    assert_same(model, folded, (3, 4, 6, 6), tolerance=tolerance)


def test_double_precision_is_run_by_the_reference() -> None:
    """ONNX Runtime has no convolution in float64."""
    from onnx.reference import ReferenceEvaluator

    g = Graph(np.float64)
    model = g.model(g.norm(g.conv(g.norm(g.input("n", 4, "h", "w"), 4), 3, 4, pads=[1, 1, 1, 1]), 3))
    folded, report = fold_onnx(model)
    assert report.remaining == 0 and report.how == "onnx.reference" and report.error < 1e-13
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 6))
    found, right = (ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (folded, model))
    assert np.abs(found - right).max() <= 1e-13 * np.abs(right).max()


def test_bfloat16_is_run_in_float32() -> None:
    g = Graph()
    model = g.model(g.norm(g.conv(g.input("n", 4, "h", "w"), 3, 4), 3), opset=22)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    from batchnorm.surgery.fold.onnx.running import in_type

    folded, report = fold_onnx(in_type(model, TensorProto.BFLOAT16))
    assert report.remaining == 0 and report.how == "onnxruntime, in float32"
    assert {t.data_type for t in folded.graph.initializer} == {TensorProto.BFLOAT16}
    assert_same(wide, in_type(folded, TensorProto.FLOAT), (2, 4, 5, 5), tolerance=5e-2)
    assert model == wide


def test_a_weight_that_the_type_cannot_hold_is_not_folded() -> None:
    g = Graph(np.float16)
    y = g.call("Conv", g.input("n", 4, "h", "w"), g.constant(np.full((3, 4, 1, 1), 1e-3)))
    one = g.constant(np.ones(3))
    statistics = [g.constant(np.full(3, 6e4)), one, g.constant(np.zeros(3)), g.constant(np.full(3, 6e-8))]
    model = g.model(g.call("BatchNormalization", y, *statistics, epsilon=1e-9))
    folded, report = fold_onnx(model)
    assert "folded weights must be finite in torch.float16" in report.left[0].reason
    assert folded == model


def test_tiny_variances_and_negative_or_zero_scales_are_ordinary() -> None:
    g = Graph()
    y = g.norm(g.conv(g.input("n", 4, "h", "w"), 4, 4), 4, scale=[0.0, -1.0, 1e-20, 3.0], var=[5.6e-45, 0, 1e-12, 1e6])
    model = g.model(g.conv(g.norm(g.call("Relu", y), 4, scale=[0.0, -0.0, -1.0, 1.0]), 4, 4, pads=[1, 1, 1, 1]))
    folded, report = fold_onnx(model)
    assert report.remaining == 0
    assert_same(model, folded, (3, 4, 6, 6))


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 15, 18, 22])
def test_versions_are_kept(opset: int) -> None:
    g = Graph()
    x = g.norm(g.input("n", 4, "h", "w"), 4)
    model = g.model(g.norm(g.conv(x, 3, 4, pads=[1, 1, 1, 1]), 3), opset=opset, ir_version=10)
    model.producer_name, model.doc_string = "someone", "something"
    onnx.helper.set_model_props(model, {"key": "value"})
    folded, report = fold_onnx(model)
    assert report.remaining == (1 if opset < 9 else 0)
    assert report.error_before < 1e-6  # what it is compared with means the same in every version
    if opset < 9:
        assert "cannot write what its shift adds at the border" in report.left[0].reason
    kept = ("opset_import", "ir_version", "producer_name", "doc_string", "metadata_props")
    assert all(getattr(folded, name) == getattr(model, name) for name in kept)
    assert_same(model, folded, (3, 4, 6, 6))


def test_an_older_version_is_refused() -> None:
    g = Graph()
    y = g.conv(g.input(2, 4, 6, 6), 3, 4)
    model = g.model(g.call("BatchNormalization", y, *[g.constant(np.ones(3)) for _ in range(4)], is_test=1), opset=6)
    with pytest.raises(ValueError, match=r"the model must be of version 7 of ONNX's operators or later, got 6"):
        fold_onnx(model)


def test_a_computed_weight_is_left() -> None:
    g = Graph()
    x = g.input("n", 4, "h", "w")
    model = g.model(g.norm(g.call("Conv", x, g.input(3, 4, 1, 1, name="weight")), 3))
    folded, report = fold_onnx(model)
    assert report.left[0].reason.startswith("the weight of the Conv next to it is given by the caller")
    assert folded == model

    g = Graph()
    x = g.input("n", 4, "h", "w")
    weight = g.call("Abs", g.random(3, 4, 1, 1))
    _, report = fold_onnx(g.model(g.norm(g.call("Conv", x, weight), 3)))
    assert report.left[0].reason.startswith("the weight of the Conv next to it is computed, not a constant")


def test_a_model_without_batch_norm_is_returned_as_it_is() -> None:
    g = Graph()
    model = g.model(g.conv(g.input("n", 4, "h", "w"), 3, 4))
    folded, report = fold_onnx(model)
    assert folded == model and folded is not model
    assert report.before == report.remaining == 0


def test_the_given_model_stays_as_it_is() -> None:
    g = Graph()
    model = g.model(g.norm(g.conv(g.input("n", 4, "h", "w"), 3, 4), 3))
    before = model.SerializeToString(deterministic=True)
    fold_onnx(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = folding.find_spec
    monkeypatch.setattr(folding, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ModuleNotFoundError, match='needs onnxruntime. Install with: pip install "batchnorm\\[onnx\\]"'):
        fold_onnx("model.onnx")


def test_a_bias_that_the_exporter_computes_from_constants_is_one() -> None:
    """As torch's exporter writes a convolution without bias: zeros of the weight's size and the input's type."""
    g = Graph()
    x, weight = g.input("n", 4, "h", "w"), g.random(3, 4, 3, 3, name="w")
    zero = g.call("CastLike", g.constant(np.zeros((), np.float32)), x)
    bias = g.call("Expand", zero, g.call("Shape", weight, start=0, end=1))
    model = g.model(g.call("Sum", g.norm(g.call("Conv", x, weight, bias), 3)))
    folded, report = fold_onnx(model)
    assert ops(folded) == ["Conv", "Sum"] and report.remaining == 0
    assert len(folded.graph.initializer) == 2 and folded.graph.initializer[0].name == "w"
    assert_same(model, folded, (3, 4, 6, 6))
