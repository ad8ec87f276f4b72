"""The verb `fold`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchnorm.cli import loading
from batchnorm.cli.command import OneLineCommand
from batchnorm.cli.loading import Mistake, mistakes_of, shape_of, weights_option
from batchnorm.cli.writing import check_output, open_output, output_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from batchnorm.surgery.fold import FoldReport


@click.command(cls=OneLineCommand)
@click.argument("model", metavar="MODEL.pt2|MODEL.onnx|MODULE.PATH:CALLABLE")
@weights_option
@click.option(
    "--input",
    "sizes",
    multiple=True,
    metavar="N,C,H,W",
    help="Shape of an input, such as 1,3,224,224; once for each argument. Needed for a callable; a .pt2 holds its own "
    "example, and an ONNX file says its sizes, or open ones are tried out.",
)
@output_options("FILE", "the folded network: .pt2 an exported program, .onnx, anything else torch.save of the module")
@click.pass_context
def fold(
    ctx: click.Context, /, model: str, weights: Path | None, sizes: tuple[str, ...], output: Path, overwrite: bool
) -> None:
    r"""Write a network without batch normalization, for inference, and print what went where.

    \b
    Examples:
      batchnorm fold model.pt2 -o folded.pt2
      batchnorm fold net:build --weights net.pth --input 1,3,224,224 -o folded.pt2
      batchnorm fold model.onnx -o folded.onnx
    """
    mistake = mistakes_of(ctx)
    check_output(output, overwrite, mistake)
    shapes = [shape_of(text, mistake) for text in sizes]
    if model.endswith(".onnx"):
        if weights is not None:
            raise mistake("--weights goes with a callable; an ONNX file holds its weights. Leave it out.")
        report = _fold_onnx(Path(model), shapes, output, mistake)
    else:
        report = _fold_torch(model, weights, shapes, output, mistake)
    click.echo(str(report))
    click.echo(f"\nWritten: {output}")


def _fold_torch(
    model: str, weights: Path | None, shapes: list[tuple[int, ...]], output: Path, mistake: Mistake
) -> FoldReport:
    from batchnorm.surgery.fold import FoldError
    from batchnorm.surgery.fold import fold as fold_network

    if output.suffix == ".onnx":
        raise mistake(f"{output} must not be .onnx for a network of PyTorch. Fold it to .pt2 or export it first.")
    example: tuple[Tensor, ...] = ()
    if model.endswith(".pt2"):
        if weights is not None:
            raise mistake("--weights goes with a callable; a .pt2 file holds its weights. Leave it out.")
        network, example = _program(Path(model), mistake)
    else:
        network = loading.network(model, weights, mistake, "the model, if no .pt2 or .onnx file,")
    inputs = tuple(loading.random_input(shape, network) for shape in shapes) or example
    if not inputs:
        raise mistake("--input must give the shape of an input, got none. Add for example --input 1,3,224,224.")
    try:
        folded, report = fold_network(network, inputs)
    except (ValueError, TypeError, FoldError) as error:
        raise mistake(str(error)) from error
    with open_output(output, mistake) as file:
        file.write(_saved(folded, inputs, program=output.suffix == ".pt2"))
    return report


def _fold_onnx(model: Path, shapes: list[tuple[int, ...]], output: Path, mistake: Mistake) -> FoldReport:
    from batchnorm.surgery.fold import FoldError
    from batchnorm.surgery.fold.onnx import fold_onnx

    if output.suffix != ".onnx":
        raise mistake(f"{output} must end in .onnx, as {model} does. Change the name.")
    try:
        return fold_onnx(model, output, inputs=shapes).report
    except (ModuleNotFoundError, ValueError, FoldError) as error:
        raise mistake(str(error)) from error
    except OSError as error:
        raise mistake(f"{output} could not be written", error) from error


def _program(path: Path, mistake: Mistake) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module of an exported program, and the example that it was exported with."""
    import torch

    from batchnorm.models.model_graph import from_program

    if not path.is_file():
        raise mistake(f"{path} must be a file of torch.export.save, but there is none. Check the path.")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise mistake(f"{path} must be a file of torch.export.save, but loading it failed", error) from error
    args, kwargs = program.example_inputs or ((), {})
    if kwargs or not all(isinstance(x, torch.Tensor) for x in args):
        raise mistake(f"{path} must take tensors by position alone. Export it so, or fold it in Python.")
    return from_program(program), tuple(args)


def _saved(folded: nn.Module, inputs: tuple[Tensor, ...], *, program: bool) -> memoryview:
    import torch

    held = io.BytesIO()
    if program:
        torch.export.save(_exported(folded, inputs), held)
    else:
        torch.save(folded, held)
    return held.getbuffer()


def _exported(folded: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The program, with every size open that can be."""
    import torch

    example = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in inputs)
    shapes = tuple(dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for x in example)
    try:
        return torch.export.export(folded, example, dynamic_shapes=shapes)
    except Exception:  # it holds for these sizes alone
        return torch.export.export(folded, inputs)
