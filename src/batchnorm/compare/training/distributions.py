"""Distributions at every normalization and activation of a trained network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from batchnorm.compare.inputs.norms import Norm
from batchnorm.compare.records import Distribution
from batchnorm.compare.training.measurements import binned
from batchnorm.nn.followed import followers

SAMPLES = 128
STAGES = ("input", "normalized", "activated")
_NAMES = (
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "elu", "elu_", "selu", "selu_",
    "celu", "celu_", "gelu", "silu", "mish", "sigmoid", "sigmoid_", "hardsigmoid", "tanh", "tanh_", "hardtanh",
    "hardtanh_", "hardswish", "softplus", "softsign", "logsigmoid", "threshold", "threshold_",
)  # fmt: skip
# Modules of torch.nn call these functions, too.
_ACTIVATIONS = frozenset(
    getattr(place, name) for place in (torch, Tensor, F, torch._C._nn) for name in _NAMES if hasattr(place, name)
)


@dataclass
class _Site:
    """A normalization and the activation of its output or input, or an activation without normalization."""

    stages: dict[str, dict[str, Any]]
    layer: str = ""
    normalized: bool = False


class _Observer(TorchFunctionMode):
    """Record the calls of normalization layers and activations in a forward pass.

    An activation belongs to the last normalization before it, unless another one has already used that. If a
    normalization reads the output of an activation directly, the activation belongs to it.

    Args:
        names: The name of each normalization layer.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.sites: list[_Site] = []
        self._names = names
        self._calls: Counter[str] = Counter()
        self._inside = 0  # normalization layers that are running; their own functions do not count
        self._open: _Site | None = None  # the last normalization, until an activation follows
        self._activated: tuple[Tensor, _Site] | None = None  # the last activation's output, and where it was noted

    def begin(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note the input of a normalization layer."""
        self._inside += 1
        x = (*arguments, *options.values())[0]
        if self._activated is not None and self._activated[0] is x and not self._activated[1].normalized:
            site = self._activated[1]
        else:
            site = _Site({})
            self.sites.append(site)
        site.stages["input"] = binned(x)
        name = self._names[module]
        call = self._count(name)
        site.layer, site.normalized = name if call == 1 else f"{name}, call {call}", True
        self._open = site

    def end(self, module: nn.Module, _: object, output: Tensor) -> None:
        """Note the output of a normalization layer."""
        self._inside -= 1
        site = self._open
        assert site is not None
        site.stages["activated" if _is_activated(module) else "normalized"] = binned(output)
        if "activated" in site.stages:
            self._open = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], arguments: Any = (), options: Any = None
    ) -> Any:
        """Note the output of an activation."""
        noted = function in _ACTIVATIONS and not self._inside
        options = options or {}
        site = self._open
        if noted and site is None:
            x, name = (*arguments, *options.values())[0], function.__name__
            site = _Site(dict.fromkeys(STAGES[:2], binned(x)), f"{name} {self._count(name)}")
            self.sites.append(site)
        output = function(*arguments, **options)
        if noted and site is not None:
            site.stages["activated"] = binned(output)
            self._activated, self._open = (output, site), None
        return output

    def _count(self, name: str) -> int:
        self._calls[name] += 1
        return self._calls[name]


def _is_activated(module: nn.Module) -> bool:
    """Return whether a normalization applies an activation itself, as `BatchNormAct2d` and timm's layers do."""
    act = followers(module).get("act", nn.Identity())
    return vars(module).get("activation", "none") != "none" or not isinstance(act, nn.Identity)


def distributions(network: nn.Module, norm: Norm, inputs: Tensor) -> list[Distribution]:
    """Return the distributions at every normalization and activation, in evaluation mode.

    A normalization has three: its input, its output, and the output of its activation, if it has one. That is the next
    activation called after the normalization and before another normalization; or, if the normalization reads the
    output of an activation directly, that one. Activations may be modules or functions of torch.

    Args:
        network: In training mode afterwards.
        norm: The norm that the network was built with.
        inputs: `[N, *in_shape]`, on the network's device.
    """
    made = set(norm.made)
    observer = _Observer({module: name for name, module in network.named_modules() if module in made})
    with ExitStack() as stack:
        stack.callback(network.train)
        for module in made:
            stack.callback(module.register_forward_pre_hook(observer.begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(observer.end).remove)
        network.eval()
        with torch.no_grad(), observer:
            network(inputs.clone())  # it may write into its input
    return [
        Distribution(site=number, layer=site.layer, stage=stage, **site.stages[stage])
        for number, site in enumerate(observer.sites)
        for stage in STAGES
        if stage in site.stages
    ]
