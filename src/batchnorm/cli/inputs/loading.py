"""Arguments that several commands share: a network, its weights, data, and the shapes of inputs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from batchnorm import importing
from batchnorm.cli.errors import UsageErrorMaker, usage_errors_of
from batchnorm.text import printable

if TYPE_CHECKING:
    from torch import Tensor, nn

COUNT = click.IntRange(1, 2**31 - 1)


class Weights(NamedTuple):
    """The options `--weights` and `--entry`."""

    path: Path
    entry: str | None


def weights_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--weights` and `--entry`; the command gets both as `weights`, or None."""

    @click.option(
        "--weights",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE.pth",
        help="Weights for the model that the callable returns: a state_dict, or a checkpoint that contains one, such "
        "as those of Lightning, DistributedDataParallel, torch.compile or averaged models; or a .safetensors file. "
        "No code in the file is run.",
    )
    @click.option(
        "--entry",
        metavar="KEY",
        help="The entry of a checkpoint to load, such as model_ema, if several fit. By default, the first that fits "
        "and is not an average of weights.",
    )
    @functools.wraps(command)
    def with_weights(*args: Any, weights: Path | None, entry: str | None, **options: Any) -> Any:
        if weights is None and entry is not None:
            raise usage_errors_of(click.get_current_context())(
                f"--entry selects an entry of the file given as --weights, got --entry {entry} alone. Add --weights."
            )
        return command(*args, weights=None if weights is None else Weights(weights, entry), **options)

    return with_weights


batch_size_option = click.option("--batch-size", type=COUNT, default=64, metavar="N", help="Batch size, for FILE.npz.")


def import_named(written: str, what: str, usage_error: UsageErrorMaker) -> Any:
    """Return the object that `module.path:name` names; modules in the working directory are found too."""
    if not importing.is_named(written):
        raise usage_error(
            f"{what} must be module.path:callable, got {written!r}. For a function build in the file net.py, write "
            "net:build."
        )
    try:
        return importing.attribute_of(importing.import_module(written), written)
    except Exception as error:
        raise usage_error(f"{what} {written} could not be imported", error) from error


def network(written: str, weights: Weights | None, usage_error: UsageErrorMaker, what: str = "the model") -> nn.Module:
    """Return the network that `module.path:callable` names or returns, with these weights."""
    from torch import nn

    target = import_named(written, what, usage_error)
    try:
        model = target if isinstance(target, nn.Module) else target()
    except Exception as error:
        raise usage_error(
            f"{written} must return the network when called without arguments, but it failed", error
        ) from error
    if not isinstance(model, nn.Module):
        raise usage_error(f"{written} must return a torch.nn.Module, got {type(model).__name__}. Return the network.")
    if weights is not None:
        _load(model, weights, usage_error)
    return model


def _load(model: nn.Module, weights: Weights, usage_error: UsageErrorMaker) -> None:
    """Load the weights, and print on standard error what was done to find them in the file."""
    from batchnorm.cli.inputs.checkpoint import CheckpointError, load_weights

    try:
        done = load_weights(model, weights.path, weights.entry)
    except CheckpointError as error:
        raise usage_error(f"{weights.path} {error}") from error
    except Exception as error:
        raise usage_error(
            f"{weights.path} must hold the state_dict of the network, saved with torch.save or safetensors, but "
            "loading it failed",
            error,
        ) from error
    if done:
        print(printable(f"Weights from {weights.path}: {done}."), file=sys.stderr, flush=True)


def batches(data: str, batch_size: int, usage_error: UsageErrorMaker) -> Any:
    """Return the batches of `--data`: from a callable, or from the arrays of a file, shuffled."""
    if not data.endswith(".npz"):
        made = import_named(data, "--data", usage_error)
        try:
            return made() if callable(made) else made
        except Exception as error:
            raise usage_error(
                f"{data} must return batches when called without arguments, but it failed", error
            ) from error
    import numpy as np
    import torch

    try:
        with np.load(data, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except Exception as error:
        raise usage_error(f"{data} must be a file of numpy.savez, but reading it failed", error) from error
    x = arrays.get("x", arrays.get("x_train"))
    y = arrays.get("y", arrays.get("y_train"))
    if x is None or not x.ndim or (y is not None and (not y.ndim or len(x) != len(y))):
        raise usage_error(
            f"{data} must hold x and, if it has targets, as many y, got {', '.join(arrays) or 'nothing'}. "
            "Save the arrays under these names."
        )
    if len(x) == 0:
        raise usage_error(f"{data} must hold at least one sample, got x of shape {list(x.shape)}. Add samples.")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0), device="cpu")
    parts = [torch.from_numpy(x)[order]] if y is None else [torch.from_numpy(x)[order], torch.from_numpy(y)[order]]
    split = [part.split(min(batch_size, max(1, len(x)))) for part in parts]
    return list(split[0]) if y is None else list(zip(*split, strict=True))


def shape_of(text: str, usage_error: UsageErrorMaker) -> tuple[int, ...]:
    """Parse the shape given as `--input`."""
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise usage_error(
            f"--input must be positive numbers separated by commas, got {text!r}. For example, write 1,3,224,224."
        )
    return shape


def random_inputs(
    shapes: list[tuple[int, ...]], network: nn.Module, usage_error: UsageErrorMaker
) -> tuple[Tensor, ...]:
    """Return random tensors of these shapes in the network's dtype."""
    import torch

    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    try:
        return tuple(torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise usage_error(
            "--input must be the shape of a tensor that fits into memory, got "
            f"{' and '.join(','.join(map(str, shape)) for shape in shapes)}. Choose smaller sizes."
        ) from error
