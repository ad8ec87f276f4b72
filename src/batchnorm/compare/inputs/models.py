"""The networks of a comparison: each is a name, a network, or a callable that builds one."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.finished import as_is, converted, set_dropout
from batchnorm.compare.inputs.importing import import_named, user_code
from batchnorm.compare.inputs.networks import MODELS
from batchnorm.compare.inputs.norms import AS_IS, IndivisibleError, Norm
from batchnorm.importing import is_named
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

BuildModel = Callable[[Norm, tuple[int, ...], int], nn.Module]
MakeModel = Callable[[], nn.Module]
AnyModel = str | nn.Module | BuildModel | MakeModel
AnyModels = AnyModel | Iterable[AnyModel] | Mapping[str, AnyModel]


@dataclass(frozen=True)
class Model:
    """A network that can be built with any normalization.

    Attributes:
        name: Its name as the user wrote it.
        build: Returns the network: `build(norm, in_shape, num_classes)`, or `build()` if it is finished.
        finished: Whether it already has batch normalization, which the norms of the comparison replace.
        pretrained: Whether every run starts from the weights of one given network. Seeds then differ in the order of
            the data only.
    """

    name: str
    build: Callable[..., Any]
    finished: bool = False
    pretrained: bool = False

    def __call__(self, norm: Norm, sample: Tensor, num_classes: int) -> nn.Module:
        """Return the network on the CPU after a trial on `sample`, which initializes its lazy parameters.

        Args:
            norm: Makes the normalization layers; first, it forgets the layers that it made before.
            sample: Some inputs, `[N, *in_shape]`, on any device.
            num_classes: Number of outputs.

        Raises:
            ComparisonError: If the callable raises, or does not return a network; if the network's output is not
                `[N, num_classes]`; or if it does not follow `norm.placement` or has no dropout layer for `norm.drop`.
        """
        norm.forget()
        sample = sample.cpu()
        in_shape = tuple(sample.shape[1:])
        name = f"{self.name} with norm {norm.spec!r}"
        network = self._finished(norm, sample) if self.finished else self._built(norm, in_shape, num_classes)
        self._check_placement(norm)
        output = self._output(network, sample, name)
        network.train()
        expected = [len(sample), num_classes]
        if not isinstance(output, Tensor) or list(output.shape) != expected:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ComparisonError(
                f"the model {self.name} must return class scores of shape {expected}, got {got}. Give its last layer "
                "num_classes outputs."
            )
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ComparisonError(f"the model {self.name} must have parameters to train, got none. Add a layer.")
        return network

    def _finished(self, norm: Norm, sample: Tensor) -> nn.Module:
        with user_code(self.name, "was called without arguments"):
            network = self.build()
        self._check_module(network, "callable()")
        self._output(network.cpu(), sample, self.name)  # initializes lazy layers
        if norm.spec == AS_IS:
            network = as_is(network, norm)
        else:
            network = converted(network, norm, tuple(sample.shape[1:]), self.name)
        if norm.drop is not None:
            set_dropout(network, norm.drop, self.name)
        return network

    def _built(self, norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        if norm.spec == AS_IS:
            raise ComparisonError(
                f"norm {AS_IS!r} needs finished networks, but {self.name} is built with a norm: it is one of "
                f"{', '.join(MODELS)}, or takes arguments. Name norms, such as none and batch, or give a callable "
                "without arguments."
            )
        name = f"{self.name} with norm {norm.spec!r}"
        try:
            with user_code(name, f"was built with (norm, {in_shape}, {num_classes})"):
                network = self.build(norm, in_shape, num_classes)
        except ComparisonError as error:
            if not isinstance(error.__cause__, IndivisibleError):
                raise
            fitting = IndivisibleError(error.__cause__.groups, self._widths(norm, in_shape, num_classes))
            raise ComparisonError(f"norm {norm.spec!r} must fit {self.name}, but {fitting}.") from error
        self._check_module(network, "callable(norm, in_shape, num_classes)")
        if norm.drop and not norm.dropped:
            raise ComparisonError(
                f"dropout needs a model that makes its dropout layers by norm.dropout, got {self.name}, which makes "
                "none. Call norm.dropout() where the network should have one."
            )
        return network

    def _widths(self, norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> list[int]:
        """Return the number of channels of each normalization."""
        found: list[int] = []

        def noted(num_features: int, dims: int, *_: object, **__: object) -> nn.Module:
            found.append(num_features)
            return nn.Identity()

        self.build(replace(norm, build=noted), in_shape, num_classes)
        return found

    def _check_module(self, network: object, call: str) -> None:
        if not isinstance(network, nn.Module):
            raise ComparisonError(
                f"the model callable {self.name} must return a torch.nn.Module, got {type(network).__name__}. It is "
                f"called as {call}."
            )

    def _check_placement(self, norm: Norm) -> None:
        if norm.placement == "before" or norm.placed or norm.spec == AS_IS:
            return
        if self.finished:
            raise ComparisonError(
                f"placement after needs a model that builds its normalizations, got the finished {self.name}. "
                "Write a callable (norm, in_shape, num_classes) that calls norm.activated."
            )
        raise ComparisonError(
            f"placement after needs a model that makes normalization and activation together, by norm.activated, got "
            f"{self.name}, which makes {len(norm.made)} by norm alone. Write norm.activated(64, nn.ReLU) for "
            "norm(64), nn.ReLU()."
        )

    @staticmethod
    def _output(network: nn.Module, sample: Tensor, name: str) -> object:
        with user_code(name, f"was given x {list(sample.shape)}"), torch.no_grad():
            return network.eval()(sample)


def resolve_all(models: AnyModels) -> dict[str, Model]:
    """Return the models that one or several of `resolve`'s arguments specify, by name; a mapping names them.

    Raises:
        ComparisonError: If there is none, two have the same name, or one does not exist.
    """
    if isinstance(models, Mapping):
        found = [replace(resolve(model), name=str(name)) for name, model in models.items()]
    else:
        given: Iterable[Any] = [models]
        if isinstance(models, str):
            given = [part for part in (part.strip() for part in models.split(",")) if part] or given
        elif isinstance(models, Iterable) and not isinstance(models, nn.Module) and not callable(models):
            given = models
        found = [resolve(model) for model in given]
    names = [model.name for model in found]
    if not names:
        raise ComparisonError("model must have at least one value, got none. Name one.")
    for name in names:
        if names.count(name) > 1:
            raise ComparisonError(
                f"the models must have different names, got {name!r} twice. Leave one out, or name them in Python by a "
                "dict: model={'a': first, 'b': second}."
            )
    return dict(zip(names, found, strict=True))


def resolve(model: AnyModel) -> Model:
    """Return the model that a name, a `module.path:callable`, a callable or a network specifies.

    A network, or a callable without arguments, is finished: the norms replace its batch normalization.

    Raises:
        ComparisonError: If there is no such model, module or callable.
    """
    if isinstance(model, str):
        if model in MODELS:
            return Model(model, MODELS[model])
        if not is_named(model):
            raise ComparisonError(
                f"model must be {', '.join(MODELS)} or module.path:callable, got {model!r}. For a function "
                "build in the file net.py, write net:build."
            )
        name, target = model, import_named(model, "model")
    else:
        target = model
        name = getattr(model, "__qualname__", type(model).__name__)
    if isinstance(target, nn.Module):
        original = target
        return Model(name, lambda: copy.deepcopy(original), finished=True, pretrained=True)
    if not callable(target):
        what = f"model {name!r} must name" if isinstance(model, str) else "model must be a name or"
        raise ComparisonError(
            f"{what} a callable, got {type(target).__name__}. Name a function (norm, in_shape, num_classes) that "
            "returns the network."
        )
    return Model(name, target, finished=_takes_nothing(target))


def _takes_nothing(target: Callable[..., Any]) -> bool:
    """Return whether the callable requires no argument, which means that it makes a finished network."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return False
    if parameters and parameters[0].name == "norm":
        return False  # it builds the network, and its norm has a default
    if not isinstance(target, type) and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return False  # it can take three
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def with_input_norm(network: nn.Module, in_shape: tuple[int, ...]) -> nn.Module:
    """Return the network preceded by a batch normalization of its input, without γ and β.

    The layer standardizes each batch by its own statistics: `[N, C, *S]` by channel, `[N, D]` by feature.

    Args:
        network: Becomes the submodule `network`.
        in_shape: Shape of one sample, without the batch axis.

    Raises:
        ComparisonError: If samples have more than three axes after the channels.
    """
    layers = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
    if len(in_shape) > len(layers):
        raise ComparisonError(
            f"the input norm takes samples [D], [C, L], [C, H, W] or [C, D, H, W], got shape {list(in_shape)}. "
            "Leave it out, or reshape the data."
        )
    input_norm = layers[len(in_shape) - 1](in_shape[0], affine=False)
    return nn.Sequential(OrderedDict(input_norm=input_norm, network=network))


def initial_values(network: nn.Module, norm: Norm) -> dict[str, Tensor]:
    """Return copies of the network's parameters by name, except those of the normalization layers."""
    own = {id(parameter) for layer in norm.made for parameter in layer.parameters()}
    return {
        name: parameter.detach().clone()
        for name, parameter in network.named_parameters()
        if id(parameter) not in own and not is_lazy(parameter)
    }


def share_initial_values(network: nn.Module, norm: Norm, values: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Copy the initial values of another network to all parameters of the same name and shape.

    The same seed is not enough. If only one of two networks has a bias, the random generator yields different values
    from there on.

    Args:
        network: Changed in place. The parameters of its normalization layers stay as they are.
        norm: The norm that `network` was built with.
        values: The `initial_values` of the other network.

    Returns:
        The names of the copied parameters under `shared`, and of the others under `own`.
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
