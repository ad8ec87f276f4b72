"""Running ONNX models: by ONNX Runtime in their own type, and in float64 to compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from batchnorm.surgery.fold.onnx import reference_kernels
from batchnorm.surgery.fold.onnx.files import is_large, store
from batchnorm.surgery.fold.onnx.graph import DTYPES, Array

Feeds = dict[str, Array]
Outputs = dict[str, Array]
_FLOATS = set(DTYPES)
_TYPE_ATTRIBUTES = {"to", "dtype"}
_VALUES = {"value_float": "value", "value_floats": "value"}


class CannotRun(RuntimeError):
    """Nothing here can run the model."""


class Runner:
    """Runs models of one kind: by ONNX Runtime where it has the kernels, else by ONNX's reference.

    Attributes:
        how: "onnxruntime"; "onnxruntime, in float32" where it lacks kernels for bfloat16; else "onnx.reference".
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Finds out how models like this one can be run.

        Raises:
            CannotRun: ONNX Runtime lacks operators or kernels, and the reference does too.
        """
        self.how = "onnxruntime"
        try:
            _session(model)
            return
        except Exception as error:
            why = _told(error)
        try:
            if TensorProto.BFLOAT16 in _types(model):
                self.how = "onnxruntime, in float32"
                _session(in_type(model, TensorProto.FLOAT))
                return
            if TensorProto.DOUBLE in _types(model):
                self.how = "onnx.reference"
                ReferenceEvaluator(model, new_ops=reference_kernels.FAST)
                return
        except Exception:
            pass
        raise CannotRun(why)

    def convert(self, feeds: Feeds) -> Feeds:
        """The inputs in the type that models are run in."""
        return in_float32(feeds) if self.how.endswith("float32") else feeds

    def run(self, model: onnx.ModelProto, *runs: Feeds, plain: bool = True) -> list[Outputs]:
        """The results for each of the inputs.

        Args:
            model: A model.
            runs: Inputs by name.
            plain: Without ONNX Runtime's own optimizations, which fold batch normalization too.

        Raises:
            Exception: Whatever running it raises.
        """
        if self.how == "onnx.reference":
            return [in_reference(model, feeds) for feeds in runs]
        if self.how.endswith("float32"):
            model = in_type(model, TensorProto.FLOAT)
        session = _session(model, plain)
        names = [output.name for output in session.get_outputs()]
        return [dict(zip(names, session.run(names, self.convert(feeds)), strict=True)) for feeds in runs]


def in_reference(model: onnx.ModelProto, feeds: Feeds) -> Outputs:
    """The results by ONNX's reference implementation."""
    evaluator = ReferenceEvaluator(model, new_ops=reference_kernels.FAST)
    with np.errstate(all="ignore"):
        found: Any = evaluator.run(None, feeds)
    return dict(zip(evaluator.output_names, found, strict=True))


def exact(model: onnx.ModelProto, *runs: Feeds) -> list[Outputs] | None:
    """The results in float64; None where the reference has no fast way to them, or fails."""
    if is_large(model) or not reference_kernels.fast(model):
        return None
    try:
        wide = in_type(model, TensorProto.DOUBLE)
        return [in_reference(wide, {k: _cast(v, np.float64) for k, v in feeds.items()}) for feeds in runs]
    except Exception:  # not every operator is in the reference, nor takes float64
        return None


def in_float32(feeds: Mapping[str, Array]) -> Feeds:
    """Floating-point arrays in float32."""
    return {name: _cast(value, np.float32) for name, value in feeds.items()}


def is_floating(array: Any) -> bool:
    """Whether it holds floating-point numbers, bfloat16 among them."""
    return isinstance(array, np.ndarray) and (array.dtype.kind == "f" or array.dtype.name == "bfloat16")


def _cast(array: Array, dtype: Any) -> Array:
    return array.astype(dtype) if is_floating(array) else array


def _session(model: onnx.ModelProto, plain: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised too
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    if not is_large(model):
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory(prefix="batchnorm-") as folder:
        path = Path(folder) / "model.onnx"
        store(model, path, external=True)
        return onnxruntime.InferenceSession(path, options, providers=providers)


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# Types -------------------------------------------------------------------------------------------------------------


def _types(model: onnx.ModelProto) -> set[int]:
    held = {tensor.data_type for tensor in model.graph.initializer}
    held |= {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        held |= {a.t.data_type for a in node.attribute if a.HasField("t")}
        held |= {a.i for a in node.attribute if a.name == "to"}
    return held


def in_type(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """A copy whose floating-point numbers are all of one type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _convert_graph(copy.graph, kind)
    for function in copy.functions:
        _convert_nodes(function.node, kind)
    return copy


def _convert_graph(graph: onnx.GraphProto, kind: int) -> None:
    for tensor in graph.initializer:
        _convert(tensor, kind)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _FLOATS:
            value.type.tensor_type.elem_type = kind
    del graph.value_info[:]
    _convert_nodes(graph.node, kind)


def _convert_nodes(nodes: Sequence[onnx.NodeProto], kind: int) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _convert(attribute.t, kind)
            elif attribute.HasField("g"):
                _convert_graph(attribute.g, kind)
            elif attribute.name in _TYPE_ATTRIBUTES and attribute.i in _FLOATS:
                attribute.i = kind
            elif node.op_type == "Constant" and attribute.name in _VALUES:
                value = np.asarray(helper.get_attribute_value(attribute))
                tensor = numpy_helper.from_array(value.astype(helper.tensor_dtype_to_np_dtype(kind)))
                attribute.CopyFrom(helper.make_attribute("value", tensor))


def _convert(tensor: TensorProto, kind: int) -> None:
    if tensor.data_type in _FLOATS and tensor.data_type != kind:
        value = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
