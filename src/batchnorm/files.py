"""Write a file completely or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename the file to `path` if the block ends without an exception.

    Until then, an existing file at `path` does not change. The temporary path is in a new folder beside `path`.
    """
    with tempfile.TemporaryDirectory(prefix=".batchnorm-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it appears only when it is complete; encode text as UTF-8."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
