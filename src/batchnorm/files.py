"""Files that are written whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file takes the name `path` if the block ends without an exception.

    Until then, an earlier file at `path` stays as it is. The path yielded is in a temporary folder beside it.
    """
    with tempfile.TemporaryDirectory(prefix=".batchnorm-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears under its name only when it is complete; text is encoded as UTF-8."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
