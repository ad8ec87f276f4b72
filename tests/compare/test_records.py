from __future__ import annotations

from pathlib import Path

import pytest

from batchnorm.compare import Choice, ComparisonError, Run, directory
from batchnorm.compare.records import Step


def test_files_hold_the_runs_as_they_are_in_memory(result):
    assert len(result.runs) == 4
    for run in result.runs:
        assert run.environment["threads"] == 1
        assert run.kept_bytes > 0
        assert Run.read(result.out / "runs" / run.file_name) == run
    found = directory.finished_runs(result.out)
    assert sorted((run.norm, run.seed) for run in found) == [("batch", 0), ("batch", 1), ("none", 0), ("none", 1)]


def test_a_run_that_breaks_off_does_not_pass_for_a_finished_one(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    run = Run(Choice("batch:eps=1e-3", lr=0.5), 1, 10)

    def break_off() -> None:
        with directory.recording(run, tmp_path) as recorder:
            recorder.add(Step(1, 0.5, 2.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    (left,) = (tmp_path / "runs").iterdir()
    assert left.name == "mlp-batch-eps=1e-3-before-lr0.5-batch64-iid-seed1.jsonl.partial"
    with pytest.raises(ValueError, match="a finished run begins with a run record and ends with an end record"):
        Run.read(left)
    left.rename(left.with_suffix(""))  # as a disk that lost power may leave it
    assert directory.finished_runs(tmp_path) == []


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path, monkeypatch):
    target = tmp_path / "summary.json"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        directory.write_json(target, {"a": 1})
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_not_a_number_never_reaches_a_file(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.write_json(tmp_path / "summary.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_comparison_is_kept_unless_it_may_be_replaced(tmp_path: Path):
    directory.prepare(tmp_path, overwrite=False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "runs.parquet").write_text("old")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").write_text("old")
    (tmp_path / "runs" / "none-seed0.jsonl").write_text("old")
    with pytest.raises(ComparisonError, match=r"must not hold an earlier comparison, but .* has report\.html"):
        directory.prepare(tmp_path, overwrite=False)
    assert (tmp_path / "report.html").read_text() == "old"
    directory.prepare(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "runs"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 2}', "must have schema 3, got 2: another version of batchnorm wrote it"),
        ("[]", "must be the settings of a comparison"),
        ("{", "must be the settings of a comparison, but reading it failed"),
    ],
)
def test_settings_of_something_else_are_refused(tmp_path: Path, content: str, message: str):
    assert directory.read_facts(tmp_path) is None
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ComparisonError, match=message):
        directory.read_facts(tmp_path)
