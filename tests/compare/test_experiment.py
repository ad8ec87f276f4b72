from __future__ import annotations

import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm import compare
from batchnorm.compare import ComparisonError, Run, experiment, training
from batchnorm.compare.records import Recorder


def small(data, out: Path, **options):
    options = {"batch_size": 16, "steps": 6, "seeds": 1, "threads": 1, "progress": False, **options}
    return compare.run(data=data, out=out, **options)


def losses(run: Run) -> list:
    return [step.loss for step in run.steps]


def test_a_comparison_leaves_everything_behind(result):
    files = {str(path.relative_to(result.out)) for path in result.out.rglob("*") if path.is_file()}
    runs = {f"runs/{norm}-seed{seed}.jsonl" for norm in ("none", "batch") for seed in (0, 1)}
    figures = {"accuracy.png", "loss.png", "activations.png"}
    assert files == {"settings.json", "summary.json", "report.html"} | figures | runs
    assert {path.name for path in result.figure_paths} == figures
    assert result.report_path.is_file()
    assert json.loads((result.out / "summary.json").read_text()) == json.loads(json.dumps(result.summary))
    assert str(result).endswith(f"Report: {result.report_path}")


def test_every_step_and_evaluation_is_recorded(result):
    assert [(run.norm, run.seed) for run in result.runs] == [("none", 0), ("batch", 0), ("none", 1), ("batch", 1)]
    for run in result.runs:
        assert [step.step for step in run.steps] == list(range(1, 13))
        assert [evaluation.step for evaluation in run.evaluations] == [0, 5, 10, 12]
        assert [histogram.step for histogram in run.histograms] == [1, 5, 10, 12]
        seconds = [step.train_seconds for step in run.steps]
        assert seconds == sorted(seconds)
        assert run.evaluations[-1].train_seconds == seconds[-1]
        assert run.diverged_at is None
    assert [layer.name for layer in result.runs[1].layers] == ["norm1", "norm2"]
    assert result.runs[0].layers == []


def test_batch_norm_controls_what_goes_into_the_first_activation(result):
    for run in result.runs:
        if run.norm == "batch":
            (low, middle, high) = run.histograms[0].percentiles
            assert (low, middle, high) == pytest.approx((-1.04, 0, 1.04), abs=0.15)


def test_the_same_seeds_give_the_same_curves(data, result, tmp_path):
    again = compare.run(
        ["none", "batch"], data=data, batch_size=16, steps=12, seeds=2, evaluate_every=5, threads=1,
        out=tmp_path, progress=False,
    )  # fmt: skip
    assert [losses(run) for run in again.runs] == [losses(run) for run in result.runs]
    assert [run.histograms for run in again.runs] == [run.histograms for run in result.runs]
    finals = [[run.evaluations[-1].test_loss for run in found.runs] for found in (again, result)]
    assert finals[0] == finals[1]
    assert losses(result.runs[1]) != losses(result.runs[3])


def test_batches_of_two_classes_train_and_are_told(data, tmp_path):
    found = small(data, tmp_path, norms=["none"], sampling="classes:2", steps=12)
    assert found.settings.sampling == "classes:2"
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["sampling"] == "classes:2"
    assert "12 steps of 16 samples, drawn from 2 classes each, with" in found.report_path.read_text()
    iid = small(data, tmp_path / "iid", norms=["none"], steps=12)
    assert losses(iid.runs[0]) != losses(found.runs[0])
    assert "12 steps of 16 samples, drawn without regard to class, with" in iid.report_path.read_text()


def test_norms_that_change_nothing_train_alike(data, tmp_path):
    """Same batches and same initial values for all: two norms with the same arithmetic give the same bits."""
    found = small(data, tmp_path, norms=["batch", "batch:eps=1e-5", "batch:momentum=0.5"], seeds=2)
    for seed in (0, 1):
        curves = [losses(run) for run in found.runs if run.seed == seed]
        assert curves[0] == curves[1] == curves[2]


def test_initial_values_are_shared_with_the_first_norm(result):
    none, batch = result.runs[:2]
    assert batch.shared == ["linear1.weight", "linear2.weight", "linear3.weight", "linear3.bias"]
    assert none.own == []
    assert losses(none) != losses(batch)


