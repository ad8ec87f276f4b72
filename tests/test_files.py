"""Files that are written whole or not at all, and only where a file belongs."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batchnorm.files import check_target, whole_file, write_whole

posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions, FIFOs and devices of POSIX")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_whole(target, "earlier")
    with whole_file(target) as part:
        part.write_text("later")
        assert target.read_text() == "earlier"
    assert target.read_text() == "later" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("reason", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_earlier_file_alone(tmp_path: Path, reason: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    write_whole(target, b"earlier")

    def fail_halfway() -> None:
        with whole_file(target) as part:
            part.write_text("half")
            raise reason("stop")

    with pytest.raises(reason, match="stop"):
        fail_halfway()
    assert target.read_text() == "earlier" and list(tmp_path.iterdir()) == [target]


@posix
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_gets_the_permissions_of_the_umask(tmp_path: Path, umask: Callable[[int], int], mask, expected):
    umask(mask)
    write_whole(tmp_path / "a", "")
    with whole_file(tmp_path / "b", overwrite=False) as part:
        part.write_text("")
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == expected


@posix
@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o664, 0o444, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, permissions: int) -> None:
    target = tmp_path / "a"
    target.write_text("earlier")
    target.chmod(permissions)
    write_whole(target, "later")
    assert mode(target) == permissions and target.read_text() == "later"


@posix
def test_a_group_that_cannot_be_kept_gets_no_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    target = tmp_path / "a"
    target.write_text("earlier")
    target.chmod(0o664)
    monkeypatch.setattr(os, "chown", refuse)
    write_whole(target, "later")
    assert mode(target) == 0o604 and target.read_text() == "later"


@posix
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "b", tmp_path / "a"
    link.symlink_to(Path("elsewhere") / "b")
    if exists:
        target.write_text("earlier")
    write_whole(link, "later")
    assert link.is_symlink() and target.read_text() == "later" and not target.is_symlink()
    assert os.listdir(target.parent) == ["b"] and sorted(os.listdir(tmp_path)) == ["a", "elsewhere"]


@posix
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a directory"])
@pytest.mark.parametrize("linked", [False, True])
def test_nothing_but_a_regular_file_is_replaced(tmp_path: Path, kind: str, linked: bool, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path(os.devnull if kind == "a device" else "special")
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    if linked:
        Path("link").symlink_to(path)
        path = Path("link")
    before = path.stat()
    for overwrite, text in ((True, f"{path} must be a regular file, got {kind}"), (False, "must not exist yet")):
        with pytest.raises(OSError, match=text):
            check_target(path, overwrite=overwrite)
        with pytest.raises(OSError, match=text), whole_file(path, overwrite=overwrite):
            pytest.fail("the block must not begin")
    assert path.stat().st_ino == before.st_ino and path.stat().st_mode == before.st_mode


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "a"

    def write_while_another_does() -> None:
        with whole_file(target, overwrite=False) as part:
            part.write_text("ours")
            target.write_text("theirs")

    with pytest.raises(FileExistsError, match="another program"):
        write_while_another_does()
    assert target.read_text() == "theirs" and os.listdir(tmp_path) == ["a"]
    with whole_file(tmp_path / "b", overwrite=False) as part:
        part.write_text("ours")
    assert (tmp_path / "b").read_text() == "ours" and sorted(os.listdir(tmp_path)) == ["a", "b"]


@posix
def test_a_link_that_leads_nowhere_counts_as_there(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    with pytest.raises(FileExistsError, match="must not exist yet"):
        check_target(tmp_path / "a", overwrite=False)
    with pytest.raises(FileNotFoundError, match="must be in a directory that exists"):
        check_target(tmp_path / "none" / "a")
