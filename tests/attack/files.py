"""The command line: damaged input files, kills while it writes, and a full disk."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from batchnorm.cli import main
from tests.attack.tally import Tally

EARLIER = b"an earlier file"
HANGS = 60  # seconds until a command is ended that should have ended by itself


def network() -> nn.Module:
    """Return the network of the commands."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))


def data() -> list[torch.Tensor]:
    """Return the batches of the commands."""
    return [torch.ones(4, 3, 6, 6), torch.zeros(4, 3, 6, 6)]


HERE = "tests.attack.files"


class Commands:
    """Commands that read and write files, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = network().eval()
        torch.save(model.state_dict(), folder / "weights.pth")
        torch.export.save(torch.export.export(model, (torch.ones(2, 3, 6, 6),)), folder / "model.pt2")
        program = torch.onnx.export(model, (torch.ones(2, 3, 6, 6),), dynamo=True, verbose=False)
        program.save(folder / "model.onnx", external_data=False)
        generator = np.random.default_rng(0)
        np.save(folder / "data.npy", generator.normal(size=(20_000, 8)))
        np.savez(folder / "data.npz", x=generator.normal(size=(16, 3, 6, 6)).astype(np.float32))
        x, y = generator.normal(size=(40, 5)), generator.integers(0, 2, 40)
        np.savez(folder / "train.npz", x_train=x, y_train=y, x_test=x, y_test=y)

    def reading(self, file: Path, output: Path) -> list[str]:
        """Return the command that reads this file, by its name, and writes the output."""
        model, to = f"{HERE}:network", ["-o", str(output), "--overwrite"]
        return {
            "weights.pth": ["recalibrate", model, "--weights", str(file), "--data", f"{HERE}:data", *to],
            "model.pt2": ["fold", str(file), *to],
            "model.onnx": ["fold", str(file), *to],
            "data.npy": ["standardize", str(file), *to],
            "data.npz": ["recalibrate", model, "--data", str(file), *to],
            "train.npz": [
                "compare", "--data", str(file), "--steps", "2", "--seeds", "1", "--out", f"{output}-compare",
                "--overwrite",
            ],
        }[file.name.partition("-")[2]]  # fmt: skip


def damaged(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Return the content with one damage, and the damage's name."""
    size = len(content)
    what = str(rng.choice(("cut", "a bit", "bytes", "zeros", "empty", "other", "twice", "inserted")))
    at = int(rng.integers(size))
    end = min(at + int(rng.integers(1, 200)), size)
    random = rng.bytes(end - at)
    flipped = content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :]
    return what, {
        "cut": content[:at],
        "a bit": flipped,
        "bytes": content[:at] + random + content[end:],
        "zeros": content[:at] + bytes(end - at) + content[end:],
        "empty": b"",
        "other": rng.bytes(size % 5000),
        "twice": content + content,
        "inserted": content[:at] + random + content[at:],
    }[what]


@contextlib.contextmanager
def _silent() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        yield output, errors


def attack_damaged(tally: Tally, folder: Path) -> None:
    """Read damaged files: one line and exit status 2, or a file that can be read in spite of the damage."""
    commands = Commands(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for number, rng in tally.tries():
        source = files[rng.integers(len(files))]
        what, content = damaged(source.read_bytes(), rng)
        file, output = folder / f"damaged-{source.name}", folder / f"out{source.suffix}"
        file.write_bytes(content)
        output.write_bytes(EARLIER)
        status: object = 0
        with tally.expecting(number, f"{source.name}, {what}"), _silent() as (printed, errors):
            try:
                main(commands.reading(file, output))
            except SystemExit as error:
                status = error.code or 0
            lines = [line for line in errors.getvalue().splitlines() if line.strip()]
            assert status in (0, 2), f"exit status {status}"
            if status == 2:
                assert len(lines) == 1, f"{len(lines)} lines: {lines[:3]}"
                assert output.read_bytes() == EARLIER, "the earlier file has changed"
                tally.count("refused")
            assert "Traceback" not in errors.getvalue() + printed.getvalue()
            assert not _hidden(folder), f"left behind: {_hidden(folder)}"


def attack_writing(tally: Tally, folder: Path) -> None:
    """Kill commands at random moments, or let the disk be full: the earlier file or a whole one is there."""
    # A new process, because a fork of this one would wait for threads that it does not have.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        vars(tally).update(vars(process.submit(_attack_writing, tally, folder).result()))


def _attack_writing(tally: Tally, folder: Path) -> Tally:
    torch.set_num_threads(1)
    commands = Commands(folder)
    names = ("data.npy", "weights.pth", "model.onnx", "model.pt2")
    sizes: dict[str, int] = {}
    lasts: dict[str, float] = {}
    for name in names:
        (folder / f"good-{name}").write_bytes((folder / name).read_bytes())
        output = folder / f"whole{Path(name).suffix}"
        start = time.monotonic()
        assert _wait(_forked(commands.reading(folder / f"good-{name}", output), None)) == 0, name
        lasts[name], sizes[name] = time.monotonic() - start, output.stat().st_size
    for number, rng in tally.tries():
        name = names[rng.integers(len(names))]
        output = folder / f"out{Path(name).suffix}"
        output.write_bytes(EARLIER)
        full = rng.random() < 0.4
        limit = int(rng.integers(sizes[name] - 100)) if full else None
        kind = str(rng.choice(("SIGKILL", "SIGTERM", "SIGINT")))
        pid = _forked(commands.reading(folder / f"good-{name}", output), limit)
        if not full:
            time.sleep(rng.uniform(0, 1.2 * lasts[name]))
            os.kill(pid, getattr(signal, kind))
        status = _wait(pid)
        tally.count("full disk" if full else kind)
        with tally.expecting(number, f"{name}, {'disk full' if full else kind}, exit status {status}"):
            unchanged = output.read_bytes() == EARLIER
            if not unchanged:
                READ[output.suffix](output)
            if full:
                assert (status, unchanged) == (2, True)
            if kind != "SIGKILL" or full:
                assert not _hidden(folder), f"left behind: {_hidden(folder)}"
        for path in _hidden(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tally


def _hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


READ: dict[str, Callable[[Path], object]] = {
    ".npy": np.load,
    ".pth": torch.load,
    ".pt2": torch.export.load,
    ".onnx": lambda path: onnx.checker.check_model(onnx.load(path)),
}


def _forked(arguments: list[str], limit: int | None) -> int:
    """Run a command in a fork of this process, with a limit on the size of files, and return its process."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    signal.alarm(HANGS)
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
    finally:
        os._exit(status)


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
