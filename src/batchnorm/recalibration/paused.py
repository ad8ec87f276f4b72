"""Functions that pause in the middle and continue later."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stopped(BaseException):
    """Stops a forward pass early; an `except Exception` in a model does not catch it."""


class Paused:
    """A function in a separate thread. It only runs while `resume` waits for it, so the two never run in parallel.

    While a forward pass is paused, the thread's stack holds exactly the tensors that the rest of the pass needs.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stopping = False
        self.finished = False
        self._thread = threading.Thread(target=self._run, name="recalibrate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._may_run.acquire()
        try:
            if not self._stopping:
                self._work()
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.finished = True
            self._has_paused.release()

    def pause(self) -> None:
        """Wait for the next `resume`; call this from the function."""
        self._has_paused.release()
        self._may_run.acquire()
        if self._stopping:
            raise Stopped

    def resume(self) -> None:
        """Continue until the next pause or the end, and raise any exception of the function."""
        self._may_run.release()
        self._has_paused.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop the function at its current pause."""
        self._stopping = True
        self._may_run.release()
        self._thread.join()
