"""Recognize frozen batch normalization of other libraries, by its buffers and its results.

torchvision, detectron2, DETR and its successors each define a `FrozenBatchNorm2d` for `[N, C, H, W]`, with γ, β, mean
and variance as four buffers. They share no base class. Some have an attribute `eps`, others use 1e-5, and older ones 0.
"""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase

VECTORS = ("weight", "bias", "running_mean", "running_var")

# The attribute that may hold ε, and the values that ε may have.
_CANDIDATES: tuple[str | float, ...] = ("eps", 1e-5, 0.0)
# For each class and its options, one of these; None if it is another kind of layer.
_known: weakref.WeakKeyDictionary[type, dict[frozenset[Any], str | float | None]] = weakref.WeakKeyDictionary()


def foreign_eps(module: nn.Module) -> float | None:
    """Return ε of another library's frozen batch normalization; None if the module is anything else."""
    if not _has_the_vectors(module):
        return None
    known, options = _known.setdefault(type(module), {}), _options(module)
    if options not in known:
        known[options] = next((eps for eps in _CANDIDATES if _computes(module, eps)), None)
    eps = known[options]
    return float(getattr(module, eps)) if isinstance(eps, str) else eps


def _options(module: nn.Module) -> frozenset[Any]:
    """Return the attributes by which objects of one class may compute something else, such as an activation."""
    own = ((name, value) for name, value in vars(module).items() if name != "training")
    return frozenset((name, value) for name, value in own if isinstance(value, (bool, str, FunctionType)))


def _has_the_vectors(module: nn.Module) -> bool:
    """Return whether the module holds four vectors as buffers, and nothing else."""
    held = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if set(held) != set(VECTORS) or isinstance(module, (_NormBase, ScriptModule)) or "forward" in vars(module):
        return False
    if module._modules or any(parameter is not None for parameter in module._parameters.values()):
        return False
    shape = held["weight"].shape
    return len(shape) == 1 and shape[0] > 0 and all(buffer.shape == shape for buffer in held.values())


@torch.no_grad()
def _computes(module: nn.Module, eps: str | float) -> bool:
    """Return whether the class normalizes by the running statistics, in training too, with ε or this attribute as ε.

    The `forward` of the class runs on an object with the module's attributes and other buffers. Neither the module nor
    its hooks run.
    """
    if isinstance(eps, str) and type(vars(module).get(eps)) not in (int, float):
        return False
    trial = object.__new__(type(module))
    vars(trial).update(vars(module))
    channels = module._buffers["weight"].numel()  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5

    weight, bias, mean, var = vectors = [drawn(channels) for _ in VECTORS]
    bias -= 1.0
    before = [vector.clone() for vector in vectors]
    vars(trial)["_buffers"] = {**module._buffers, **dict(zip(VECTORS, vectors, strict=True))}
    value = eps if isinstance(eps, float) else 0.25  # unlike every default
    if isinstance(eps, str):
        vars(trial)[eps] = value
    x = 8.0 * drawn(2, channels, 3, 2) - 8.0 + mean.view(-1, 1, 1)  # results of both signs show an activation
    expected = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=value)
    for training in (True, False):
        trial.training = training
        try:
            y = type(module).forward(trial, x.clone())
        except Exception:  # another kind of layer may raise anything
            return False
        if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(y, expected, rtol=1e-9, atol=1e-9):
            return False
    return all(map(torch.equal, vectors, before))
