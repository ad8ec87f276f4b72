"""ONNX graphs, written a call at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


class Graph:
    """Calls and constants in the order in which they are added; every method returns a tensor's name."""

    def __init__(self, dtype: Any = np.float32, seed: int = 0) -> None:
        self.dtype = np.dtype(dtype)
        self.generator = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    @property
    def kind(self) -> int:
        return helper.np_dtype_to_tensor_dtype(self.dtype)

    def input(self, *shape: Any, name: str = "x") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.kind, shape))
        return name

    def constant(self, value: Any, name: str | None = None) -> str:
        value = np.asarray(value)
        array = value.astype(self.dtype) if value.dtype.kind == "f" else value
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def random(self, *shape: int, name: str | None = None) -> str:
        return self.constant(self.generator.normal(size=shape), name)

    def call(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        output = name or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}.call", **attributes))
        return output

    def conv(self, x: str, size: int, given: int, kernel: Sequence[int] = (3, 3), **attributes: Any) -> str:
        """With a bias."""
        weight = self.random(size, given // attributes.get("group", 1), *kernel)
        return self.call("Conv", x, weight, self.random(size), **attributes)

    def norm(self, x: str, channels: int, *, scale: Any = None, var: Any = None, name: str | None = None) -> str:
        tensors = (
            self.generator.normal(size=channels) if scale is None else np.asarray(scale, float),
            self.generator.normal(size=channels),
            self.generator.normal(size=channels),
            self.generator.uniform(0.3, 2.0, size=channels) if var is None else np.asarray(var, float),
        )
        return self.call("BatchNormalization", x, *(self.constant(t) for t in tensors), name=name, epsilon=1e-3)

    def model(self, *outputs: str, opset: int = 20, ir_version: int = 10) -> onnx.ModelProto:
        results = [helper.make_tensor_value_info(name, self.kind, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, results, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        model = with_shapes(model)
        onnx.checker.check_model(model)
        return model


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """With what ONNX infers about its results, which must say how many axes they have."""
    inferred = onnx.shape_inference.infer_shapes(model)
    del inferred.graph.value_info[:]
    return inferred


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def initializer(model: onnx.ModelProto, name: str) -> Any:
    found = [tensor for tensor in model.graph.initializer if tensor.name == name]
    assert len(found) == 1, [tensor.name for tensor in model.graph.initializer]
    return numpy_helper.to_array(found[0])


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
