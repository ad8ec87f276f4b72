"""The correction of batch renormalization, r and d, which a recomputation takes over from the first pass.

Activation checkpointing runs forward again inside backward, when the running statistics have moved on. So each call
notes its r and d beside the batch's statistics, and a call inside backward looks for the one whose statistics were the
same: the operators reproduce them bit for bit. What is noted are references to small vectors; nothing waits for a
device, but for the comparison inside backward.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.ops import eager

# How many calls of one layer may lie between a call and its recomputation.
REMEMBERED = 64


@dataclass
class _Call:
    mean: Tensor
    var: Tensor
    r: Tensor
    d: Tensor
    used: bool = False

    def saw(self, mean: Tensor, var: Tensor) -> bool:
        """Whether this call's batch had these statistics; NaN equals NaN, as after an overflow."""
        here, there = torch.stack([self.mean, self.var]), torch.stack([mean, var])
        return bool(((here == there) | (here.isnan() & there.isnan())).all())


# By the layer's running mean: the compiled operator sees tensors, and no layer.
_calls: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def compute_correction(
    mean: Tensor,
    mean_low: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    rmax: float | Tensor,
    dmax: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`r = clip(σ_B/σ, 1/rmax, rmax)` and `d = clip((μ_B - μ)/σ, -dmax, dmax)`, `[C]`. Section "Renormalization"."""
    most: Any = rmax  # torch.clamp is typed for two numbers or two tensors, not for either
    furthest: Any = dmax
    wide = eager.wide_dtype(mean)
    invstd = (running_var.to(wide) + eps).rsqrt()
    r = ((var.to(wide) + eps).sqrt() * invstd).clamp(1.0 / most, most)
    d = ((mean.to(wide) - running_mean + mean_low) * invstd).clamp(-furthest, furthest)
    return r.to(mean.dtype), d.to(mean.dtype)


def _noted_correction(
    mean: Tensor,
    mean_low: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    rmax: float | Tensor,
    dmax: float | Tensor,
    eps: float,
    caller: str,
) -> tuple[Tensor, Tensor]:
    """r and d of this batch, or inside backward those of its first pass."""
    if torch._C._current_graph_task_id() != -1:
        return _of_first_pass(mean, var, running_mean, caller)
    r, d = compute_correction(mean, mean_low, var, running_mean, running_var, rmax, dmax, eps)
    _calls.setdefault(running_mean, deque(maxlen=REMEMBERED)).append(_Call(mean, var, r, d))
    return r, d


def _of_first_pass(mean: Tensor, var: Tensor, running_mean: Tensor, caller: str) -> tuple[Tensor, Tensor]:
    # Backward goes from the last call to the first: of several with the same batch the latest that had none of its own
    # yet; where all had one (nested checkpoints, a second backward), the latest.
    calls = _calls.get(running_mean, ())
    same = [call for call in reversed(calls) if call.saw(mean, var)]
    if not same:
        raise RuntimeError(
            f"{caller} expects a call inside backward to repeat one of its last {REMEMBERED} calls (activation "
            f"checkpointing), got a batch whose statistics are those of none of the {len(calls)} remembered. The "
            "running statistics have moved, so that r and d of the first pass cannot be computed again, and others "
            "would give a wrong gradient. Make what comes before it deterministic, recompute sooner, or leave the "
            "layer out of the checkpointed part."
        )
    call = next((call for call in same if not call.used), same[0])
    call.used = True
    return call.r, call.d


_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")
_LIBRARY.define(
    "renorm_correction(Tensor mean, Tensor mean_low, Tensor var, Tensor running_mean, Tensor running_var, "
    "Tensor rmax, Tensor dmax, float eps, str caller) -> (Tensor r, Tensor d)"
)


def _compiled_correction(mean: Tensor, mean_low: Tensor, var: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As a compiled graph runs it, which writes over the memory of its tensors once they have served."""
    r, d = _noted_correction(mean.clone(), mean_low, var.clone(), *rest)
    return r.clone(), d.clone()


_LIBRARY.impl("renorm_correction", _compiled_correction, "CompositeExplicitAutograd")


@torch.library.register_fake("batchnorm::renorm_correction", lib=_LIBRARY)
def _(mean: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def renorm_correction(
    mean: Tensor,
    mean_low: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    rmax: float | Tensor,
    dmax: float | Tensor,
    eps: float,
    caller: str,
) -> tuple[Tensor, Tensor]:
    """Return r and d, `[C]` and without gradient, from the running statistics before they move.

    Args:
        mean: μ_B `[C]`, with what its rounding lost in mean_low.
        mean_low: `[C]`.
        var: σ_B² `[C]`, biased.
        running_mean: `[C]`; also tells one layer from another.
        running_var: `[C]`.
        rmax: >= 1, a number or a scalar tensor.
        dmax: >= 0, likewise.
        eps: Added to both variances.
        caller: The layer, in messages.

    Raises:
        RuntimeError: inside a backward, where no call with these statistics is remembered.
    """
    mean, mean_low, var = mean.detach(), mean_low.detach(), var.detach()
    if torch._C._are_functorch_transforms_active():
        return compute_correction(mean, mean_low, var, running_mean, running_var, rmax, dmax, eps)
    if torch.compiler.is_compiling():
        limits = (t if isinstance(t, Tensor) else mean.new_full((), t) for t in (rmax, dmax))
        r, d = torch.ops.batchnorm.renorm_correction(
            mean, mean_low, var, running_mean, running_var, *limits, eps, caller
        )
        return r, d
    return _noted_correction(mean, mean_low, var, running_mean, running_var, rmax, dmax, eps, caller)
