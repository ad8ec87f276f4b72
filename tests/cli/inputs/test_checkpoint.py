"""Weights on the command line: checkpoints as other programs write them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from batchnorm.cli.app import app
from batchnorm.cli.inputs.checkpoint import CheckpointError, load_weights

State = Mapping[str, Tensor]


def net(seed: int, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


TRAINED = net(1)
STATE, OTHER = TRAINED.state_dict(), net(2).state_dict()


def under(prefix: str, state: State = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def without(name: str) -> dict[str, Tensor]:
    """Return a state_dict with the versions of the modules, by which torch requires counters."""
    state = net(1).state_dict()
    del state[name]
    return state


# Saved objects, and the message about each.
CHECKPOINTS: dict[str, tuple[Callable[[], Any], str]] = {
    "state_dict": (lambda: STATE, ""),
    "without counters": (lambda: {name: t for name, t in STATE.items() if "tracked" not in name}, ""),
    "training loop": (
        lambda: {
            "epoch": 3,
            "model": STATE,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
            "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        },
        "entry 'model'",
    ),
    "DataParallel": (lambda: nn.DataParallel(TRAINED).state_dict(), "names without 'module.'"),
    "compiled": (lambda: under("_orig_mod."), "names without '_orig_mod.'"),
    "compiled in DDP": (
        lambda: {"state_dict": under("module._orig_mod.")},
        "entry 'state_dict'; names without '_orig_mod.' and 'module.'",
    ),
    "a part in DataParallel": (
        lambda: {f"0.module.{n[2:]}" if n[0] == "0" else n: t for n, t in STATE.items()},
        "names without 'module.'",
    ),
    "averaged": (lambda: AveragedModel(TRAINED).state_dict(), "names without 'module.'"),
    "averaged beside it": (
        lambda: {"ema": AveragedModel(net(2)).state_dict(), "net": STATE},
        "entry 'net'; others that fit: --entry ema",
    ),
    "averaged only": (lambda: {"model_ema": under("module.")}, "entry 'model_ema'; names without 'module.'"),
    "Lightning": (
        lambda: {
            "state_dict": {**under("model."), "loss.weight": torch.ones(4)},
            "hyper_parameters": {"optimizer": torch.optim.Adam, "root": Path("data")},
        },
        "entry 'state_dict.model'; not used: 1 other tensor",
    ),
    "two networks": (
        lambda: {"state_dict": {**under("teacher.", OTHER), **under("student.")}},
        "entry 'state_dict.student'; not used: 9 other tensors; others that fit: --entry state_dict.teacher",
    ),
    "nested": (lambda: {"checkpoint": {"last": {"weights": STATE}}}, "entry 'checkpoint.last.weights'"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_network_is_found_in_a_checkpoint(name: str, tmp_path: Path) -> None:
    make, said = CHECKPOINTS[name]
    torch.save(make(), tmp_path / "file.pth")
    model = net(0)
    assert load_weights(model, tmp_path / "file.pth") == said
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in model.state_dict().items())


def test_files_of_safetensors_are_read_if_the_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(under("model."), path)
    model = net(0)
    assert load_weights(model, path) == "entry 'model'"
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in model.state_dict().items())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match=r"which is not installed\. Run pip install safetensors\."):
        load_weights(model, path)


def test_a_wrapped_network_takes_the_weights_of_a_plain_one(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "file.pth")
    model = nn.DataParallel(net(0))
    load_weights(model, tmp_path / "file.pth")
    assert torch.equal(model.module[0].weight, STATE["0.weight"])


def test_an_entry_is_chosen_by_name(tmp_path: Path) -> None:
    torch.save({"model": OTHER, "model_ema": {"decay": 0.9, "module": under("module.")}}, tmp_path / "file.pth")
    model = net(0)
    said = load_weights(model, tmp_path / "file.pth", "model_ema")
    assert said == "entry 'model_ema.module'; names without 'module.'; others that fit: --entry model"
    assert torch.equal(model.state_dict()["0.weight"], STATE["0.weight"])
    with pytest.raises(CheckpointError, match=r"in the entry 'ema', .* choose model or model_ema\.module\."):
        load_weights(model, tmp_path / "file.pth", "ema")


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (net(1, 7).state_dict(), r"shapes differ: 3\.weight \[7, 4\] instead of \[4, 4\], 3\.bias"),
        (
            {"m": {k: t for k, t in STATE.items() if k != "0.bias"}},
            r"its entry 'm' does not fit: it lacks 0\.bias\. Name",
        ),
        (
            {**STATE, "9.a": torch.ones(1), "9.b": torch.ones(1), "9.c": torch.ones(1)},
            r"also has 9\.a, 9\.b and 1 more",
        ),
        (
            {"state_dict": {"fc.weight": torch.ones(3)}},
            r"the file has 'fc\.weight', for example, and the network '0\.weight'",
        ),
        (
            TRAINED,
            r"got an object of torch\.nn\.modules\.container\.Sequential\. .*file\.pth', weights_only=False\)\.state",
        ),
        (
            {"model": TRAINED},
            r"got the entries 'model' without tensors with names\. .*False\)\['model'\]\.state_dict\(\)",
        ),
        ({"step": 3, "fc.bias": torch.ones(3)}, r"the file has 'fc\.bias', for example"),
        ({"m": without("1.num_batches_tracked")}, r"entry 'm' does not fit: it lacks 1\.num_batches_tracked\."),
        ({0: torch.ones(4)}, "got the entries 0 without tensors with names"),
        ({"epoch": 3, "net": TRAINED}, r"the entries 'epoch', 'net' without .*False\)\['net'\]\.state_dict\(\)"),
        ([STATE], r"got an object of list\. Save it with torch\.save\(model\.state_dict\(\), \.\.\.\)\.$"),
        ({}, r"got an empty dict\. Save it with torch\.save\(model\.state_dict\(\), \.\.\.\)\.$"),
    ],
    ids=[
        "classes",
        "missing",
        "unexpected",
        "another network",
        "module",
        "module in an entry",
        "number",
        "counter",
        "numbered",
        "module in the second entry",
        "list",
        "empty",
    ],
)
def test_a_file_that_does_not_fit_is_explained_in_one_sentence(held: Any, why: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=rf"^must hold the state_dict of the network, .*{why}"):
        load_weights(net(0), tmp_path / "file.pth")


@pytest.mark.parametrize("content", [b"", b"hello"], ids=["empty", "text"])
def test_a_file_that_torch_did_not_save_is_explained(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the file is empty, incomplete or not of torch\.save\. Save it with"):
        load_weights(net(0), tmp_path / "file.pth")


class Runs:
    """An object that would write a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import shutil

        return shutil.copyfile, (__file__, "ran")


def test_objects_in_a_checkpoint_are_not_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "args": Runs()}, "file.pth")
    before = set(torch.serialization.get_safe_globals())
    assert load_weights(net(0), Path("file.pth")) == "entry 'model'"
    assert os.listdir() == ["file.pth"]
    assert set(torch.serialization.get_safe_globals()) == before


MODULE = """
from torch import nn
build = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
"""


def test_commands_say_where_the_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net_for_checkpoint.py").write_text(MODULE)
    torch.save({"model": under("module."), "ema": OTHER}, "last.ckpt")
    words = ["inspect", "net_for_checkpoint:build", "--json", "--weights", "last.ckpt"]
    result = CliRunner().invoke(app, words, prog_name="batchnorm")
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "Weights from last.ckpt: entry 'model'; names without 'module.'; others that fit: --entry ema.\n"
    )
    result = CliRunner().invoke(app, [*words[:3], "--entry", "ema"], prog_name="batchnorm")
    assert result.exit_code == 2 and "got --entry ema alone. Add --weights." in result.stderr
