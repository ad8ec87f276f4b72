"""Constants, bodies, types and versions: whatever the models of others have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.surgery.fold.onnx import fold_onnx, folding
from tests.surgery.fold.onnx.graphs import TOLERANCE, Graph, assert_same, initializer, ops, run, with_shapes


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


def test_replaceable_initializers_are_not_constants() -> None:
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


def test_values_that_a_body_reads_from_outside_are_not_changed() -> None:
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
    assert reasons["deep"] == f"it is in the body of If {model.graph.node[-1].name}, which is not searched"
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


def test_functions_are_inlined() -> None:
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
    assert ops(folded) == ["Conv"] and report.notes == ("functions are inlined",)
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
        assert "cannot express the effect of its shift at the border" in report.left[0].reason
    kept = ("opset_import", "ir_version", "producer_name", "doc_string", "metadata_props")
    assert all(getattr(folded, name) == getattr(model, name) for name in kept)
    assert_same(model, folded, (3, 4, 6, 6))


def test_an_older_version_is_refused() -> None:
    g = Graph()
    y = g.conv(g.input(2, 4, 6, 6), 3, 4)
    model = g.model(g.call("BatchNormalization", y, *[g.constant(np.ones(3)) for _ in range(4)], is_test=1), opset=6)
    with pytest.raises(ValueError, match=r"fold_onnx expects a model of version 7 of ONNX's operators or later, got 6"):
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
