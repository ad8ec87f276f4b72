"""What comes from the user's data, and how it goes through the model."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], object]
MaskOf = Callable[[Any], Tensor | Mapping[str, Tensor] | None]


def check_data(data: Any) -> None:
    """Whether it can be batches at all; one tensor would be taken apart into samples."""
    if isinstance(data, (Tensor, np.ndarray)):
        raise TypeError(
            f"recalibrate expects data to be an iterable of batches, got one {type(data).__name__} of shape "
            f"{list(data.shape)}. Pass [x] for a single batch, or a DataLoader."
        )
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"recalibrate expects data to be an iterable of batches, got {type(data).__name__}. "
            "Pass a list of batches or a DataLoader."
        )


class Batches:
    """The user's data, which may be read once or several times.

    Args:
        data: An iterable of batches.
        max_samples: Where to stop: after the batch that reaches so many samples.
    """

    def __init__(self, data: Iterable[Any], max_samples: int | None) -> None:
        self._data = data
        self._max_samples = max_samples
        self._start = _random_state(data)
        self.samples = self.count = 0

    @property
    def length(self) -> int | None:
        """How many batches there will be, where the data say so and nothing limits them."""
        try:
            return len(self._data) if self._max_samples is None else None  # type: ignore[arg-type]
        except TypeError:
            return None

    def expected(self, size: int) -> int | None:
        """How many batches there will be if all are of this size; None where neither data nor limit say so."""
        limit = None if self._max_samples is None else -(-self._max_samples // size)
        try:
            number: int | None = len(self._data)  # type: ignore[arg-type]
        except TypeError:
            number = None
        return min((n for n in (limit, number) if n is not None), default=None)

    def __iter__(self) -> Iterator[Any]:
        """Read the data for the first time."""
        for batch in self._data:
            self.count += 1
            self.samples += samples_in(batch)
            yield batch
            if self._max_samples is not None and self.samples >= self._max_samples:
                return

    def again(self, after: int) -> Iterator[Any]:
        """Read them once more, the same batches in the same order, without the first `after`."""
        if isinstance(self._data, Iterator):
            raise ValueError(
                f"recalibrate with passes='sequential' expects data that can be read again, got an iterator "
                f"({type(self._data).__name__}). Pass a list or a DataLoader, or raise cache_bytes so that all "
                "batches are kept."
            )
        _set_random_state(self._data, self._start)
        count = samples = 0
        for batch in self._data:
            count += 1
            samples += samples_in(batch)
            if count > after:
                yield batch
            if count == self.count:
                break
        if (count, samples) != (self.count, self.samples):
            raise ValueError(
                f"recalibrate with passes='sequential' expects the same batches each time data are read, got {samples} "
                f"samples in {count} batches after {self.samples} in {self.count}. Fix the order, or raise "
                "cache_bytes so that all batches are kept."
            )


def _generators(data: object) -> list[torch.Generator]:
    """The random generators that a DataLoader and its samplers own."""
    owners = (data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [g for g in found if isinstance(g, torch.Generator)]


def _random_state(data: object) -> tuple[Any, ...]:
    own = [g.get_state() for g in _generators(data)]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), own  # noqa: NPY002  (what others draw from)


def _set_random_state(data: object, state: tuple[Any, ...]) -> None:
    python, numpy, default, own = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(default)
    for generator, held in zip(_generators(data), own, strict=True):
        generator.set_state(held)


def _first_array(batch: object) -> Tensor | np.ndarray[Any, Any] | None:
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch
    children: Iterable[object] = ()
    if isinstance(batch, Mapping):
        children = batch.values()
    elif isinstance(batch, (list, tuple)):
        children = batch
    return next((found for child in children if (found := _first_array(child)) is not None), None)


def samples_in(batch: object) -> int:
    """Size of the first dimension of the first tensor in the batch; 1 where there is none."""
    array = _first_array(batch)
    return int(array.shape[0]) if array is not None and array.ndim else 1


def moved(batch: Any, device: torch.device | None) -> Any:
    """The batch with every tensor on the device, arrays as tensors, and its structure as it was."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "buif":
        batch = torch.from_numpy(batch)
    if isinstance(batch, Tensor):
        return batch if device is None else batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):  # graphs, encodings of text, packed sequences
        return batch if device is None else batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(part, device) for part in batch))
    if type(batch) in (list, tuple):
        return type(batch)(moved(part, device) for part in batch)
    if isinstance(batch, MutableMapping):
        own = copy.copy(batch)
        own.update({key: moved(part, device) for key, part in batch.items()})
        return own
    return batch


def default_forward(model: nn.Module, batch: Any) -> object:
    """Call the model with what its `forward` requires.

    A tensor is its argument. Of a tuple or list as many parts as `forward` has required arguments, at least one, so
    that labels stay out. Of a mapping, the keys that are arguments of `forward`.

    Raises:
        TypeError: the batch is none of these, or holds too little.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    parameters = list(inspect.signature(model.forward).parameters.values())
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(batch, (list, tuple)):
        wanted = max(1, len(required))
        if len(batch) < wanted:
            raise TypeError(
                f"recalibrate expects batches of at least {wanted} parts, as {type(model).__name__}.forward requires "
                f"({', '.join(p.name for p in required)}), got {len(batch)}. "
                "Pass forward=lambda model, batch: ... to call the model yourself."
            )
        return model(*batch[:wanted])
    if isinstance(batch, Mapping):
        accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        given = {key: value for key, value in batch.items() if accepts_all or key in names}
        missing = [p.name for p in required if p.name not in given]
        if missing or not given:
            raise TypeError(
                f"recalibrate expects batches with the keys that {type(model).__name__}.forward requires "
                f"({', '.join(p.name for p in required)}), got {', '.join(map(repr, batch)) or 'none'}. "
                "Pass forward=lambda model, batch: ... to call the model yourself."
            )
        return model(**given)
    raise TypeError(
        f"recalibrate expects batches that are tensors, tuples, lists or dicts, got {type(batch).__name__}. "
        "Pass forward=lambda model, batch: ... to call the model yourself."
    )


def device_of(model: nn.Module) -> torch.device | None:
    """The model's device; None where it has several or none, so that batches stay where they are."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


class Ambient:
    """Enters, in any thread, what holds in the thread that made it: autocast, inference mode, device and stream."""

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
        """As it was there, and no gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.no_grad())
            if torch.get_default_device() != self._device:
                stack.enter_context(self._device)
            stack.enter_context(torch.cuda.stream(self._stream))
            for device_type, dtype in self._active.items():
                stack.enter_context(torch.autocast(device_type, dtype=dtype))
            yield


def eager() -> AbstractContextManager[object]:
    """Runs compiled models uncompiled: a compiled call does not tell what its layers are given."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and loading it takes seconds
        return ExitStack()
    return torch.compiler.set_stance("force_eager")
