"""The correction of batch renormalization, r and d. A recomputation uses the r and d of the first pass.

Activation checkpointing repeats forward inside backward, when the running statistics have already been updated. Each
call therefore remembers its r and d with the batch's statistics. A call inside backward looks up the call with the same
statistics, which the operators reproduce bit for bit. Only references to small vectors are kept, and only the
comparison inside backward waits for a device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.ops import eager

# The number of calls that each layer remembers for recomputation.
REMEMBERED = 64


class Renormalization(NamedTuple):
    """The arguments of the correction; `renorm_correction` documents them."""

    mean: Tensor
    mean_low: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor
    rmax: float | Tensor
    dmax: float | Tensor
    eps: float

    def correction(self) -> tuple[Tensor, Tensor]:
        """Return `r = clip(σ_B/σ, 1/rmax, rmax)` and `d = clip((μ_B - μ)/σ, -dmax, dmax)`, `[C]`.

        Section "Renormalization".
        """
        rmax: Any = self.rmax  # the types of torch.clamp do not allow one number and one tensor
        dmax: Any = self.dmax
        wide = eager.wide_dtype(self.mean)
        invstd = (self.running_var.to(wide) + self.eps).rsqrt()
        r = ((self.var.to(wide) + self.eps).sqrt() * invstd).clamp(1.0 / rmax, rmax)
        d = ((self.mean.to(wide) - self.running_mean + self.mean_low) * invstd).clamp(-dmax, dmax)
        return r.to(self.mean.dtype), d.to(self.mean.dtype)


@dataclass
class _RememberedCall:
    mean: Tensor
    var: Tensor
    correction: tuple[Tensor, Tensor]
    used: bool = False

    def has_statistics(self, mean: Tensor, var: Tensor) -> bool:
        """Return whether this call's batch had these statistics; NaN, as after an overflow, equals NaN."""
        here, there = torch.stack([self.mean, self.var]), torch.stack([mean, var])
        return bool(((here == there) | (here.isnan() & there.isnan())).all())


# The key is the layer's running mean, because the compiled operator sees only tensors, not the layer.
_calls: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _remembered_correction(given: Renormalization, caller: str) -> tuple[Tensor, Tensor]:
    """Return r and d of this batch; inside backward, those of its first pass."""
    calls = _calls.setdefault(given.running_mean, deque(maxlen=REMEMBERED))
    if torch._C._current_graph_task_id() == -1:
        calls.append(_RememberedCall(given.mean, given.var, given.correction()))
        return calls[-1].correction
    # Backward visits the calls in reverse order. Of several calls with the same batch, take the latest that has not
    # been recomputed yet. If all have been (nested checkpoints, a second backward), take the latest.
    same = [call for call in reversed(calls) if call.has_statistics(given.mean, given.var)]
    if not same:
        raise RuntimeError(
            f"{caller} expects a call inside backward to repeat one of its last {REMEMBERED} calls (activation "
            f"checkpointing), got a batch whose statistics match none of the {len(calls)} remembered calls. The "
            "running statistics have been updated since, so r and d of the first pass cannot be computed again, and "
            "others would give a wrong gradient. Make the computation before the layer deterministic, recompute "
            "sooner, or exclude the layer from checkpointing."
        )
    call = next((call for call in same if not call.used), same[0])
    call.used = True
    return call.correction


_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")
_LIBRARY.define(
    "renorm_correction(Tensor mean, Tensor mean_low, Tensor var, Tensor running_mean, Tensor running_var, "
    "Tensor rmax, Tensor dmax, float eps, str caller) -> (Tensor r, Tensor d)"
)


def _compiled_correction(mean: Tensor, mean_low: Tensor, var: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Remember and return copies, because a compiled graph reuses the memory of its tensors."""
    given = Renormalization(mean.clone(), mean_low, var.clone(), *others[:-1])
    r, d = _remembered_correction(given, caller=others[-1])
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
    """Return r and d, `[C]` and without gradient, from the running statistics before their update.

    Args:
        mean: μ_B `[C]`, rounded.
        mean_low: The rounding error of mean, `[C]`.
        var: Biased variance of the batch, `[C]`.
        running_mean: `[C]`; also identifies the layer.
        running_var: `[C]`.
        rmax: >= 1, a number or a scalar tensor.
        dmax: >= 0, a number or a scalar tensor.
        eps: Added to both variances.
        caller: The layer's name, for error messages.

    Raises:
        RuntimeError: inside backward, no call with these statistics is remembered.
    """
    statistics = (mean.detach(), mean_low.detach(), var.detach(), running_mean, running_var)
    given = Renormalization(*statistics, rmax, dmax, eps)
    if torch._C._are_functorch_transforms_active():
        return given.correction()
    if torch.compiler.is_compiling():
        limits = (t if isinstance(t, Tensor) else mean.new_full((), t) for t in (rmax, dmax))
        r, d = torch.ops.batchnorm.renorm_correction(*statistics, *limits, eps, caller)
        return r, d
    return _remembered_correction(given, caller)
