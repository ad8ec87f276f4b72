"""Write a file completely or not at all, and never over anything but a file."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_target(path: Path, *, overwrite: bool = True) -> Path:
    """Check that a file can be written at `path`, and return the path with links followed.

    Raises:
        FileExistsError: Something exists at the path, and `overwrite` is False.
        OSError: The folder of the path does not exist, or the path is a folder, a device, a FIFO or a socket.
    """
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path} must not exist yet. Choose another name, or overwrite it (--overwrite).")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{path} must be in a directory that exists, but {target.parent} does not. Create it first."
        )
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} must be a regular file, got {_kind_of(mode)}. Choose another name.")
    return target


@contextmanager
def whole_file(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to; move the file to `path` if the block ends without an exception.

    Until then, nothing at `path` changes. The temporary path is in a new folder beside the target. A replaced file
    keeps its permissions; a new one gets those of the umask. If `path` is a link, its target is replaced.

    Args:
        path: The file.
        overwrite: Whether to replace an earlier file. If not, a file that another program created meanwhile stays too.

    Raises:
        OSError: The conditions of `check_target`, before the block and after it.
    """
    target = check_target(path, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix=".batchnorm-", dir=target.parent) as folder:
        part = Path(folder) / path.name
        yield part
        if overwrite:
            _replace(part, check_target(path))
        else:
            _create(part, target)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it appears only when it is complete; encode text as UTF-8."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def _replace(part: Path, target: Path) -> None:
    """Replace the target, and keep its owner and permissions."""
    try:
        before = target.stat()
    except FileNotFoundError:
        pass
    else:
        mode = stat.S_IMODE(before.st_mode)
        if hasattr(os, "chown"):
            with suppress(PermissionError):  # only root can give a file to another user
                os.chown(part, before.st_uid, -1)
            try:
                os.chown(part, -1, before.st_gid)
            except PermissionError:
                mode &= ~stat.S_IRWXG  # the permissions were meant for the former group
        part.chmod(mode)
    part.replace(target)


def _create(part: Path, target: Path) -> None:
    """Move the file to the target, unless something is there."""
    try:
        try:
            os.link(part, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: reserve the name first
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            part.replace(target)
    except FileExistsError as error:
        raise FileExistsError(
            f"{target} must not exist yet, but another program has created it meanwhile. Choose another name, or "
            "overwrite it (--overwrite)."
        ) from error


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
