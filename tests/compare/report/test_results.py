"""Files besides the runs: the page, which is built again, tables, and TensorBoard's logs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from batchnorm import compare
from batchnorm.compare import ComparisonError
from batchnorm.compare.directory import TABLES


@pytest.fixture
def copy(result, tmp_path: Path) -> Path:
    """The directory of a comparison of two norms over two seeds."""
    return Path(shutil.copytree(result.out, tmp_path / "copy"))


def test_the_page_is_built_anew_from_the_runs_alone(result, copy):
    for name in ("report.html", "summary.json", "accuracy.png", "loss.png", "activations.png"):
        (copy / name).unlink()
    found = compare.rebuild(copy)
    assert json.loads((copy / "summary.json").read_text()) == json.loads((result.out / "summary.json").read_text())
    assert found.report_path.read_text() == result.report_path.read_text()
    assert {path.name for path in found.figure_paths} == {"accuracy.png", "loss.png", "activations.png", "layers.png"}
    assert found.runs == result.runs


def test_an_unfinished_comparison_says_how_much_is_there(result, copy, no_pictures):
    (copy / "runs" / result.runs[1].file_name).rename(copy / "runs" / f"{result.runs[1].file_name}.partial")
    found = compare.rebuild(copy)
    assert found.headline[0] == "This comparison is incomplete: 3 of its 4 runs are finished."
    assert "3 of 4 runs are finished" in found.report_path.read_text()
    assert [outcome.seeds for outcome in found.outcomes] == [[0, 1], [1]]


def test_another_target_can_be_asked_for(copy, no_pictures):
    found = compare.rebuild(copy, target_accuracy=0.01)
    assert [outcome.reached for outcome in found.outcomes] == [[0, 1], [0, 1]]
    with pytest.raises(ComparisonError, match="target_accuracy must be above 0"):
        compare.rebuild(copy, target_accuracy=2)


def test_a_directory_without_runs_is_refused(tmp_path, copy):
    with pytest.raises(ComparisonError, match=r"must name the directory of a comparison, but .* has no settings\.json"):
        compare.rebuild(tmp_path)
    shutil.rmtree(copy / "runs")
    with pytest.raises(ComparisonError, match="at least one run must be finished, but .* has none of 4"):
        compare.rebuild(copy)


def test_runs_of_other_machines_are_listed(result, copy, no_pictures):
    file = copy / "runs" / result.runs[0].file_name
    file.write_text(file.read_text().replace('"threads": 1', '"threads": 8', 1))
    found = compare.rebuild(copy)
    assert [(each["threads"], each["runs"]) for each in found.summary["environments"]] == [(8, 1), (1, 3)]
    text = found.report_path.read_text()
    assert "1 runs on " in text
    assert "3 runs on " in text


def test_tables_hold_every_record(result, copy, no_pictures):
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    compare.rebuild(copy, records="parquet")
    found = {table: pandas.read_parquet(copy / f"{table}.parquet") for table in TABLES}
    assert len(found["runs"]) == 4
    assert len(found["steps"]) == sum(len(run.steps) for run in result.runs)
    assert len(found["distributions"]) == sum(len(run.distributions) for run in result.runs) == 4 * 2 * 3
    assert len(found["histograms"]) == sum(len(run.histograms) for run in result.runs)
    assert len(found["layers"]) == 4
    mine = found["evaluations"].query("norm == 'batch' and seed == 1 and lr == 0.1")
    run = next(run for run in result.runs if (run.norm, run.seed) == ("batch", 1))
    assert mine.test_accuracy.tolist() == [evaluation.test_accuracy for evaluation in run.evaluations]
    assert set(found["runs"].columns) >= {"norm", "placement", "batch_size", "parameters", "kept_bytes", "threads"}


def test_tables_without_rows_are_left_out(data, tmp_path, no_pictures):
    pytest.importorskip("pyarrow")
    compare.run("none", data=data, steps=2, seeds=1, batch_size=16, out=tmp_path, records="parquet", progress=False)
    assert {path.stem for path in tmp_path.glob("*.parquet")} == set(TABLES) - {"layers"}


@pytest.fixture
def events():
    """Reads what TensorBoard would show of a run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(log: Path) -> EventAccumulator:
        return EventAccumulator(str(log), {"scalars": 0, "histograms": 0}).Reload()

    return read


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_shows_every_run(data, tmp_path, events, no_pictures):
    found = compare.run(
        "batch", data=data, steps=4, seeds=1, batch_size=16, evaluate_every=1, out=tmp_path, tensorboard=True,
        progress=False,
    )  # fmt: skip
    (log,) = (tmp_path / "tensorboard").iterdir()
    shown = events(log)
    (run,) = found.runs
    assert [event.value for event in shown.Scalars("train/loss")] == pytest.approx([s.loss for s in run.steps])
    assert [event.step for event in shown.Scalars("evaluation/test_accuracy")] == [0, 1, 2, 3, 4]
    assert len(shown.Histograms("activations/first")) == len([h for h in run.histograms if h.where == "first"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_runs_that_were_trained_before(result, copy, events, no_pictures):
    compare.rebuild(copy, tensorboard=True)
    logs = sorted((copy / "tensorboard").iterdir())
    assert len(logs) == 4
    assert len(events(logs[0]).Scalars("train/loss")) == 12


@pytest.mark.parametrize(
    ("options", "package"), [({"records": "parquet"}, "pyarrow"), ({"tensorboard": True}, "tensorboard")]
)
def test_a_missing_package_is_named_before_anything_starts(data, tmp_path, monkeypatch, options, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    extra = "parquet" if package == "pyarrow" else "tensorboard"
    with pytest.raises(ModuleNotFoundError, match=rf"{package} cannot be imported.*batchnorm\[{extra}\]"):
        compare.run(data=data, out=tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()
