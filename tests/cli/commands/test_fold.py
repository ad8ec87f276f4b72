from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from batchnorm.cli.app import app
from batchnorm.surgery import FoldError
from tests.surgery.fold.onnx.graphs import Graph, ops

MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))

def wide():
    return build().double()

def broken():
    raise KeyError("width")

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "net_for_fold.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("net_for_fold", None)


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["fold", *map(str, words)], prog_name="batchnorm")


def assert_one_line(result: Result, text: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert text in result.stderr
    assert result.stderr.startswith("batchnorm fold: ")
    assert result.stderr.count("\n") == 1


def built() -> torch.nn.Module:
    import net_for_fold

    return net_for_fold.build().eval()


def test_a_callable_is_folded_and_saved_as_a_module(folder: Path) -> None:
    result = invoke("net_for_fold:build", "--input", "1,3,8,8", "-o", "folded.pth")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "fold: of 1 batch normalizations in a forward pass, 0 left"
    assert ["1", "BatchNorm2d(4)", "in", "0"] in [line.split() for line in lines]
    assert lines[-1] == "Written: folded.pth"
    x = torch.randn(3, 3, 9, 10)
    folded = torch.load(folder / "folded.pth", weights_only=False)
    assert torch.allclose(folded(x), built()(x), atol=1e-5)
    assert sorted(path.name for path in folder.iterdir() if path.suffix != "") == ["folded.pth", "net_for_fold.py"]


def test_the_tolerance_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    for module_name, name in (("batchnorm.surgery.fold", "fold"), ("batchnorm.surgery.fold.onnx", "fold_onnx")):
        module = importlib.import_module(module_name)
        function = getattr(module, name)

        def recorded(*args: Any, function: Any = function, **options: Any) -> Any:
            given.append(options["tolerance"])
            return function(*args, **options)

        monkeypatch.setattr(module, name, recorded)
    write_onnx(Path("model.onnx"))
    program = ("net_for_fold:build", "--input", "1,3,8,8", "-o", "folded.pth")
    for words in (program, ("model.onnx", "-o", "folded.onnx")):
        assert invoke(*words, "--tolerance", "1e-4").exit_code == 0
        assert invoke(*words, "--overwrite").exit_code == 0
        assert_one_line(invoke(*words, "--overwrite", "--tolerance", 0), "'--tolerance': 0.0 is not in the range x>0")
    assert given == [1e-4, None] * 2


def test_weights_are_loaded_and_the_program_takes_every_size(folder: Path) -> None:
    invoke("net_for_fold:build", "--input", "1,3,8,8", "-o", "once.pth")
    model = built()
    with torch.no_grad():
        model[1].running_mean.fill_(2.0)
    torch.save(model.state_dict(), folder / "net.pth")
    result = invoke("net_for_fold:build", "--weights", "net.pth", "--input", "1,3,8,8", "-o", "folded.pt2")
    assert result.exit_code == 0, result.output
    program = torch.export.load(folder / "folded.pt2").module()
    for shape in ((1, 3, 8, 8), (4, 3, 12, 9)):
        x = torch.randn(shape)
        assert torch.allclose(program(x), model(x), atol=1e-5)


def test_an_exported_program_brings_its_example(folder: Path) -> None:
    invoke("net_for_fold:build", "--input", "1,3,8,8", "-o", "once.pth")
    model, x = built(), torch.randn(2, 3, 8, 8)
    automatic = torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: automatic, 2: automatic, 3: automatic},))
    torch.export.save(program, folder / "net.pt2")
    result = invoke("net.pt2", "-o", "folded.pt2")
    assert result.exit_code == 0, result.output
    assert "0 left" in result.stdout
    folded = torch.export.load(folder / "folded.pt2")
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    y = torch.randn(3, 3, 10, 8)
    assert torch.allclose(folded.module()(y), model(y), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["net_for_fold", "-o", "f.pt2"],
            "the model, if it is not a .pt2 or .onnx file, must be module.path:callable, got 'net_for_fold'",
        ),
        (["net_for_fold:absent", "-o", "f.pt2"], "could not be imported: AttributeError"),
        (["net_for_fold:broken", "-o", "f.pt2"], "it failed: KeyError: 'width'"),
        (["net_for_fold:number", "-o", "f.pt2"], "it failed: TypeError"),
        (["no_such_module_here:build", "-o", "f.pt2"], "could not be imported: ModuleNotFoundError"),
        (["net_for_fold:build", "-o", "f.pt2"], "--input must give the shape of an input, got none"),
        (
            ["net_for_fold:build", "--input", "1,x", "-o", "f.pt2"],
            "--input must be positive numbers separated by commas",
        ),
        (
            ["net_for_fold:build", "--input", "1,3,0,8", "-o", "f.pt2"],
            "--input must be positive numbers separated by commas",
        ),
        (
            ["net_for_fold:build", "--input", "1,3,99999999999999,8", "-o", "f.pt2"],
            "that fits into memory, got 1,3,9999",
        ),
        (["net_for_fold:build", "--input", f"1,{10**30}", "-o", "f.pt2"], "--input must be the shape of a tensor that"),
        (
            ["net_for_fold:build", "--input", "1,5,8,8", "-o", "f.pt2"],
            "--input must be the shape of an input that the model takes, once for each of its arguments, but",
        ),
        (["net_for_fold:build", "--weights", "no.pth", "--input", "1,3,8,8", "-o", "f.pt2"], "FileNotFoundError"),
        (
            ["net_for_fold:build", "--input", "1,3,8,8", "-o", "f.onnx"],
            "must not end in .onnx for a network of",
        ),
        (["net_for_fold:build", "--input", "1,3,8,8", "-o", "no/f.pt2"], "must be in a directory that exists"),
        (["net_for_fold:build", "--input", "1,3,8,8", "-o", "net_for_fold.py"], "must not exist yet"),
        (["absent.pt2", "-o", "f.pt2"], "must be a file of torch.export.save, but there is none"),
        (["net_for_fold.py.pt2", "-o", "f.pt2"], "but there is none"),
        (["absent.onnx", "-o", "f.pt2"], "f.pt2 must end in .onnx, as absent.onnx does"),
        (["absent.onnx", "-o", "f.onnx"], "absent.onnx must be an ONNX file, but there is none"),
        (["absent.onnx", "--weights", "w.pth", "-o", "f.onnx"], "--weights requires a callable"),
        (["-o", "f.pt2"], "Missing argument"),
    ],
)
def test_a_usage_error_is_one_line_and_nothing_is_written(folder: Path, words: list[str], text: str) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert_one_line(invoke(*words), text)
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


