"""The memory of tensors, and which part of it has been written since it was allocated."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ops.triton.emulator.faults import Fault
from tests.ops.triton.emulator.memory.bytes import Memory
from tests.ops.triton.emulator.memory.regions import Region

_UNINITIALIZED = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
_ALIGNMENT = 16  # of the widest access


class Allocations(TorchDispatchMode):
    """Knows the memory of every tensor, and while it is active, what torch's operations allocate, read and write."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[StorageWeakRef, Memory, Tensor | None]] = {}

    def region(self, name: str, t: Tensor) -> Region:
        """Return the bytes from the first to the last element of a tensor."""
        elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        return Region(name, self._memory(t), t.data_ptr() - _base(t), elements * t.itemsize)

    def check_written(self, t: Tensor, what: str) -> None:
        """Raise an error if a part of a tensor has not been written."""
        flags = self._flags(t)
        if flags is not None and not bool(flags.all()):
            raise Fault(f"{what} has {int((~flags).sum())} values of {t.numel()} that nothing has written.")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_given(func, args, kwargs or {}))
        if not _is_view(func):
            for t, written in given:
                if not written:
                    self.check_written(t, f"The argument of {func}")
        result = func(*args, **kwargs or {})
        if func._schema.name in _UNINITIALIZED:
            self._track(result)
        for t, written in given:
            if written and (flags := self._flags(t)) is not None:
                flags.fill_(True)
        return result

    def _track(self, t: Tensor) -> None:
        if t.device.type == "cpu" and t.numel():
            size = t.untyped_storage().nbytes()
            flags = torch.from_numpy(np.zeros(-(-size // t.itemsize), np.bool_))
            self._remember(t, flags)

    def _remember(self, t: Tensor, flags: Tensor | None) -> Memory:
        storage, base = t.untyped_storage(), _base(t)
        size = storage.data_ptr() + storage.nbytes() - base
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8)
        memory = Memory(data, t.itemsize, None if flags is None else flags.numpy())
        self._known[storage.data_ptr()] = StorageWeakRef(storage), memory, flags
        return memory

    def _find(self, t: Tensor) -> tuple[Memory, Tensor | None] | None:
        found = self._known.get(t.untyped_storage().data_ptr())
        if found is None or found[0].expired() or found[0].cdata != t.untyped_storage()._cdata:
            return None
        return found[1:]

    def _memory(self, t: Tensor) -> Memory:
        found = self._find(t)
        return self._remember(t, None) if found is None else found[0]

    def _flags(self, t: Tensor) -> Tensor | None:
        """Return which elements of a tensor have been written, or None if all have."""
        found = self._find(t) if t.device.type == "cpu" and t.numel() else None
        if found is None or (flags := found[1]) is None:
            return None
        if flags.numel() * t.itemsize == t.untyped_storage().nbytes():
            return flags.as_strided(t.shape, t.stride(), t.storage_offset())
        return flags  # of another type: all that shares its memory


def _base(t: Tensor) -> int:
    """Return the address of a tensor's memory, rounded down so that offsets are aligned as addresses are."""
    return t.untyped_storage().data_ptr() // _ALIGNMENT * _ALIGNMENT


def _is_view(func: Any) -> bool:
    """Return whether an operation returns a view of its argument, without reading it."""
    aliases = [r.alias_info for r in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _given(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    """Yield the tensors among the arguments of an operation, and whether it writes them."""
    declared = func._schema.arguments
    values = [*zip(declared, args, strict=False), *((a, kwargs[a.name]) for a in declared if a.name in kwargs)]
    shapes_only = func._schema.name in _UNINITIALIZED
    for argument, value in values:
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and not shapes_only:
                yield t, argument.alias_info is not None and argument.alias_info.is_write
