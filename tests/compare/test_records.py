from __future__ import annotations

from pathlib import Path

import pytest

from batchnorm.compare import ComparisonError, Run, records
from batchnorm.compare.records import Step


def test_files_hold_the_runs_as_they_are_in_memory(result):
    assert len(result.runs) == 4
    for run in result.runs:
        assert Run.read(result.out / "runs" / run.file_name) == run


def test_a_run_that_breaks_off_does_not_pass_for_a_finished_one(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    run = Run("batch:eps=1e-3", 1, 10, None, [], [])

    def break_off() -> None:
        with records.recording(run, tmp_path) as recorder:
            recorder.step(Step(1, 0.5, 2.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    (left,) = (tmp_path / "runs").iterdir()
    assert left.name == "batch-eps=1e-3-seed1.jsonl.partial"
    with pytest.raises(ValueError, match="a finished run begins with a run record and ends with an end record"):
        Run.read(left)


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path, monkeypatch):
    target = tmp_path / "summary.json"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        records.write_json(target, {"a": 1})
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_not_a_number_never_reaches_a_file(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write_json(tmp_path / "summary.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []
    assert records.finite(float("inf")) is None


def test_an_earlier_comparison_is_kept_unless_it_may_be_replaced(tmp_path: Path):
    records.prepare_directory(tmp_path, ["accuracy.png"], overwrite=False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "runs" / "none-seed0.jsonl").write_text("old")
    with pytest.raises(ComparisonError, match=r"must not hold an earlier comparison, but .* has report\.html"):
        records.prepare_directory(tmp_path, ["accuracy.png"], overwrite=False)
    assert (tmp_path / "report.html").read_text() == "old"
    records.prepare_directory(tmp_path, ["accuracy.png"], overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "runs"]
