"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchnorm.files import whole_file, write_whole


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_whole(target, "earlier")
    with whole_file(target) as part:
        part.write_text("later")
        assert target.read_text() == "earlier"
    assert target.read_text() == "later" and list(tmp_path.iterdir()) == [target]


def test_an_exception_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_whole(target, b"earlier")

    def fail_halfway() -> None:
        with whole_file(target) as part:
            part.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert target.read_text() == "earlier" and list(tmp_path.iterdir()) == [target]
