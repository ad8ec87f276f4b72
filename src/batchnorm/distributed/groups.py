"""Process groups: the processes that share a layer's statistics, and errors that name the process that failed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

PATIENCE = 2.0  # seconds to wait for reports from the other processes of a failed group


@dataclass(eq=False)
class Peers:
    """The processes that share one call's statistics.

    Attributes:
        group: Name of their process group.
        kind: Class and size of the layer, such as `SyncBatchNorm(64)`; the same on all processes.
        name: The layer's path in its model, if known.
        call: The number of the exchange in forward.
    """

    group: str
    kind: str
    name: str = ""
    call: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}" if self.name else self.kind


@dataclass
class History:
    """The number of a group's exchanges, and the kinds of layers that made them."""

    calls: int = 0
    kinds: set[str] = field(default_factory=set)


_HISTORIES: WeakKeyDictionary[Any, History] = WeakKeyDictionary()


def history(group: Any) -> History:
    """Return the group's history, which the first call creates."""
    return _HISTORIES.setdefault(group, History())


def peers(group: str | None, kind: str, name: str = "") -> Peers | None:
    """Return the processes of a group, or all processes for None; return None if this process is alone."""
    found = _group_of_several(group)
    return None if found is None else Peers(found, kind, name)


def _group_of_several(group: str | None) -> str | None:
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise RuntimeError(
                f"a layer over the process group {group!r} expects torch.distributed to be initialized, and it is not. "
                "Call torch.distributed.init_process_group and new_group, or set its process_group to None."
            )
        return None
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is not None and wrapper._join_config.enable and not wrapper._join_config.throw_on_early_termination:
        raise RuntimeError(
            "a synchronized layer expects that every process exchanges statistics in every step, got a model in "
            "DistributedDataParallel.join(), where a process that has run out of batches does not. Use "
            "batchnorm.join(parallel), or parallel.join(throw_on_early_termination=True)."
        )
    found = dist.group.WORLD if group is None else resolve(group)
    assert found is not None
    return str(found.group_name) if dist.get_world_size(found) > 1 else None


# The same as torch.compiler.assume_constant_result, without importing the compiler.
_group_of_several._dynamo_marked_constant = True  # type: ignore[attr-defined]


def group_name(process_group: Any) -> str | None:
    """Return the name of a process group of this process, or None for None, which means all processes.

    Raises:
        ValueError: this process is not in the group.
        TypeError: the argument is not a process group.
    """
    if process_group is None:
        return None
    if dist.is_available():
        if process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "process_group expects a group that includes this process, got one without it "
                "(torch.distributed.new_group returns a placeholder there). Pass each process its own group."
            )
        if isinstance(process_group, dist.ProcessGroup):
            return str(process_group.group_name)
    raise TypeError(
        f"process_group expects a torch.distributed process group or None, got {type(process_group).__name__}. "
        "Create one with torch.distributed.new_group(ranks)."
    )


def resolve(group: str) -> Any:
    """Return the process group of this name.

    Raises:
        RuntimeError: this process has none.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"a layer over the process group {group!r} expects that group in this process, got none of that name "
            "(groups are not saved with a model). Create it with torch.distributed.new_group and set process_group."
        ) from error


def failure(peers: Peers, group: Any, phase: str, reason: str, named: int | None = None) -> RuntimeError:
    """Return an error with the layer, the reason on this process, and the reports of the other processes.

    It lists the ranks that did not report, except `named`, which is already in the reason.
    """
    ranks = dist.get_process_group_ranks(group)
    rank = dist.get_rank()
    reports: dict[int, str] = {}
    unreachable = ""
    try:
        store = group.get_group_store()
        store.set(f"batchnorm/failure/{rank}", str(peers))
        until = time.monotonic() + PATIENCE
        while True:
            for other in ranks:
                if other != rank and other not in reports and store.check([f"batchnorm/failure/{other}"]):
                    reports[other] = store.get(f"batchnorm/failure/{other}").decode()
            if len(reports) == len(ranks) - 1 or time.monotonic() > until:
                break
            time.sleep(0.02)
    except (RuntimeError, OSError) as error:  # the store usually runs in rank 0, which may have died
        unreachable = f" The store through which ranks report cannot be reached: {_first_sentence(error)}."
    silent = [str(other) for other in ranks if other not in (rank, named, *reports)]
    others = "".join(f" Rank {other} failed in {layer}." for other, layer in reports.items())
    if silent:
        others += f" No report from rank {', '.join(silent)}: it died, still waits, or is elsewhere in its program."
    return RuntimeError(
        f"{peers} on rank {rank} expects all of ranks {', '.join(map(str, ranks))} to exchange {phase} with it, but "
        f"{reason}.{others}{unreachable} Every process must run the same synchronized layers, with the same number of "
        "channels, in the same order."
    )


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__


def check_same_kind(peers: Peers, group: Any) -> None:
    """Check, once for each kind of layer, that all processes are in a layer of that kind.

    The first process to arrive writes its kind to the group's store, and the others compare it with theirs.
    """
    kinds = history(group).kinds
    if peers.kind in kinds:
        return
    key = f"batchnorm/kind/{len(kinds)}"
    try:
        store = group.get_group_store()
        if store.add(f"{key}/arrived", 1) == 1:
            store.set(key, json.dumps([dist.get_rank(), str(peers), peers.kind]))
        rank, layer, kind = json.loads(store.get(key))
    except (RuntimeError, OSError) as error:
        raise failure(peers, group, "moments", f"the group's store failed with: {_first_sentence(error)}") from error
    if kind != peers.kind:
        raise failure(peers, group, "moments", f"rank {rank} is in {layer}", named=rank)
    kinds.add(peers.kind)


def collective(peers: Peers, group: Any, phase: str, call: Callable[[], Any]) -> None:
    """Run a collective; if it fails, raise an error that names the layer and the ranks."""
    try:
        call()
    except RuntimeError as error:
        raise failure(peers, group, phase, f"the collective failed with: {_first_sentence(error)}") from error


def require(agree: Tensor, peers: Peers, group: Any, phase: str, reason: str) -> None:
    """Raise an error unless `agree`; on a GPU, by an assertion on the device, so that the host does not wait."""
    if agree.is_cuda:
        torch._assert_async(agree, f"{peers}: the processes that exchanged {phase} are not in the same layer")
    elif not agree:
        raise failure(peers, group, phase, reason)
