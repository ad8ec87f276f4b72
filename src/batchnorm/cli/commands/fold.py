"""The command `fold`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchnorm.cli.errors import UsageErrorMaker, library_errors, usage_errors_of
from batchnorm.cli.inputs import loading
from batchnorm.cli.inputs.loading import Weights, shape_of, weights_options
from batchnorm.cli.outputs.reporting import ReportingCommand, print_report
from batchnorm.cli.outputs.writing import check_output, open_output, output_options, save_in_memory
from batchnorm.cli.syntax import complete_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from batchnorm.surgery.fold import FoldReport


@click.command(cls=ReportingCommand)
@click.argument("model", metavar="MODEL.pt2|MODEL.onnx|MODULE.PATH:CALLABLE", shell_complete=complete_files)
@weights_options
@click.option(
    "--input",
    "sizes",
    multiple=True,
    metavar="N,C,H,W",
    help="Shape of an input, such as 1,3,224,224; once for each argument. Required for a callable. A .pt2 file holds "
    "its own example. An ONNX file gives its sizes; if they are open, common sizes are tried.",
)
@click.option(
    "--trust",
    is_flag=True,
    help="Load a .pt2 file that holds more than tensors and operators on them. Such a file can run any code.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Relative error that one fold may make; by default 1e-5 for float32, and less or more for other types.",
)
@output_options("FILE", "the folded network (.pt2: exported program; .onnx; otherwise the module by torch.save)")
@click.pass_context
def fold(
    ctx: click.Context,
    /,
    model: str,
    weights: Weights | None,
    sizes: tuple[str, ...],
    trust: bool,
    tolerance: float | None,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    r"""Write a network without batch normalization for inference, and print where each layer went.

    \b
    Examples:
      batchnorm fold model.pt2 -o folded.pt2
      batchnorm fold net:build --weights net.pth --input 1,3,224,224 -o folded.pt2
      batchnorm fold model.onnx -o folded.onnx
    """
    usage_error = usage_errors_of(ctx)
    check_output(output, overwrite, usage_error)
    shapes = [shape_of(text, usage_error) for text in sizes]
    if trust and not model.endswith(".pt2"):
        raise usage_error("--trust applies only to a .pt2 file, got another model. Leave --trust out.")
    if model.endswith(".onnx"):
        if weights is not None:
            raise usage_error("--weights requires a callable; an ONNX file holds its weights. Leave --weights out.")
        report = _fold_onnx(Path(model), shapes, tolerance, output, overwrite, usage_error)
    else:
        report = _fold_torch(model, weights, shapes, trust, tolerance, output, overwrite, usage_error)
    print_report(report, as_json, output)


def _fold_torch(
    model: str,
    weights: Weights | None,
    shapes: list[tuple[int, ...]],
    trust: bool,
    tolerance: float | None,
    output: Path,
    overwrite: bool,
    usage_error: UsageErrorMaker,
) -> FoldReport:
    from batchnorm.surgery.fold import FoldError
    from batchnorm.surgery.fold import fold as fold_network

    if output.suffix == ".onnx":
        raise usage_error(
            f"{output} must not end in .onnx for a network of PyTorch. Write a .pt2 file, or export it to ONNX first."
        )
    example: tuple[Tensor, ...] = ()
    if model.endswith(".pt2"):
        if weights is not None:
            raise usage_error("--weights requires a callable; a .pt2 file holds its weights. Leave --weights out.")
        network, example = _program(Path(model), trust, usage_error)
    else:
        network = loading.network(model, weights, usage_error, "the model, if it is not a .pt2 or .onnx file,")
    inputs = loading.random_inputs(shapes, network, usage_error) or example
    if not inputs:
        raise usage_error("--input must give the shape of an input, got none. Add for example --input 1,3,224,224.")
    with library_errors(usage_error, FoldError):
        folded, report = fold_network(network, inputs, tolerance=tolerance)
    with open_output(output, overwrite, usage_error) as file:
        file.write(_saved(folded, inputs, program=output.suffix == ".pt2"))
    return report


def _fold_onnx(
    model: Path,
    shapes: list[tuple[int, ...]],
    tolerance: float | None,
    output: Path,
    overwrite: bool,
    usage_error: UsageErrorMaker,
) -> FoldReport:
    from batchnorm.surgery.fold import FoldError
    from batchnorm.surgery.fold.onnx import fold_onnx

    if output.suffix != ".onnx":
        raise usage_error(f"{output} must end in .onnx, as {model} does. Change the name.")
    try:
        with library_errors(usage_error, FoldError, ModuleNotFoundError):
            return fold_onnx(model, output, inputs=shapes, tolerance=tolerance, overwrite=overwrite).report
    except OSError as error:
        raise usage_error(f"{output} could not be written", error) from error


def _program(path: Path, trust: bool, usage_error: UsageErrorMaker) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the module of an exported program, and the example that it was exported with."""
    import torch

    from batchnorm.cli.inputs import program
    from batchnorm.models.graphs.tracing.exported import from_program

    if not path.is_file():
        raise usage_error(f"{path} must be a file of torch.export.save, but there is none. Check the path.")
    try:
        exported = program.load(path, trust=trust)
        network = from_program(exported)
    except program.UntrustedError as error:
        raise usage_error(
            f"{path} must hold only tensors and operators on them, but it holds {error}, which can run code. If you "
            "trust the file, add --trust."
        ) from error
    except Exception as error:
        raise usage_error(f"{path} must be a file of torch.export.save, but loading it failed", error) from error
    args, kwargs = exported.example_inputs or ((), {})
    if kwargs or not all(isinstance(x, torch.Tensor) for x in args):
        raise usage_error(f"{path} must take positional tensors only. Export it that way, or fold it in Python.")
    return network, tuple(args)


def _saved(folded: nn.Module, inputs: tuple[Tensor, ...], *, program: bool) -> memoryview:
    import torch

    if program:
        return save_in_memory(torch.export.save, _exported(folded, inputs))
    return save_in_memory(torch.save, folded)


def _exported(folded: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Export the network, with dynamic sizes if possible."""
    import torch

    example = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in inputs)
    shapes = tuple(dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for x in example)
    try:
        return torch.export.export(folded, example, dynamic_shapes=shapes)
    except Exception:  # the graph is valid for these sizes only
        return torch.export.export(folded, inputs)
