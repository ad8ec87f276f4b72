"""What several verbs are given: a network, its weights, and other things that a callable makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchnorm import importing
from batchnorm.cli.command import OneLineError

if TYPE_CHECKING:
    from torch import Tensor, nn

Mistake = Callable[..., OneLineError]

weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.pth",
    help="state_dict to load into the model that the callable returns; loaded with weights_only=True.",
)

batch_size_option = click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="For FILE.npz."
)


def mistakes_of(ctx: click.Context) -> Mistake:
    """Makes the error of a command from a message and, if there is one, its cause."""

    def mistake(message: str, cause: BaseException | None = None) -> OneLineError:
        return OneLineError(ctx.command_path, message if cause is None else f"{message}: {_told(cause)}")

    return mistake


def import_named(written: str, what: str, mistake: Mistake) -> Any:
    """Return the object that `module.path:name` names; modules in the working directory are found too."""
    if not importing.is_named(written):
        raise mistake(
            f"{what} must be module.path:callable, got {written!r}. For a function build in the file net.py, write "
            "net:build."
        )
    try:
        return importing.attribute_of(importing.import_module(written), written)
    except Exception as error:
        raise mistake(f"{what} {written} could not be imported", error) from error


def network(words: str, weights: Path | None, mistake: Mistake, what: str = "the model") -> nn.Module:
    """The network that `module.path:callable` is or returns, with these weights."""
    import torch
    from torch import nn

    target = import_named(words, what, mistake)
    try:
        model = target if isinstance(target, nn.Module) else target()
    except Exception as error:
        raise mistake(f"{words} must return the network when called without arguments, but it failed", error) from error
    if not isinstance(model, nn.Module):
        raise mistake(f"{words} must return a torch.nn.Module, got {type(model).__name__}. Return the network.")
    if weights is not None:
        try:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:
            raise mistake(
                f"{weights} must be the state_dict of the network, saved with torch.save, but", error
            ) from error
    return model


def batches(data: str, batch_size: int, mistake: Mistake) -> Any:
    """What `--data` names: batches that a callable returns, or those of a file's arrays, shuffled."""
    if not data.endswith(".npz"):
        made = import_named(data, "--data", mistake)
        try:
            return made() if callable(made) else made
        except Exception as error:
            raise mistake(f"{data} must return batches when called without arguments, but it failed", error) from error
    import numpy as np
    import torch

    try:
        with np.load(data, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except Exception as error:
        raise mistake(f"{data} must be a file of numpy.savez, but", error) from error
    x = arrays.get("x", arrays.get("x_train"))
    y = arrays.get("y", arrays.get("y_train"))
    if x is None or (y is not None and len(x) != len(y)):
        raise mistake(f"{data} must hold x and, if it has targets, as many y, got {', '.join(arrays) or 'nothing'}.")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = [torch.from_numpy(x)[order]] if y is None else [torch.from_numpy(x)[order], torch.from_numpy(y)[order]]
    split = [part.split(batch_size) for part in parts]
    return list(split[0]) if y is None else list(zip(*split, strict=True))


def shape_of(text: str, mistake: Mistake) -> tuple[int, ...]:
    """The sizes that `--input` names."""
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise mistake(f"--input must be positive numbers with commas between, got {text!r}. Write such as 1,3,224,224.")
    return shape


def random_input(shape: tuple[int, ...], network: nn.Module) -> Tensor:
    """Of the network's own type."""
    import torch

    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    return torch.randn(shape).to(next(floating, torch.float32))


def _told(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
