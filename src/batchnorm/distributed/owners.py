"""Wrappers that own the parameters of a model: they shard them, or reduce their gradients over processes.

Such a wrapper keeps references to the parameters, so it does not notice when a layer is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_FLATTENED = "_fsdp_flattened"  # set by FullyShardedDataParallel(use_orig_params=True) on each parameter


def sharded_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Return each module whose parameters are sharded, with the wrapper's name."""
    # A program that shards a model has already imported these modules. Importing them here would take time.
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    wrappers = {getattr(fsdp, "FullyShardedDataParallel", None): "FullyShardedDataParallel"}
    wrappers |= {getattr(fsdp, "FSDPModule", None): "fully_shard"}
    distributed_tensor = getattr(tensor, "DTensor", ())
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        for kind, name in wrappers.items():
            if kind is not None and isinstance(module, kind):
                # After an evaluation, parameters of the root are whole until the next backward pass, but still owned.
                found |= dict.fromkeys(module.modules(), name)
        for parameter in module.parameters(recurse=False):
            if getattr(parameter, _FLATTENED, False):  # without its wrapper: a part of the model was passed
                found.setdefault(module, "FullyShardedDataParallel")
            elif isinstance(parameter, distributed_tensor):
                found.setdefault(module, "torch.distributed.tensor")
    return found


def check_not_sharded(caller: str, model: nn.Module, layers: Iterable[tuple[str, nn.Module]] | None = None) -> None:
    """Check that no wrapper shards the parameters of these layers, given with their paths (by default, of any module).

    Raises:
        ValueError: FullyShardedDataParallel, fully_shard or a tensor-parallel plan shards one of them.
    """
    sharded = sharded_modules(model)
    for path, module in model.named_modules() if layers is None else layers:
        if wrapper := sharded.get(module):
            what = (
                f"{path!r} ({type(module).__name__}), whose parameters {wrapper} shards"
                if path
                else (f"a model that {wrapper} shards")
            )
            raise ValueError(
                f"{caller} expects parameters that are whole on every process, got {what}. "
                f"Call {caller} before sharding, or on a model of its own with the full state dict."
            )


def check_not_reduced(caller: str, model: nn.Module, why: str) -> None:
    """Check that the model is not in DistributedDataParallel; `why` says why it must not be, and what to do.

    Raises:
        ValueError: it is.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{caller} expects a model that is not yet in DistributedDataParallel, got one that is. The wrapper {why}."
        )


@contextmanager
def reduced_parameters_kept(caller: str, model: nn.Module) -> Iterator[None]:
    """Check that the block does not change which parameters each DistributedDataParallel in the model has to reduce.

    Raises:
        ValueError: the block adds parameters, whose gradients would never be reduced; it removes parameters, for whose
            gradients DistributedDataParallel would wait, unless it has `find_unused_parameters=True`. The caller must
            undo its change.
    """
    before = {m: _trained(m) for m in model.modules() if isinstance(m, DistributedDataParallel)}
    yield
    for wrapper, former in before.items():
        now = _trained(wrapper)
        new, missing = [[name for p, name in a.items() if p not in b] for a, b in ((now, former), (former, now))]
        if new or (missing and not wrapper.find_unused_parameters):
            what = f"adds the parameter {new[0]!r}" if new else f"stops training {missing[0]!r}"
            unused = "" if new else ", or pass it find_unused_parameters=True"
            raise ValueError(
                f"{caller} expects to keep the parameters that DistributedDataParallel reduces, got a change that "
                f"{what}. Call {caller} first, then wrap the model{unused}. The model is unchanged."
            )


def _trained(wrapper: DistributedDataParallel) -> dict[nn.Parameter, str]:
    return {p: name for name, p in wrapper.module.named_parameters() if p.requires_grad}
