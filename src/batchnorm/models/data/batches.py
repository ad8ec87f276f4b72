"""Read the user's data batch by batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from batchnorm.models.data.samples import samples_in

Forward = Callable[[nn.Module, Any], object]
MaskOf = Callable[[Any], Tensor | Mapping[str, Tensor] | None]


def check_data(caller: str, data: Any) -> None:
    """Check that the data are an iterable of batches and not a single tensor, which would iterate over samples.

    Raises:
        TypeError: the data are not an iterable of batches.
    """
    expects = f"{caller} expects data to be an iterable of batches, got"
    if isinstance(data, (Tensor, np.ndarray)):
        raise TypeError(
            f"{expects} one {type(data).__name__} of shape {list(data.shape)}. "
            "Pass [x] for a single batch, or a DataLoader."
        )
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(f"{expects} {type(data).__name__}. Pass a list of batches or a DataLoader.")


class Batches:
    """The user's data, with a count of the batches and samples that were read.

    Args:
        data: An iterable of batches.
        max_samples: Stop after the batch that reaches this many samples; None reads all.

    Attributes:
        data: The iterable of batches.
        count: The number of batches.
        samples: The number of samples in them.
        shape: The shape of the first layer's input for the current batch, which the caller sets (see `samples_in`).
    """

    def __init__(self, data: Iterable[Any], max_samples: int | None) -> None:
        self.data = data
        self._max_samples = max_samples
        self.samples = self.count = self._estimate = 0
        self.shape: Sequence[int] | None = None

    @property
    def length(self) -> int | None:
        """The number of batches; None if it depends on `max_samples` or the data have no length."""
        return self._length_of_data() if self._max_samples is None else None

    def expected(self, size: int) -> int | None:
        """Return the number of batches if all have this size; None if neither data nor `max_samples` determine it."""
        limit = None if self._max_samples is None else -(-self._max_samples // size)
        return min((n for n in (limit, self._length_of_data()) if n is not None), default=None)

    def _length_of_data(self) -> int | None:
        try:
            return len(self.data)  # type: ignore[arg-type]
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Any]:
        """Read the data and count batches and samples."""
        for batch in self.data:
            self.count += 1
            self._estimate += samples_in(batch)
            self.shape = None
            yield batch
            self.samples += samples_in(batch, self.shape)
            if self._max_samples is not None and self.samples >= self._max_samples:
                return


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    return [t for t in tree_leaves(batch) if isinstance(t, Tensor)]


def size_of(batch: Any) -> int:
    """Return the number of bytes of the tensors in a batch."""
    return sum(t.nbytes for t in tensors_in(batch))


def own_copy(batch: Any, device: torch.device | None) -> Any:
    """Return a copy of the batch on the device, in the same structure, with arrays as tensors.

    The copy belongs to one call of the model, which may write into its inputs.
    """

    def of_tensor(x: Tensor) -> Tensor:
        own = x.detach() if device is None else x.detach().to(device, non_blocking=True)
        own = own.clone() if own.device == x.device else own
        return own.requires_grad_() if x.requires_grad else own

    def of_other(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.copy()
        if hasattr(value, "to"):  # graphs, encodings of text, packed sequences
            value = value if device is None else value.to(device)
            return value._replace(data=value.data.clone()) if isinstance(value, PackedSequence) else _cloned(value)
        return value

    return _mapped(batch, of_tensor, of_other)


def as_tensors(batch: Any) -> Any:
    """Return the batch with every array as a tensor of the same memory, in the same structure."""
    return _mapped(batch, lambda x: x, lambda value: value)


def _cloned(value: Any) -> Any:
    return value.clone() if callable(getattr(value, "clone", None)) else value


def _mapped(value: Any, of_tensor: Callable[[Tensor], Tensor], of_other: Callable[[Any], Any]) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "buif":
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, MutableMapping) and not hasattr(value, "clone"):
        own = copy.copy(value)
        own.update({key: _mapped(part, of_tensor, of_other) for key, part in value.items()})
        return own
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        parts = [_mapped(part, of_tensor, of_other) for part in value]
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        return type(value)(parts) if type(value) in (list, tuple) else of_other(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "to"):
        instance: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            part = _mapped(getattr(value, field.name), of_tensor, of_other)
            object.__setattr__(instance, field.name, part)  # it may be frozen
        return instance
    return of_other(value)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the model's device; None if it has several or none, so that batches are not moved."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


class ThreadSettings:
    """The current thread's autocast, inference mode, device and stream, for use in other threads."""

    def __init__(self, autocast: torch.dtype | None, device: torch.device | None) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._device = torch.get_default_device()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        types = [t for t in {"cpu", "cpu" if device is None else device.type} if torch.amp.is_autocast_available(t)]
        self._active = {t: torch.get_autocast_dtype(t) for t in types if torch.is_autocast_enabled(t)}
        if autocast is not None:
            self._active[device.type if device is not None else "cpu"] = autocast

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the block with these settings, without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.no_grad())
            if torch.get_default_device() != self._device:
                stack.enter_context(self._device)
            stack.enter_context(torch.cuda.stream(self._stream))
            for device_type, dtype in self._active.items():
                stack.enter_context(torch.autocast(device_type, dtype=dtype))
            yield