def test_weights_that_would_run_code_are_refused(folder: Path) -> None:
    torch.save({"0.weight": print}, folder / "bad.pth")
    result = invoke("net_for_fold:build", "--weights", "bad.pth", "--input", "1,3,8,8", "-o", "f.pt2")
    assert_one_line(result, "bad.pth must hold the state_dict of the network")


def test_a_file_that_is_not_a_program_is_reported(folder: Path) -> None:
    (folder / "bad.pt2").write_text("nothing")
    assert_one_line(
        invoke("bad.pt2", "-o", "f.pt2"), "bad.pt2 must be a file of torch.export.save, but loading it failed"
    )


def test_an_earlier_file_is_replaced_with_overwrite(folder: Path) -> None:
    (folder / "f.pth").write_text("earlier")
    assert invoke("net_for_fold:build", "--input", "1,3,8,8", "-o", "f.pth", "--overwrite").exit_code == 0
    assert (folder / "f.pth").stat().st_size > 1000


def write_onnx(path: Path) -> onnx.ModelProto:
    g = Graph()
    x = g.input("n", 3, "h", "w")
    model = g.model(g.norm(g.conv(x, 4, 3, pads=[1, 1, 1, 1]), 4, name="norm"))
    onnx.save(model, path)
    return model


def test_an_onnx_file_is_folded(folder: Path) -> None:
    write_onnx(folder / "net.onnx")
    result = invoke("net.onnx", "--input", "1,3,8,8", "-o", "folded.onnx")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "fold: of 1 batch normalizations in a forward pass, 0 left"
    assert ["norm.call", "BatchNormalization(4)", "in", "conv0.call"] in [line.split() for line in lines]
    assert lines[-1] == "Written: folded.onnx"
    assert ops(onnx.load(folder / "folded.onnx")) == ["Conv"]


