"""Recognize batch normalization of other libraries, by its tensors and its results.

torchvision, detectron2, DETR and its successors each define a `FrozenBatchNorm2d` for `[N, C, H, W]`, with γ, β, mean
and variance as four buffers. They share no base class. Some have an attribute `eps`, others use 1e-5, and older ones 0.

timm's `BatchNormAct2d` derives from torch's layer and applies two modules to the result, `act(drop(BN(x)))`. Its
`FrozenBatchNormAct2d` has four buffers, and the modules.
"""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

VECTORS = ("weight", "bias", "running_mean", "running_var")
# The modules that a layer with an activation applies to its result, in this order.
FOLLOWERS = ("drop", "act")

# The attribute that may hold ε, and the values that ε may have.
_CANDIDATES: tuple[str | float, ...] = ("eps", 1e-5, 0.0)
# For each class and its options, one of these; None if it is another kind of layer.
_known: weakref.WeakKeyDictionary[type, dict[frozenset[Any], str | float | None]] = weakref.WeakKeyDictionary()
# For each class and its options, whether it applies the modules.
_applying: weakref.WeakKeyDictionary[type, dict[frozenset[Any], bool]] = weakref.WeakKeyDictionary()


def foreign_eps(module: nn.Module) -> float | None:
    """Return ε of another library's frozen batch normalization; None if the module is anything else."""
    if not _has_the_vectors(module):
        return None
    known, options = _known.setdefault(type(module), {}), _options(module)
    if options not in known:
        known[options] = next((eps for eps in _CANDIDATES if _computes(module, eps)), None)
    eps = known[options]
    return float(getattr(module, eps)) if isinstance(eps, str) else eps


def applies_followers(module: nn.Module) -> bool:
    """Return whether another library's layer is `act(drop(BN(x)))`, where BN is torch's and the others its modules."""
    kind = type(module)
    if not isinstance(module, _BatchNorm) or kind.__module__.startswith(("torch.", "batchnorm.")):
        return False
    if set(module._modules) != set(FOLLOWERS) or "forward" in vars(module):
        return False
    known, options = _applying.setdefault(kind, {}), _options(module)
    if options not in known:
        known[options] = _applies(module)
    return known[options]


def _options(module: nn.Module) -> frozenset[Any]:
    """Return the attributes by which objects of one class may compute something else, such as an activation."""
    own = ((name, value) for name, value in vars(module).items() if name != "training")
    return frozenset((name, value) for name, value in own if isinstance(value, (bool, str, FunctionType)))


def _has_the_vectors(module: nn.Module) -> bool:
    """Return whether the module holds four vectors as buffers, and nothing else but `drop` and `act`."""
    held = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if set(held) != set(VECTORS) or isinstance(module, (_NormBase, ScriptModule)) or "forward" in vars(module):
        return False
    if set(module._modules) not in (set(), set(FOLLOWERS)) or any(
        parameter is not None for parameter in module._parameters.values()
    ):
        return False
    shape = held["weight"].shape
    return len(shape) == 1 and shape[0] > 0 and all(buffer.shape == shape for buffer in held.values())


class _Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * x + 1.0


class _Act(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def _trial(module: nn.Module, tensors: dict[str, Tensor | None]) -> nn.Module:
    """Return an object with the module's class and attributes, these tensors, and other modules.

    Its `forward` runs neither the module nor its hooks.
    """
    trial = object.__new__(type(module))
    vars(trial).update(vars(module))
    for kind in ("_parameters", "_buffers"):
        held = vars(module)[kind]
        vars(trial)[kind] = {name: tensors.get(name, held[name]) for name in held}
    vars(trial)["_modules"] = {"drop": _Drop(), "act": _Act()} if module._modules else {}
    return trial


def _drawn(channels: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an input and four vectors, drawn in float64."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5

    vectors = {name: drawn(channels) for name in VECTORS}
    vectors["bias"] -= 1.0
    x = 8.0 * drawn(2, channels, 3, 2) - 8.0 + vectors["running_mean"].view(-1, 1, 1)
    return x, vectors  # results of both signs show an activation


def _gives(trial: nn.Module, x: Tensor, expected: Tensor) -> bool:
    if trial._modules:
        expected = (3.0 * expected + 1.0) ** 2
    try:
        y = type(trial).forward(trial, x.clone())
    except Exception:  # another kind of layer may raise anything
        return False
    return isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def _computes(module: nn.Module, eps: str | float) -> bool:
    """Return whether the class normalizes by the running statistics, in training too, with ε or this attribute as ε."""
    if isinstance(eps, str) and type(vars(module).get(eps)) not in (int, float):
        return False
    x, vectors = _drawn(module._buffers["weight"].numel())  # type: ignore[union-attr]
    before = {name: vector.clone() for name, vector in vectors.items()}
    trial = _trial(module, dict(vectors))
    value = eps if isinstance(eps, float) else 0.25  # unlike every default
    if isinstance(eps, str):
        vars(trial)[eps] = value
    weight, bias, mean, var = vectors.values()
    expected = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=value)
    for training in (True, False):
        trial.training = training
        if not _gives(trial, x, expected):
            return False
    return all(torch.equal(vectors[name], before[name]) for name in VECTORS)


@torch.no_grad()
def _applies(module: nn.Module) -> bool:
    """Return whether the class computes `act(drop(BN(x)))` in both modes, with the updates of torch's."""
    x, vectors = _drawn(int(module.num_features))  # type: ignore[arg-type]
    held = {name: vectors[name] if getattr(module, name) is not None else None for name in VECTORS}
    copies = {name: None if vector is None else vector.clone() for name, vector in held.items()}
    tracked = None if module.num_batches_tracked is None else torch.tensor(0, device="cpu")
    trial = _trial(module, {**copies, "num_batches_tracked": tracked})
    vars(trial).update(eps=0.25, momentum=0.25)
    # SyncBatchNorm trains on a GPU only, and this class's `forward` calls that of its base.
    for training in (False,) if isinstance(module, nn.SyncBatchNorm) else (False, True):
        trial.training = training
        mean, var = held["running_mean"], held["running_var"]
        by_batch = training or mean is None
        expected = torch.nn.functional.batch_norm(
            x, mean, var, held["weight"], held["bias"], by_batch, 0.25 if module.track_running_stats else 0.0, 0.25
        )
        if not _gives(trial, x, expected):
            return False
    found = all(copy is None or torch.equal(copy, held[name]) for name, copy in copies.items())  # type: ignore[arg-type]
    return found and (
        tracked is None or isinstance(module, nn.SyncBatchNorm) or int(trial.get_buffer("num_batches_tracked")) == 1
    )
