"""Measure the memory that a forward pass holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Tracks the tensors that were created while it was active and are still referenced.

    Args:
        existing: Tensors that existed before; their views do not count.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self._existing = {StorageWeakRef(storage).cdata for t in existing if (storage := _storage(t)) is not None}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and (storage := _storage(made)) is not None:
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._existing:
                    self._held[reference.cdata] = reference, storage.nbytes()
        return result

    def update_peak(self) -> None:
        """Update `peak` with the number of bytes that are currently held."""
        self._held = {key: entry for key, entry in self._held.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))


def _storage(tensor: Tensor) -> UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except NotImplementedError:  # such as a sparse tensor
        return None
