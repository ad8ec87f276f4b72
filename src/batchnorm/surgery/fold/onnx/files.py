"""Read ONNX files, and write them completely or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from batchnorm.files import check_target, whole_file
from batchnorm.surgery.fold.onnx.graph import tensors

LARGE = 2**31 - 2**22  # bytes of weights that fit into one file with everything else


def is_large(model: onnx.ModelProto) -> bool:
    """Return whether the model is too large for one file."""
    return sum(len(tensor.raw_data) for tensor in tensors(model)) > LARGE


def data_files(model: onnx.ModelProto) -> set[str]:
    """Return the files that hold the weights of a model that was read without them, relative to its own file."""
    held = [entry for t in tensors(model) if uses_external_data(t) for entry in t.external_data]
    return {entry.value for entry in held if entry.key == "location"}


def read(path: Path) -> tuple[onnx.ModelProto, bool]:
    """Return the model with all its weights, and whether they were in separate files.

    Raises:
        Exception: The file is not a model, or weights are missing.
    """
    model = onnx.load_model(path, load_external_data=False)
    if not model.HasField("graph"):
        raise ValueError("it has no graph")
    external = bool(data_files(model))
    if external:
        load_external_data_for_model(model, str(path.parent))
    return model, external


def store(model: onnx.ModelProto, path: Path, *, external: bool, data: str = "model.onnx.data") -> None:
    """Write the model, with its weights in a file beside it if `external`. The given model keeps its weights."""
    if external:
        onnx.save_model(model, path, save_as_external_data=True, location=data)
        load_external_data_for_model(model, str(path.parent))
    else:
        onnx.save_model(model, path)


def check_output(output: Path, *, external: bool, overwrite: bool = True) -> Path:
    """Check that the model can be written, and return the path with links followed.

    Raises:
        OSError: No file can be written there, or the path is a link to another folder and needs weights beside it.
    """
    target = check_target(output, overwrite=overwrite)
    if external and target.parent != Path(os.path.realpath(output.parent)):
        raise OSError(
            f"{output} must be the file itself if its weights are in a separate file, but it is a link to {target}. "
            "Write to that path."
        )
    return target


def write(model: onnx.ModelProto, output: Path, *, external: bool, overwrite: bool = True) -> None:
    """Write the model. An earlier file stays intact until the new one replaces it.

    Separate weights get a name that no file has yet, so that the earlier model keeps its own until then.

    Raises:
        OSError: The model cannot be written. Earlier files are then unchanged.
    """
    external = external or is_large(model)
    output = check_output(output, external=external, overwrite=overwrite)
    data = _free_name(output) if external else ""
    before = _own_data(output)
    with contextlib.ExitStack() as undo:
        with whole_file(output, overwrite=overwrite) as part:
            store(model, part, external=external, data=data)
            if external and (part.parent / data).exists():
                with whole_file(output.parent / data, overwrite=False) as weights:
                    os.replace(part.parent / data, weights)
                undo.callback((output.parent / data).unlink)
        undo.pop_all()  # the model is in its place, so its weights stay
    for name in before:
        with contextlib.suppress(OSError):
            (output.parent / name).unlink()


def _free_name(output: Path) -> str:
    names = (f"{output.name}.data" if i == 1 else f"{output.name}.{i}.data" for i in range(1, 10_000))
    return next(name for name in names if not (output.parent / name).exists())


def _own_data(output: Path) -> set[str]:
    """Return the files with the weights of an earlier result, if `write` could have named them."""
    try:
        held = data_files(onnx.load_model(output, load_external_data=False))
    except Exception:  # there is no earlier result, or it is not a model
        return set()
    own = re.compile(re.escape(output.name) + r"(\.\d+)?\.data")
    return {name for name in held if own.fullmatch(name)}
