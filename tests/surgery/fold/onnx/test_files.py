from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from batchnorm.surgery.fold import FoldError
from batchnorm.surgery.fold.onnx import files, fold_onnx, in_place
from batchnorm.surgery.fold.onnx.states import OnnxLinear
from tests.surgery.fold.onnx.graphs import Graph, ops

X = np.random.default_rng(3).normal(size=(2, 4, 6, 6)).astype(np.float32)


def small(seed: int = 0, norms: int = 1) -> onnx.ModelProto:
    g = Graph(seed=seed)
    x = g.input("n", 4, "h", "w")
    for _ in range(norms):
        x = g.call("Relu", g.norm(g.conv(x, 4, 4, pads=[1, 1, 1, 1]), 4))
    return g.model(x)


def results(model: onnx.ModelProto | Path) -> Any:
    held = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return onnxruntime.InferenceSession(held, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_folded_into_another(tmp_path: Path) -> None:
    onnx.save(small(), tmp_path / "net.onnx")
    before = contents(tmp_path)
    folded, report = fold_onnx(tmp_path / "net.onnx", tmp_path / "folded.onnx")
    assert onnx.load(tmp_path / "folded.onnx") == folded and report.remaining == 0
    assert contents(tmp_path) == before | {"folded.onnx": folded.SerializeToString()}
    assert np.allclose(results(tmp_path / "folded.onnx"), results(tmp_path / "net.onnx"), atol=1e-5)


def test_weights_in_a_file_of_their_own_are_read(tmp_path: Path) -> None:
    onnx.save_model(small(), tmp_path / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    before = contents(tmp_path)
    folded, _ = fold_onnx(str(tmp_path / "net.onnx"), tmp_path / "folded.onnx")
    assert {name: value for name, value in contents(tmp_path).items() if name in before} == before
    right = results(tmp_path / "net.onnx")
    assert np.allclose(results(folded), right, atol=1e-5)  # it holds its weights


def large(channels: int = 16, seed: int = 0) -> onnx.ModelProto:
    """With a weight that is worth a file of its own."""
    g = Graph(seed=seed)
    x = g.conv(g.input("n", 4, "h", "w"), channels, 4)
    return g.model(g.norm(x, channels))


def test_an_earlier_result_keeps_its_weights_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, output = tmp_path / "net.onnx", tmp_path / "folded.onnx"
    options: dict[str, Any] = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save_model(large(), net, **options)
    fold_onnx(net, output)
    assert sorted(contents(tmp_path)) == ["folded.onnx", "folded.onnx.data", "net.onnx", "w.bin"]
    right = results(net)
    assert np.allclose(results(output), right, atol=1e-5)

    onnx.save_model(large(seed=1), net, **options)
    before = contents(tmp_path)
    move = files.os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target) == output:
            raise OSError(28, "No space left on device")
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            fold_onnx(net, output)
    assert contents(tmp_path) == before
    assert np.allclose(results(output), right, atol=1e-5)

    fold_onnx(net, output)
    assert sorted(contents(tmp_path)) == ["folded.onnx", "folded.onnx.2.data", "net.onnx", "w.bin"]
    assert np.allclose(results(output), results(net), atol=1e-5)


def test_a_model_too_large_for_one_file_is_run_and_written_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGE", 1000)
    model = large()
    folded, report = fold_onnx(model, tmp_path / "folded.onnx")
    assert sorted(contents(tmp_path)) == ["folded.onnx", "folded.onnx.data"]
    assert report.remaining == 0 and report.reference.startswith("the original in its own type")
    assert ops(folded) == ["Conv"]
    assert np.allclose(results(tmp_path / "folded.onnx"), results(model), atol=1e-5)


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool) -> None:
    (tmp_path / "folded.onnx").write_text("earlier")

    def full(model: onnx.ModelProto, path: Path, **options: Any) -> None:
        Path(path).write_text("half of it")
        (Path(path).parent / str(options.get("location", "other"))).write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    monkeypatch.setattr(files, "LARGE", 2**31)
    with pytest.raises(OSError, match="No space left"):
        files.write(small(), tmp_path / "folded.onnx", external=external)
    assert contents(tmp_path) == {"folded.onnx": b"earlier"}


