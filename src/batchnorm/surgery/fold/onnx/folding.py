"""Remove batch normalization from an ONNX model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm._options import as_clause
from batchnorm.models.execution.progress import PATIENCE, bar
from batchnorm.models.report import FoldReport, Result

if TYPE_CHECKING:
    import onnx

PACKAGES = ("onnx", "onnxruntime")


def fold_onnx(
    model: onnx.ModelProto | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    inputs: Mapping[str, Any] | Sequence[Any] | Any | None = None,
    tolerance: float | None = None,
    overwrite: bool = True,
    progress: bool | None = None,
) -> Result[FoldReport]:
    """Return the ONNX model without batch normalization, for inference, and a report of each one.

    This is `batchnorm.fold` for ONNX. Each batch normalization moves backward into the Conv, ConvTranspose, Gemm or
    MatMul that computes its input, or forward into all that read its result, through concatenation, splitting,
    addition, pooling, reshaping and another batch normalization. Branches that are added become one convolution. It
    needs the packages onnx and onnxruntime: `pip install "batchnorm[onnx]"`.

    Args:
        model: A model, or the path of its file and of weights in files beside it. It is not changed.
        output: The path for the folded model. An earlier file is replaced when the new one is complete, and keeps its
            permissions. Weights are written into a file beside it (`.data`) if the original has such files, or if one
            file cannot hold them.
        inputs: Arrays to check with, or their shapes, by name or in the model's order. By default they are random, of
            the sizes that the model gives; for open sizes, several are tried.
        tolerance: The relative error that one fold may make, as in `batchnorm.fold`.
        overwrite: Whether to replace an earlier file at `output`.
        progress: Whether to show a progress bar on standard error after 3 seconds, as in `batchnorm.fold`.

    Returns:
        The folded model, with the versions, names and metadata of the original; and the report, whose `how` names the
        program that ran the model.

    Raises:
        ModuleNotFoundError: onnx or onnxruntime is not installed, or rich with progress=True.
        TypeError: The model is neither a ModelProto nor a path.
        ValueError: The file is not a model, the model cannot be run, or no file can be written at output.
        FoldError: The folded model's results are not the original's.
        OSError: output could not be written. An earlier file is then unchanged.

    Numerics: Weights are computed in float64 and rounded once to each weight's type. ONNX Runtime runs the nodes of
        all folds before and after, on the inputs' values and on random ones, and the results are compared with float64.
        A fold is skipped and reported if its error exceeds both the tolerance and twice the original's own error. The
        whole model is compared in the same way.

    Source: the tutorial, "Fusing into a convolution".

    Examples:
        >>> import numpy as np
        >>> from onnx import helper, numpy_helper
        >>> def constant(name, *shape):
        ...     return numpy_helper.from_array(np.full(shape, 0.5, np.float32), name)
        >>> graph = helper.make_graph(
        ...     [
        ...         helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        ...         helper.make_node("BatchNormalization", ["y", *"sbmv"], ["z"], name="norm"),
        ...     ],
        ...     "net",
        ...     [helper.make_tensor_value_info("x", 1, ["N", 3, 8, 8])],
        ...     [helper.make_tensor_value_info("z", 1, None)],
        ...     [constant("w", 4, 3, 3, 3), *(constant(name, 4) for name in "sbmv")],
        ... )
        >>> opset = helper.make_opsetid("", 20)
        >>> folded, report = fold_onnx(helper.make_model(graph, opset_imports=[opset], ir_version=10))
        >>> [node.op_type for node in folded.graph.node], report.remaining
        (['Conv'], 0)
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'fold_onnx needs {" and ".join(missing)}. Install with: pip install "batchnorm[onnx]"', name=missing[0]
        )
    from batchnorm.surgery.fold.onnx import files
    from batchnorm.surgery.fold.onnx.in_place import fold_in_place

    working, external = _working_copy(model)
    target = None if output is None else Path(output)
    if target is not None:
        _check_output(target, model, external=external, overwrite=overwrite)
    with bar("fold_onnx", progress, after=PATIENCE) as shown:
        report = fold_in_place(working, inputs, tolerance, shown)
    result = Result(working, report)
    if target is not None:
        files.write(working, target, external=external, overwrite=overwrite)
    return result


def _working_copy(model: Any) -> tuple[onnx.ModelProto, bool]:
    """Return a copy of the model that may be changed, and whether its weights are in separate files."""
    import onnx

    from batchnorm.surgery.fold.onnx import files

    if isinstance(model, onnx.ModelProto):
        if files.data_files(model):
            raise ValueError(
                "fold_onnx expects a model that holds its weights, but they are in other files. Pass its path, or read "
                "it with onnx.load."
            )
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy, False
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"fold_onnx expects an onnx.ModelProto or the path of a file, got {type(model).__name__}. Pass one."
        )
    path = Path(model)
    if not path.is_file():
        raise ValueError(f"{path} must be an ONNX file, but there is none. Check the path.")
    try:
        return files.read(path)
    except Exception as error:
        raise ValueError(
            f"{path} must be an ONNX file with all its weights, but reading it failed: {as_clause(error)}. Check "
            "the file."
        ) from error


def _check_output(output: Path, model: Any, *, external: bool, overwrite: bool) -> None:
    from batchnorm.surgery.fold.onnx import files

    if isinstance(model, (str, os.PathLike)) and output.exists() and output.samefile(model):
        raise ValueError(
            f"fold_onnx expects output to be another file than the model, got {output} for both. Choose another name."
        )
    try:
        files.check_output(output, external=external, overwrite=overwrite)
    except OSError as error:
        raise ValueError(f"output {error}") from error
