"""Undo changes at the end of a block, completely even if a signal interrupts it."""

from __future__ import annotations

import functools
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="Undo")
Steps = list[tuple[str, Callable[[], object]]]

_blocks: list[Undo] = []  # the blocks that the main thread is in
_handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}  # the handlers that `_handle` replaces
_held: list[int] = []  # signals whose handlers must wait


class Undo:
    """A block at whose end changes are undone.

    In the main thread, signal handlers run as usual within the block. They may raise an exception, as the handler of
    Ctrl-C does. While the block begins or ends, they wait. Python calls handlers between any two instructions, so each
    handler is replaced within the block, and the replacement examines which code was interrupted.

    Subclasses define `undo`. It is not interrupted.
    """

    waits = False  # whether handlers wait within the block too

    def undo(self, error: BaseException | None) -> Steps:
        """Return the steps that undo the changes, each with its name, after the block raised `error` or ended.

        The steps may run twice.
        """
        raise NotImplementedError

    def __enter__(self: T) -> T:
        if _is_main_thread():
            try:
                _blocks.append(self)
                _install()
                _deliver(sys._getframe(1))
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        failed = self._run_steps(error)
        try:
            self._leave()
        except BaseException as interruption:  # from a signal that waited while the block ended
            if error is None:
                failed += self._run_steps(interruption)
            error = interruption
            raise
        finally:
            if failed:
                _report(failed, error)

    def _run_steps(self, error: BaseException | None) -> list[tuple[str, Exception]]:
        failed = []
        for name, step in self.undo(error):
            try:
                step()
            except Exception as problem:  # the remaining steps still run
                failed.append((name, problem))
        return failed

    def _leave(self) -> None:
        if self in _blocks:  # otherwise, this is another thread, in which handlers never run
            _blocks.remove(self)
            if not _blocks:
                _uninstall()
            _deliver(sys._getframe(2))


class UndoOnFailure(Undo):
    """A block that either makes all its changes or, if it raises, none."""

    def __init__(self) -> None:
        self._steps: Steps = []

    def before(self, step: Callable[..., object], *args: Any) -> None:
        """Register the step that undoes a change, before the change is made; without the change it must do no harm."""
        self._steps.append((getattr(step, "__name__", "a step"), functools.partial(step, *args)))

    def undo(self, error: BaseException | None) -> Steps:
        """Return the registered steps, the last one first, after a failure."""
        return [] if error is None else self._steps[::-1]


class Uninterrupted(Undo):
    """A block within which the handlers of signals wait, for work that must not stop halfway."""

    waits = True

    def undo(self, error: BaseException | None) -> Steps:
        """Return no steps."""
        return []


def _is_main_thread() -> bool:
    """Return whether Python runs the handlers of signals in this thread."""
    return threading.current_thread() is threading.main_thread()


def _install() -> None:
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and handler is not _handle:
            _handlers[number] = handler
            signal.signal(number, _handle)


def _uninstall() -> None:
    for number, handler in _handlers.items():
        if signal.getsignal(number) is _handle:  # the block may have set another
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    if _must_wait(frame):
        _held.append(number)
    else:
        _handlers[number](number, frame)


_UNDOING = {Undo.__enter__.__code__, Undo.__exit__.__code__}


def _must_wait(frame: FrameType | None) -> bool:
    """Return whether handlers must wait when they interrupt the code of this frame."""
    return any(block.waits for block in _blocks) or _is_undoing(frame)


def _is_undoing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _UNDOING:
        frame = frame.f_back
    return frame is not None


def _deliver(frame: FrameType | None) -> None:
    """Call the handlers of signals that wait, unless an outer block is undoing changes, too."""
    if _held and not _must_wait(frame):
        number = _held.pop(0)
        try:
            _handlers[number](number, frame)
        finally:
            _deliver(frame)


def _report(failed: list[tuple[str, Exception]], error: BaseException | None) -> None:
    names = ", ".join(f"{name} ({type(problem).__name__}: {problem})" for name, problem in failed)
    text = (
        f"A call must be able to restore the model's state at its end, got failures for {names}. Everything else is "
        "restored. Load this part of the model again."
    )
    if error is None:
        raise RuntimeError(text) from failed[0][1]
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(text)
    else:
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def package_of(hook: Any) -> str:
    """Return the name of the package that defines a function, method or class."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).partition(".")[0]


def flags_of(holder: object) -> dict[str, bool]:
    """Return the attributes of an object that are True or False."""
    return {name: value for name, value in vars(holder).items() if type(value) is bool}


def put_back_flags(flags: list[tuple[Any, type, dict[str, bool]]], removed: list[Any]) -> None:
    """Restore the flags of objects whose class is still the same, if hooks of other packages were removed."""
    if all(package_of(hook) == package_of(package_of) for hook in removed):
        return
    for holder, kind, before in flags:
        if type(holder) is kind:
            for name in flags_of(holder).keys() - before.keys():
                del vars(holder)[name]
            vars(holder).update(before)


def restorer(tensor: Tensor) -> Callable[[], None]:
    """Return a function that restores the tensor's present value; it writes only if the value has changed."""
    version = _version(tensor)
    try:
        value = tensor.detach().clone()
    except Exception:  # a kind of tensor that cannot be copied
        value = None

    def put_back() -> None:
        if value is not None and not _has_value(tensor, value, version):
            overwrite(tensor, value)

    return put_back


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Copy the value into the tensor, also into one that was made in inference mode."""
    with torch.inference_mode() if tensor.is_inference() else nullcontext():
        if tensor.shape == value.shape:
            tensor.copy_(value)
        else:  # it was resized
            tensor.data = value


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _has_value(tensor: Tensor, value: Tensor, version: int | None) -> bool:
    """Return whether the tensor has this value, bit for bit, or this version if values cannot be compared."""
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:  # other tensors may communicate with processes
        try:
            return tensor.shape == value.shape and torch.equal(_bits(tensor), _bits(value))
        except Exception:
            pass
    return _version(tensor) == version


def _bits(tensor: Tensor) -> Tensor:
    # Versions do not suffice: writing to `.data`, or to a NumPy array with the same memory, does not change them.
    tensor = tensor.detach()
    return (tensor.int_repr() if tensor.is_quantized else tensor).reshape(-1).contiguous().view(torch.uint8)