def test_a_file_that_is_cut_short_is_reported(tmp_path: Path) -> None:
    whole = small().SerializeToString()
    (tmp_path / "net.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"net.onnx must be an ONNX file with all its weights, but reading it failed"):
        fold_onnx(tmp_path / "net.onnx")
    onnx.save_model(small(), tmp_path / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ValueError, match=r"net.onnx must be an ONNX file with all its weights, but reading it failed"):
        fold_onnx(tmp_path / "net.onnx")
    with pytest.raises(
        ValueError, match=r"fold_onnx expects a model that holds its weights, but they are in other files"
    ):
        fold_onnx(onnx.load(tmp_path / "net.onnx", load_external_data=False))


def test_usage_errors_are_reported_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(small(), path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"absent.onnx must be an ONNX file, but there is none"):
        fold_onnx(tmp_path / "absent.onnx")
    with pytest.raises(TypeError, match=r"fold_onnx expects an onnx.ModelProto or the path of a file, got int"):
        fold_onnx(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fold_onnx expects output to be another file than the model"):
        fold_onnx(path, path)
    with pytest.raises(ValueError, match=r"output .* must be in a directory that exists"):
        fold_onnx(path, tmp_path / "absent" / "f.onnx")
    with pytest.raises(ValueError, match=r"output .* must be a regular file, got a directory"):
        fold_onnx(path, tmp_path)
    with pytest.raises(
        ValueError, match=r"fold_onnx expects a model that runs with its inputs \(x \['n', 4, 'h', 'w'\]\), but: "
    ):
        fold_onnx(path, tmp_path / "f.onnx", inputs=np.zeros((1, 5, 6, 6), np.float32))
    with pytest.raises(ValueError, match=r"fold_onnx expects at most 1 inputs, as the model has, got 2"):
        fold_onnx(path, inputs=[X, X])
    with pytest.raises(ValueError, match=r"fold_onnx expects inputs named as the model's \(x\), got 'y'"):
        fold_onnx(path, inputs={"y": X})
    assert contents(tmp_path) == before


def test_an_operator_that_nothing_here_runs_is_reported() -> None:
    model = small()
    model.graph.node[1].domain = "elsewhere"
    model.graph.node[1].op_type = "Unknown"
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    with pytest.raises(
        ValueError, match=r"fold_onnx expects a model that ONNX Runtime can run, because it checks every fold, but"
    ):
        fold_onnx(model)


def test_a_wrong_fold_is_refused_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, into = small(norms=3), OnnxLinear.after
    wrong = model.graph.node[3].input[1]

    def after(linear: OnnxLinear, s: Any) -> OnnxLinear:
        folded = into(linear, s)
        assert folded.bias is not None
        return replace(folded, bias=folded.bias + 1e-3) if linear.like[0].name == wrong else folded

    monkeypatch.setattr(OnnxLinear, "after", after)
    folded, report = fold_onnx(model, inputs=[X])
    assert report.remaining == 1 and len(report.changed) == 2
    assert report.left[0].path == model.graph.node[4].name
    assert "folding it has an error of" in report.left[0].reason
    assert np.allclose(results(folded), results(model), atol=1e-5)


def test_a_wrong_folded_network_is_not_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emit = in_place.emit

    def wrong(network: Any, model: onnx.ModelProto) -> None:
        emit(network, model)
        model.graph.node[0].input[0], model.graph.node[0].input[2] = "x", model.graph.node[2].input[2]

    monkeypatch.setattr(in_place, "emit", wrong)
    model = small(norms=2)
    with pytest.raises(FoldError, match=r"must give the original's results, but its error against float64 is"):
        fold_onnx(model, tmp_path / "f.onnx")
    assert contents(tmp_path) == {}


def test_sizes_written_as_minus_one_are_open() -> None:
    model = small()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = -1
    _, report = fold_onnx(model)
    assert report.remaining == 0


def test_models_that_float64_cannot_run_are_compared_with_the_original() -> None:
    g = Graph()
    x = g.conv(g.input("n", 4, "h", "w"), 4, 4)
    x = g.call("Resize", x, "", g.constant(np.array([1, 1, 2, 2.0])), mode="linear")
    model = g.model(g.call("Sigmoid", g.norm(x, 4)))
    folded, report = fold_onnx(model, inputs=[X])
    assert report.remaining == 0 and report.reference.startswith("the original in its own type")
    assert "relative error against the original in its own type" in str(report) and "against float64" not in str(report)
    assert np.allclose(results(folded), results(model), atol=1e-5)


def test_given_inputs_are_used_as_arrays_or_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[int, ...]]] = []
    feeds_of = in_place.feeds_of

    def remember(*arguments: Any) -> Any:
        runs = feeds_of(*arguments)
        seen.append([feeds["x"].shape for feeds in runs])
        return runs

    monkeypatch.setattr(in_place, "feeds_of", remember)
    for given in (X, [X], {"x": X.astype(np.float64)}, (2, 4, 6, 6), [(2, 4, 6, 6)], None):
        _, report = fold_onnx(small(), inputs=given)
        assert report.remaining == 0
    same, other = (2, 4, 6, 6), (3, 4, 9, 9)
    assert seen == [[same, same, other]] * 3 + [[same, other]] * 2 + [[(2, 4, 64, 64), (3, 4, 96, 96)]]