def test_an_onnx_file_that_cannot_be_read_or_run_is_reported(folder: Path) -> None:
    write_onnx(folder / "net.onnx")
    (folder / "bad.onnx").write_text("nothing")
    assert_one_line(invoke("bad.onnx", "-o", "f.onnx"), "bad.onnx must be an ONNX file with all its weights")
    assert_one_line(
        invoke("net.onnx", "--input", "1,5,8,8", "-o", "f.onnx"), "expects a model that runs with its inputs"
    )
    for size in (10**14, 10**30):
        result = invoke("net.onnx", "--input", f"1,3,{size},8", "-o", "f.onnx")
        assert_one_line(result, f"fold_onnx expects inputs whose arrays fit into memory, got [1, 3, {size}, 8]")
    assert_one_line(
        invoke("net.onnx", "-o", "net.onnx", "--overwrite"), "expects output to be another file than the model"
    )
    assert not (folder / "f.onnx").exists()


def test_a_full_disk_leaves_the_earlier_onnx_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_onnx(folder / "net.onnx")
    (folder / "f.onnx").write_text("earlier")

    def full(model: onnx.ModelProto, path: Path, **options: object) -> None:
        Path(path).write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    assert_one_line(
        invoke("net.onnx", "-o", "f.onnx", "--overwrite"),
        "f.onnx could not be written: OSError: [Errno 28] No space left on device",
    )
    assert sorted(path.name for path in folder.iterdir()) == ["f.onnx", "net.onnx", "net_for_fold.py"]
    assert (folder / "f.onnx").read_text() == "earlier"


def test_a_directory_that_cannot_be_written_to_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    write_onnx(folder / "net.onnx")
    text = "could not be written: PermissionError: [Errno 13] Permission denied"
    assert_one_line(invoke("net.onnx", "-o", "f.onnx"), text)
    assert_one_line(invoke("net_for_fold:build", "--input", "1,3,8,8", "-o", "f.pth"), text)


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.surgery.fold.onnx import folding

    write_onnx(folder / "net.onnx")
    monkeypatch.setattr(folding, "find_spec", lambda name: None)
    assert_one_line(
        invoke("net.onnx", "-o", "f.onnx"),
        'fold_onnx needs onnx and onnxruntime. Install with: pip install "batchnorm[onnx]"',
    )


def test_a_model_in_float64_gets_an_input_of_its_type(folder: Path) -> None:
    result = invoke("net_for_fold:wide", "--input", "1,3,8,8", "-o", "folded.pth")
    assert result.exit_code == 0, result.output
    folded = torch.load(folder / "folded.pth", weights_only=False)
    assert folded(torch.randn(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_the_original_stays_when_folding_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise FoldError("the folded network must give the original's results.")

    # The package's own name is its function by now.
    monkeypatch.setattr(importlib.import_module("batchnorm.surgery.fold"), "fold", fail)
    (folder / "f.pth").write_text("earlier")
    words = ("net_for_fold:build", "--input", "1,3,8,8", "-o", "f.pth", "--overwrite")
    assert_one_line(invoke(*words), "the folded network must give the original's results")
    assert (folder / "f.pth").read_text() == "earlier"
