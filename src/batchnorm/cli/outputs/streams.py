"""The standard streams and the signals of the process that runs a command.

A command does not end because a reader stops (`| head`), a device is full, or the terminal lacks a character. A command
that is terminated removes its temporary files.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from batchnorm.text import printable


class _Lossy(io.RawIOBase):
    """Writes to a stream until that fails, and drops everything afterwards."""

    def __init__(self, below: Any) -> None:
        super().__init__()
        self._below = below
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._below.fileno())

    def isatty(self) -> bool:
        return bool(self._below.isatty())

    def write(self, data: Any) -> int:
        """Return the number of bytes that were written or dropped."""
        if self.error is None:
            try:
                while (written := self._below.write(data)) is None:  # a pipe that does not block is full
                    time.sleep(0.01)
                return int(written)
            except OSError as error:
                self.error = error
        return len(data)


@contextmanager
def lossy_streams() -> Iterator[None]:
    """Ignore errors of the standard streams within the block, and report at its end why output is missing.

    The report goes to standard error. It is left out if the reader has stopped. Characters that an encoding lacks are
    replaced.
    """
    for descriptor in range(3):  # otherwise the next file that is opened would become the closed stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, lossy = _opened(sys.stdout, "replace")
    err, _ = _opened(sys.stderr, "backslashreplace")
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        if lossy is not None and lossy.error is not None and not isinstance(lossy.error, BrokenPipeError):
            print(f"batchnorm: standard output is incomplete: {lossy.error.strerror}", file=err)
        err.flush()
        sys.stdout, sys.stderr = before
        for ours, given in zip((out, err), before, strict=True):
            if given is None:
                ours.close()


def _opened(stream: TextIO | None, errors: str) -> tuple[TextIO, _Lossy | None]:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8"), None
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # a notebook's stream
        return stream, None
    with suppress(OSError):
        stream.flush()
    lossy = _Lossy(getattr(buffer, "raw", buffer))
    line_buffering = bool(getattr(stream, "line_buffering", False))
    return io.TextIOWrapper(
        io.BufferedWriter(lossy), encoding=stream.encoding, errors=errors, line_buffering=line_buffering
    ), lossy


def encodable_json(text: str, stream: TextIO) -> str:
    """Return the JSON with escapes for control characters, and for those that the stream cannot encode."""
    try:
        text.encode(stream.encoding or "utf-8")
        plain = printable(text, lines=True) == text
    except UnicodeEncodeError:
        plain = False
    return text if plain else json.dumps(json.loads(text), indent=2)


@contextmanager
def exits_at_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that `finally` blocks run; the exit code is 128 + the number.

    A process of torchrun keeps the default action, because it may wait in a collective, which a handler cannot end.
    """
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked has nothing to remove
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    numbers: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread() and "TORCHELASTIC_RUN_ID" not in os.environ:
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [number for number in known if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
