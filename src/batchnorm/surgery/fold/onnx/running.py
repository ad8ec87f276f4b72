"""Run ONNX models in their own type by ONNX Runtime, and in float64 for comparison."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from batchnorm.surgery.fold.onnx import reference_kernels
from batchnorm.surgery.fold.onnx.files import is_large, store
from batchnorm.surgery.fold.onnx.graph import DTYPES, Array, every_graph, every_node, tensors

Feeds = dict[str, Array]
Outputs = dict[str, Array]


class CannotRun(RuntimeError):
    """Neither ONNX Runtime nor the reference can run the model."""


class Runner:
    """Run models like a given one: by ONNX Runtime if it has the kernels, else by ONNX's reference implementation.

    Attributes:
        how: "onnxruntime"; "onnxruntime, in float32" if it has no kernels for bfloat16; else "onnx.reference".
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Find out how models like this one can be run.

        Raises:
            CannotRun: Both ONNX Runtime and the reference lack operators or kernels.
        """
        self.how = "onnxruntime"
        try:
            _session(model)
            return
        except Exception as error:
            why = " ".join(str(error).split())[:300]
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
        """Return the inputs in the type in which models are run."""
        if not self.how.endswith("float32"):
            return feeds
        return {name: _cast(value, np.float32) for name, value in feeds.items()}

    def run(self, model: onnx.ModelProto, *runs: Feeds, plain: bool = True) -> list[Outputs]:
        """Return the results of a run for each of the inputs, without integers of 4 bits.

        Args:
            model: A model.
            runs: Inputs by name.
            plain: Whether to turn off ONNX Runtime's optimizations, which fold batch normalization too.

        Raises:
            Exception: Anything that running the model raises.
        """
        if self.how == "onnx.reference":
            return [in_reference(model, feeds) for feeds in runs]
        if self.how.endswith("float32"):
            model = in_type(model, TensorProto.FLOAT)
        session = _session(model, plain)
        # Integers of 4 bits have no type in NumPy.
        names = [output.name for output in session.get_outputs() if "int4)" not in output.type]
        return [dict(zip(names, session.run(names, self.convert(feeds)), strict=True)) for feeds in runs]


def in_reference(model: onnx.ModelProto, feeds: Feeds) -> Outputs:
    """Return the results of ONNX's reference implementation."""
    evaluator = ReferenceEvaluator(model, new_ops=reference_kernels.FAST)
    with np.errstate(all="ignore"):
        found: Any = evaluator.run(None, feeds)
    return dict(zip(evaluator.output_names, found, strict=True))


def exact(model: onnx.ModelProto, *runs: Feeds) -> list[Outputs] | None:
    """Return the results in float64; None if the reference is slow or fails."""
    if is_large(model) or not reference_kernels.fast(model):
        return None
    try:
        wide = in_type(model, TensorProto.DOUBLE)
        return [in_reference(wide, {k: _cast(v, np.float64) for k, v in feeds.items()}) for feeds in runs]
    except Exception:  # the reference lacks operators, and some do not take float64
        return None


def is_floating(array: Any) -> bool:
    """Return whether it is an array of floating-point numbers, including bfloat16."""
    return isinstance(array, np.ndarray) and (array.dtype.kind == "f" or array.dtype.name == "bfloat16")


def _cast(array: Array, dtype: Any) -> Array:
    return array.astype(dtype) if is_floating(array) else array


def _session(model: onnx.ModelProto, plain: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, too
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


def _types(model: onnx.ModelProto) -> set[int]:
    values = (value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output))
    casts = (a.i for node in every_node(model) for a in node.attribute if a.name == "to")
    return {*(tensor.data_type for tensor in tensors(model)), *values, *casts}


def in_type(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """Return a copy whose floating-point numbers are all of one type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in tensors(copy):
        if tensor.data_type in DTYPES and tensor.data_type != kind:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for graph in every_graph(copy):
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type in DTYPES:
                value.type.tensor_type.elem_type = kind
        del graph.value_info[:]
    for node in every_node(copy):
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in DTYPES:
                attribute.i = kind
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                value = np.asarray(helper.get_attribute_value(attribute)).astype(dtype)
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))
    return copy
