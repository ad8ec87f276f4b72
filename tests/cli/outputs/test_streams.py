"""Commands whose output cannot be printed, and commands that are terminated."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchnorm import cli
from batchnorm.cli.outputs.streams import exits_at_signals
from batchnorm.files import whole_file

NETWORK = """
import os, signal
from collections import OrderedDict
import torch
from torch import nn

def build():
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    norm = nn.BatchNorm2d(8)
    named = OrderedDict([("conv", nn.Conv2d(3, 8, 3)), ("größe γ", norm), *((str(i), m) for i, m in enumerate(head))])
    return nn.Sequential(named)

def broken():
    model = build()
    model[1].running_var[2] = float("nan")
    return model

def terminated():
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("unreachable")

def batches():
    return [torch.randn(8, 3, 8, 8)]
"""
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
signals = pytest.mark.skipif(
    not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread(),
    reason="needs the signals of POSIX in the main thread",
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "net_for_streams.py").write_text(NETWORK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("net_for_streams", None)


@contextmanager
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(io.BufferedWriter(io.FileIO(write, "w")), encoding="utf-8") as file:
        yield file


@contextmanager
def full_device() -> Iterator[io.TextIOWrapper]:
    with io.TextIOWrapper(io.BufferedWriter(io.FileIO("/dev/full", "w")), encoding="utf-8") as file:
        yield file


@contextmanager
def nothing() -> Iterator[None]:
    yield None


def encoded(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")


def code_of(words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(words.split())
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("stream", [closed_pipe, pytest.param(full_device, marks=full), nothing])
@pytest.mark.parametrize(("model", "code"), [("build", 0), ("broken", 1)])
@pytest.mark.parametrize("printed", ["", "--json"])
def test_output_that_cannot_be_printed_changes_neither_files_nor_code(
    place: Path, capsys, monkeypatch, stream: Callable, model: str, code: int, printed: str
) -> None:
    with stream() as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert code_of(f"doctor net_for_streams:{model} --html a.html -o a.json {printed}") == code
        assert sys.stdout is out
    assert (place / "a.html").stat().st_size > 10_000
    assert json.loads((place / "a.json").read_text(encoding="utf-8"))["healthy"] is (code == 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["batchnorm: standard output is incomplete: No space left on device"] * (stream is full_device)


@pytest.mark.parametrize("stream", [closed_pipe, pytest.param(full_device, marks=full), nothing])
@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "inspect net_for_streams:build",
        "accelerate net_for_streams:build",
        "fold net_for_streams:build --input 2,3,8,8 -o f.pth",
        "recalibrate net_for_streams:build --data net_for_streams:batches -o f.pth",
    ],
)
def test_every_command_ends_well_without_a_reader(place: Path, monkeypatch, stream: Callable, words: str) -> None:
    with stream() as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", out)
        assert code_of(words) == 0
        assert code_of("doctor --bogus") == 2
    assert (place / "f.pth").exists() == ("f.pth" in words)


@pytest.mark.parametrize(("encoding", "name"), [("ascii", "gr??e ?"), ("latin-1", "größe ?"), ("utf-8", "größe γ")])
def test_characters_that_the_terminal_lacks_are_replaced(monkeypatch, encoding: str, name: str) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # a narrow table would break the name
    for words in ("doctor net_for_streams:broken", "inspect net_for_streams:build"):
        out = encoded(encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            code_of(words)
        assert name in out.buffer.getvalue().decode(encoding)
    out = encoded(encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert code_of("doctor net_for_streams:broken --json") == 1
    held = json.loads(out.buffer.getvalue().decode(encoding))  # JSON loses nothing
    assert held["layers"][0]["path"] == "größe γ"


@pytest.mark.parametrize("kind", [RuntimeError, EOFError])
def test_an_error_of_the_program_is_neither_a_finding_nor_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys, kind: type[Exception]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise kind("a fault")

    monkeypatch.setattr("batchnorm.doctor.pytorch.inspection.inspect_layers", fail)
    assert code_of("inspect net_for_streams:build") == cli.INTERNAL
    assert f"{kind.__name__}: a fault" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "prints"),
    [
        ("doctor net_for_streams:build --html a.html", "doctor.print_rich"),
        ("doctor net_for_streams:build --html a.html --json", "doctor.print_json"),
        ("recalibrate net_for_streams:build --data net_for_streams:batches -o a.pth", "recalibrate.print_report"),
        ("fold net_for_streams:build --input 1,3,8,8 -o a.pt", "fold.print_report"),
    ],
)
def test_files_are_saved_before_anything_is_printed(place: Path, monkeypatch, words: str, prints: str) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a fault in printing")

    monkeypatch.setattr(f"batchnorm.cli.commands.{prints}", fail)
    assert code_of(words) == cli.INTERNAL
    assert list(place.glob("a.*"))


def test_a_page_that_cannot_be_saved_is_reported_after_the_findings(place: Path, monkeypatch, capsys) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchnorm.doctor.report.diagnosis.write_whole", fail)
    assert code_of("doctor net_for_streams:broken --html a.html") == 2
    out, err = capsys.readouterr()
    assert "error BN202" in out
    assert err == "batchnorm doctor: a.html could not be written: OSError: [Errno 28] No space left on device\n"


@signals
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_terminated_command_leaves_no_temporary_file(place: Path, number: str) -> None:
    sent = getattr(signal, number)

    def terminated_halfway() -> None:
        with exits_at_signals(), whole_file(place / "a") as part:
            part.write_text("half")
            os.kill(os.getpid(), sent)

    before = signal.signal(sent, signal.SIG_DFL)  # ignored where tests run under nohup
    try:
        with pytest.raises(SystemExit) as exit_:
            terminated_halfway()
        assert signal.getsignal(sent) == signal.SIG_DFL
    finally:
        signal.signal(sent, before)
    assert exit_.value.code == 128 + sent
    assert os.listdir(place) == ["net_for_streams.py"]


@signals
def test_termination_has_its_own_exit_code(place: Path) -> None:
    assert code_of("recalibrate net_for_streams:build --data net_for_streams:terminated -o f.pth") == 143
    assert not (place / "f.pth").exists() and not list(place.glob(".batchnorm-*"))
