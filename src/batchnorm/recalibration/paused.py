"""Functions that pause in the middle and continue later."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from batchnorm.undo import Uninterrupted


class Stopped(BaseException):
    """Stops a forward pass early; an `except Exception` in a model does not catch it."""


class Paused:
    """A function in a separate thread. It only runs while `resume` waits for it, so the two never run in parallel.

    While a forward pass is paused, the thread's stack holds exactly the tensors that the rest of the pass needs. A
    signal may interrupt every method: queues of this kind hold no lock that an interruption could leave behind.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._may_run: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._has_paused: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._started = self._stopping = self.finished = False

    def _run(self) -> None:
        self._may_run.get()
        try:
            if not self._stopping:
                self._work()
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.finished = True
            self._has_paused.put(None)

    def pause(self) -> None:
        """Wait for the next `resume`; call this from the function."""
        self._has_paused.put(None)
        self._may_run.get()
        if self._stopping:
            raise Stopped

    def resume(self) -> None:
        """Continue until the next pause or the end, and raise any exception of the function."""
        if not self._started:
            with Uninterrupted():  # the start of a thread takes locks
                threading.Thread(target=self._run, name="recalibrate", daemon=True).start()
                self._started = True
        self._may_run.put(None)
        self._has_paused.get()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop the function at its current or next pause, without waiting for it."""
        self._stopping = True
        self._may_run.put(None)

    def wait(self) -> None:
        """Wait until the stopped function has ended."""
        while self._started and not self.finished:
            self._has_paused.get()
