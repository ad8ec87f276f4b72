"""How much memory a forward pass keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Knows the tensors that were made while it was active and are still held by someone.

    Args:
        existing: Tensors that were there before: views of them are not new.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self._existing = {StorageWeakRef(t.untyped_storage()).cdata for t in existing}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._existing:
                    self._held[reference.cdata] = reference, storage.nbytes()
        return result

    def look(self) -> None:
        """Note how many bytes are held now, if they are the most so far."""
        self._held = {key: entry for key, entry in self._held.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._held.values()))


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors in lists, tuples and dicts."""
    return [t for t in tree_leaves(batch) if isinstance(t, Tensor)]


def size_of(batch: Any) -> int:
    """Bytes of the tensors in a batch."""
    return sum(t.nbytes for t in tensors_in(batch))
