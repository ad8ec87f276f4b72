"""The networks that can be compared, and what a user's own must be like."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.norms import Norm

BuildModel = Callable[[Norm, tuple[int, ...], int], nn.Module]


def mlp(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Returns a multilayer perceptron with hidden layers of 64 and 128 units and ReLU.

    The normalization stands before each activation; where it has a shift of its own, the bias before it,
    which it would take away again, is left out.

    Args:
        norm: Makes the normalization layers.
        in_shape: Shape of one sample, without the batch axis.
        num_classes: Number of outputs.
    """
    bias = not norm.replaces_bias
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(math.prod(in_shape), 64, bias=bias),
            norm1=norm(64),
            relu1=nn.ReLU(),
            linear2=nn.Linear(64, 128, bias=bias),
            norm2=norm(128),
            relu2=nn.ReLU(),
            linear3=nn.Linear(128, num_classes),
        )
    )


MODELS: dict[str, BuildModel] = {"mlp": mlp}


@dataclass(frozen=True)
class Model:
    """A network that can be built with any normalization.

    Attributes:
        name: As the user wrote it.
        build: `build(norm, in_shape, num_classes)` returns the network.
    """

    name: str
    build: BuildModel

    def __call__(self, norm: Norm, sample: Tensor, num_classes: int) -> nn.Module:
        """Returns the network on the CPU, tried on `sample`, with its lazy parameters made.

        Args:
            norm: Makes the normalization layers; its `made` is emptied first.
            sample: Some inputs, `[N, *in_shape]`.
            num_classes: Number of outputs.

        Raises:
            ComparisonError: If the callable raises, returns something else than a network, or the
                network's output is not `[N, num_classes]`.
        """
        norm.made.clear()
        in_shape = tuple(sample.shape[1:])
        with blame(f"{self.name} with norm {norm.spec!r}", f"was built with (norm, {in_shape}, {num_classes})"):
            network = self.build(norm, in_shape, num_classes)
        if not isinstance(network, nn.Module):
            raise ComparisonError(
                f"the model callable {self.name} must return a torch.nn.Module, got "
                f"{type(network).__name__}. It is called as callable(norm, in_shape, num_classes)."
            )
        with blame(f"{self.name} with norm {norm.spec!r}", f"was given x {list(sample.shape)}"), torch.no_grad():
            output = network.eval()(sample)
        network.train()
        expected = [len(sample), num_classes]
        if not isinstance(output, Tensor) or list(output.shape) != expected:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ComparisonError(
                f"the model {self.name} must return class scores of shape {expected}, got {got}. Let its "
                "last layer have num_classes outputs."
            )
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ComparisonError(f"the model {self.name} must have parameters to train, got none. Add a layer.")
        return network


def resolve(model: str | BuildModel) -> Model:
    """Returns the model that a name, a `module.path:callable`, or a callable stands for.

    Raises:
        ComparisonError: If there is no such model, module or callable.
    """
    if not isinstance(model, str):
        if not callable(model):
            raise ComparisonError(f"model must be a name or a callable, got {type(model).__name__}. Pass a function.")
        return Model(getattr(model, "__qualname__", type(model).__name__), model)
    if model in MODELS:
        return Model(model, MODELS[model])
    path, colon, name = model.partition(":")
    if not (colon and path and name):
        raise ComparisonError(
            f"model must be {', '.join(MODELS)} or module.path:callable, got {model!r}. For a function "
            "build in the file net.py, write net:build."
        )
    with working_directory_importable(), blame(model, "was imported", of="the module of"):
        module = importlib.import_module(path)
    target: object = module
    for attribute in name.split("."):
        if not hasattr(target, attribute):
            close = difflib.get_close_matches(attribute, dir(target), n=1)
            hint = f"Did you mean {close[0]}?" if close else "Check the name behind the colon."
            raise ComparisonError(f"model {model!r} must name something that {path} has, got no {attribute!r}. {hint}")
        target = getattr(target, attribute)
    if not callable(target):
        raise ComparisonError(
            f"model {model!r} must name a callable, got {type(target).__name__}. Name a function "
            "(norm, in_shape, num_classes) that returns the network."
        )
    return Model(model, target)


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Lets modules be imported from the working directory, as `python -m` does."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def blame(model: str, occasion: str, of: str = "the model") -> Iterator[None]:
    """Turns whatever a user's model raises into one line that says what, when and where."""
    try:
        yield
    except ComparisonError:
        raise
    except Exception as error:
        frame = _innermost_frame_of_the_user(error)
        place = f" ({Path(frame.filename).name}, line {frame.lineno})" if frame else ""
        what = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise ComparisonError(
            f"{of} {model} must not fail when it {occasion}, but it raised {what}{place}. Mend it and run again."
        ) from error


def _innermost_frame_of_the_user(error: BaseException) -> traceback.FrameSummary | None:
    """Returns the innermost place that is neither in torch nor in this package."""
    libraries = tuple(str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame for frame in frames if not frame.filename.startswith(libraries)), None)


def initial_values(network: nn.Module, norm: Norm) -> dict[str, Tensor]:
    """Returns copies of the network's parameters by name, those of the normalization layers left out."""
    own = {id(parameter) for layer in norm.made for parameter in layer.parameters()}
    return {
        name: parameter.detach().clone()
        for name, parameter in network.named_parameters()
        if id(parameter) not in own and not is_lazy(parameter)
    }


def share_initial_values(network: nn.Module, norm: Norm, values: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Gives the network the initial values of another one, wherever name and shape are the same.

    Two networks built from one seed differ from the first layer on whose bias only one of them has: the
    random generator has by then given out a different number of values.

    Args:
        network: Changed in place. The parameters of its normalization layers stay as they are.
        norm: What `network` was built with.
        values: Another network's `initial_values`.

    Returns:
        The names under `shared` and, for the network's other parameters, under `own`.
    """
    names: dict[str, list[str]] = {"shared": [], "own": []}
    eligible = initial_values(network, norm)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in eligible and name in values and values[name].shape == parameter.shape:
                parameter.copy_(values[name])
                names["shared"].append(name)
            else:
                names["own"].append(name)
    return names
