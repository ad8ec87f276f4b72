"""Forward passes that stop in the middle and go on later."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stopped(BaseException):
    """Ends a forward pass that is not needed further; no `except Exception` of a model holds it up."""


class Paused:
    """Work in a thread of its own that runs only while `resume` waits for it: never two at a time.

    What is kept between layers is the thread's own stack, that is, the tensors that the rest of the forward pass
    still needs and no others.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._turn, self._rest = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stopping = False
        self.finished = False
        self._thread = threading.Thread(target=self._run, name="recalibrate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._stopping:
                self._work()
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.finished = True
            self._rest.release()

    def pause(self) -> None:
        """Wait, in the work's own thread, for the next `resume`."""
        self._rest.release()
        self._turn.acquire()
        if self._stopping:
            raise Stopped

    def resume(self) -> None:
        """Go on until the next pause or the end; raises what the work raised."""
        self._turn.release()
        self._rest.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the work where it is."""
        self._stopping = True
        self._turn.release()
        self._thread.join()