def test_global_state_is_put_back(data, tmp_path):
    state, path = torch.get_rng_state(), list(sys.path)
    threads = torch.get_num_threads()
    small(data, tmp_path / "good", threads=threads + 1)
    assert torch.get_num_threads() == threads
    with pytest.raises(ComparisonError):
        small(data, tmp_path / "bad", threads=threads + 1, model=lambda *_: 1 / 0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.path == path


def test_threads_are_set_while_training(data, tmp_path):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(x)

    result = small(data, tmp_path, threads=2, model=lambda norm, shape, classes: Spy(8, classes))
    assert set(seen) == {2}
    assert result.settings.threads == 2


def test_divergence_is_recorded_and_reported(data, tmp_path):
    result = small(data, tmp_path, norms=["none"], lr=1e30, steps=30)
    (run,) = result.runs
    assert run.diverged_at is not None
    assert run.steps[-1].step == run.diverged_at < 30
    assert run.steps[-1].loss is None
    assert run.evaluations[-1].step == run.diverged_at
    assert result.outcomes[0].diverged == [0]
    assert result.outcomes[0].final_accuracy is None
    assert any("diverged in the only seed" in sentence for sentence in result.headline)
    assert result.report_path.is_file()


def test_a_network_that_fails_in_training_is_blamed(data, tmp_path):
    class FailsInTraining(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("shapes do not fit")
            return super().forward(x)

    message = r"the model with norm 'none', seed 0, .* training step 1, .* RuntimeError: shapes do not fit \(test_exp"
    with pytest.raises(ComparisonError, match=message):
        small(data, tmp_path / "out", model=lambda norm, shape, classes: FailsInTraining(8, classes))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_not_blamed_on_the_network(data, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    warm_up = experiment._warm_up
    monkeypatch.setattr(
        experiment, "_warm_up", lambda *a: (warm_up(*a), monkeypatch.setattr(Recorder, "evaluation", fail))
    )
    with pytest.raises(OSError, match="No space left on device"):
        small(data, tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_an_interrupted_comparison_has_no_summary(data, tmp_path, monkeypatch):
    step, calls = training._step, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 6 + 6 + 3:  # three warm-up steps for each norm, one run, and half of the next
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training, "_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small(data, tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["runs/batch-seed0.jsonl.partial", "runs/none-seed0.jsonl", "settings.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
        ({"batch_size": 97}, "batch_size must be at most the number of training samples, 96, got 97"),
        ({"steps": 3, "epochs": 3}, "only one of epochs and steps"),
        ({"steps": 1.5}, "steps must be a whole number from 1, got 1.5"),
        ({"sampling": "classes:0"}, "sampling must be iid or classes:K .* got 'classes:0'"),
        ({"sampling": "classes:4"}, "classes as there are classes in the training data, 3, got classes:4"),
        ({"seeds": 0}, "seeds must be a whole number from 1"),
        ({"threads": -1}, "threads must be a whole number from 1"),
        ({"evaluate_every": 0}, "evaluate_every must be a whole number from 1"),
        ({"lr": 0.0}, "lr must be above 0 and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be above 0 and finite"),
        ({"optimizer": "sdg"}, "optimizer must be among sgd, .*, got 'sdg'"),
        ({"target_accuracy": 95}, "target_accuracy must be above 0 and at most 1, got 95. Write 0.95 for 95 %"),
    ],
)
def test_unusable_settings_are_refused_with_the_reason(data, tmp_path, options, message):
    with pytest.raises(ComparisonError, match=message):
        small(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_every_optimizer_trains(data, tmp_path, optimizer):
    result = small(data, tmp_path, norms=["batch"], optimizer=optimizer, steps=20)
    assert result.settings.lr == training.OPTIMIZERS[optimizer].lr
    assert result.runs[0].steps[-1].loss < result.runs[0].steps[0].loss


def test_epochs_and_defaults_are_resolved(data, tmp_path):
    result = small(data, tmp_path, norms=["none"], steps=None, epochs=2, batch_size=20)
    assert (result.settings.steps, result.settings.evaluate_every) == (8, 1)


def test_missing_extras_are_named_before_anything_starts(data, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"jinja2 cannot be imported.*pip install 'batchnorm\[compare\]'"):
        small(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_importing_needs_none_of_the_extras():
    extras = ("rich", "matplotlib", "jinja2", "click")
    code = f"import sys, batchnorm.compare; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_default_directory_is_a_new_one():
    assert experiment.default_directory().parent == Path("batchnorm-compare")
