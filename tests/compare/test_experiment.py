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
from batchnorm.compare import ComparisonError, Run, experiment
from batchnorm.compare.inputs.optimizers import OPTIMIZERS
from batchnorm.compare.records import Recorder
from batchnorm.compare.report import formats
from batchnorm.compare.training import loop
from batchnorm.compare.training.cells import Cells

pytestmark = pytest.mark.usefixtures("no_pictures")


def small(data, out: Path, **options):
    options = {"batch_size": 16, "steps": 6, "seeds": 1, "threads": 1, "progress": False, **options}
    return compare.run(data=data, out=out, **options)


def losses(run: Run) -> list:
    return [step.loss for step in run.steps]


def test_a_comparison_leaves_everything_behind(result):
    files = {str(path.relative_to(result.out)) for path in result.out.rglob("*") if path.is_file()}
    names = ("none", "batch")
    runs = {f"runs/mlp-{norm}-before-lr0.1-batch16-iid-seed{seed}.jsonl" for norm in names for seed in (0, 1)}
    figures = {"accuracy.png", "loss.png", "activations.png", "layers.png"}
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
        for where in ("first", "last"):
            assert [h.step for h in run.histograms if h.where == where] == [1, 5, 10, 12]
        seconds = [step.train_seconds for step in run.steps]
        assert seconds == sorted(seconds)
        assert run.evaluations[-1].train_seconds == seconds[-1]
        assert run.diverged_at is None
    assert [layer.name for layer in result.runs[1].layers] == ["hidden1.norm", "hidden2.norm"]
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


def test_batches_of_two_classes_train_and_are_reported(data, tmp_path):
    found = small(data, tmp_path, norms=["none"], sampling="classes:2", steps=12)
    assert found.settings.grid.sampling == ("classes:2",)
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["grid"]["sampling"] == ["classes:2"]
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

    warm_up = Cells.warm_up
    monkeypatch.setattr(Cells, "warm_up", lambda *a: [warm_up(*a), monkeypatch.setattr(Recorder, "add", fail)][0])
    with pytest.raises(OSError, match="No space left on device"):
        small(data, tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_an_interrupted_comparison_has_no_summary(data, tmp_path, monkeypatch):
    step, calls = loop._step, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 6 + 6 + 3:  # three warm-up steps for each norm, one run, and half of the next
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small(data, tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    names = [f"runs/mlp-{norm}-before-lr0.1-batch16-iid-seed0.jsonl" for norm in ("batch", "none")]
    assert files == [f"{names[0]}.partial", names[1], "settings.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 97}, "batch_size must be at most the number of training samples, 96, got 97"),
        ({"steps": 3, "epochs": 3}, "only one of epochs and steps"),
        ({"steps": 1.5}, "steps must be a positive integer, got 1.5"),
        ({"sampling": "classes:0"}, "sampling must be iid or classes:K .* got 'classes:0'"),
        (
            {"sampling": "classes:4"},
            "classes for a batch than there are classes in the training data, 3, got classes:4",
        ),
        ({"seeds": 0}, "seeds must be a positive integer"),
        ({"threads": -1}, "threads must be a positive integer"),
        ({"threads": 99_999}, r"threads must be at most \d+, got 99999. Choose a smaller number"),
        ({"seeds": 10**12}, "seeds must be at most 10000, got 1000000000000"),
        ({"evaluate_every": 0}, "evaluate_every must be a positive integer"),
        ({"lr": 0.0}, "lr must be above 0 and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be above 0 and finite"),
        ({"lr": []}, "lr must have at least one value, got none"),
        ({"lr": [0.1, 0.1]}, "the values of lr must all differ, got 0.1 twice"),
        ({"batch_size": [16, 97]}, "batch_size must be at most the number of training samples, 96, got 97"),
        ({"placement": "between"}, "placement must be among before, after, got 'between'"),
        ({"schedule": "cosine:warmup=6"}, "the warm-up must be shorter than training, 6 steps, got 6"),
        ({"device": "abacus"}, "device must be one that this machine has, .* got 'abacus'"),
        ({"records": "csv"}, "records must be among jsonl, parquet, got 'csv'"),
        ({"overwrite": True, "resume": True}, "only one of overwrite and resume"),
        ({"optimizer": "sdg"}, "optimizer must be among sgd, .*, got 'sdg'"),
        ({"target_accuracy": 95}, "target_accuracy must be above 0 and at most 1, got 95. Write 0.95 for 95 %"),
    ],
)
def test_unusable_settings_are_refused_with_the_reason(data, tmp_path, options, message):
    with pytest.raises(ComparisonError, match=message):
        small(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(data, tmp_path, optimizer):
    result = small(data, tmp_path, norms=["batch"], optimizer=optimizer, steps=20)
    assert result.settings.grid.lr == (OPTIMIZERS[optimizer].lr,)
    assert result.runs[0].steps[-1].loss < result.runs[0].steps[0].loss


def test_epochs_and_defaults_are_resolved(data, tmp_path):
    result = small(data, tmp_path, norms=["none"], steps=None, epochs=2, batch_size=20)
    assert (result.settings.epochs, result.settings.steps) == (2, None)
    assert [step.step for step in result.runs[0].steps] == list(range(1, 9))
    assert [look.step for look in result.runs[0].evaluations] == [0, 5, 8]


def test_missing_extras_are_named_before_anything_starts(data, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"jinja2 cannot be imported.*pip install 'batchnorm\[compare\]'"):
        small(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_importing_needs_none_of_the_extras():
    extras = ("rich", "matplotlib", "jinja2", "click", "scipy", "pyarrow", "tensorboard")
    code = f"import sys, batchnorm.compare; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_combination_is_trained_with_every_seed(data, tmp_path):
    found = small(data, tmp_path, lr=[0.1, 0.5], batch_size=[16, 48], seeds=2, steps=None, epochs=2)
    cells = {(run.choice.norm, run.choice.lr, run.choice.batch_size, run.seed) for run in found.runs}
    assert len(cells) == 16 == len(found.runs)
    assert {len(run.steps) for run in found.runs if run.choice.batch_size == 16} == {12}
    assert {len(run.steps) for run in found.runs if run.choice.batch_size == 48} == {4}
    assert [outcome.label for outcome in found.outcomes][:2] == [
        "none, lr 0.1, batches of 16",
        "none, lr 0.1, batches of 48",
    ]
    assert found.summary["planned_runs"] == 16
    # The first batch and the initial values do not depend on the learning rate.
    first = {(r.choice.norm, r.choice.batch_size, r.seed): [] for r in found.runs}
    for run in found.runs:
        first[run.choice.norm, run.choice.batch_size, run.seed].append(run.steps[0].loss)
    assert all(a == b for a, b in first.values())
    assert len({a for a, _ in first.values()}) == 8


def test_a_cell_of_a_grid_is_the_run_that_it_would_be_alone(data, tmp_path):
    grid = small(data, tmp_path / "grid", lr=[0.1, 0.5], batch_size=[16, 48], placement=["before", "after"])
    alone = small(data, tmp_path / "alone", lr=0.5, batch_size=48)
    for run in alone.runs:
        twin = next(each for each in grid.runs if each.choice == run.choice)
        assert losses(twin) == losses(run)
        assert twin.evaluations[-1].test_loss == run.evaluations[-1].test_loss
    before, after = (
        losses(r) for r in grid.runs if r.norm == "batch" and (r.choice.lr, r.choice.batch_size) == (0.5, 48)
    )
    assert before != after


def test_which_is_trained_first_changes_from_seed_to_seed(data, tmp_path, monkeypatch):
    order, train = [], Cells.train

    def spy(self, choice, seed, *rest):
        order.append((seed, choice.norm))
        return train(self, choice, seed, *rest)

    monkeypatch.setattr(Cells, "train", spy)
    found = small(data, tmp_path, norms=["none", "batch", "layer"], seeds=2)
    assert order == [(0, "none"), (0, "batch"), (0, "layer"), (1, "batch"), (1, "layer"), (1, "none")]
    assert [(run.seed, run.norm) for run in found.runs] == sorted(
        order, key=lambda cell: (cell[0], ("none", "batch", "layer").index(cell[1]))
    )


def test_a_schedule_reaches_the_optimizer(data, tmp_path):
    constant = small(data, tmp_path / "a", norms="none")
    falling = small(data, tmp_path / "b", norms="none", schedule="linear")
    assert losses(constant.runs[0])[:2] == losses(falling.runs[0])[:2]  # the second loss is of the first update
    assert losses(constant.runs[0])[2:] != losses(falling.runs[0])[2:]
    assert "linear decay to 0" in falling.report_path.read_text()


def test_normalized_inputs_replace_standardized_ones(data, tmp_path):
    shifted = compare.Data("far", data.x_train + 100, data.y_train, data.x_test + 100, data.y_test, 3, "")
    found = small(shifted, tmp_path, norms="none", input_norm=True, steps=30)
    assert found.settings.input_norm
    assert found.runs[0].steps[-1].loss < 0.5
    assert "precedes the first layer" in found.report_path.read_text()


def test_a_network_with_weights_keeps_them(data, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = small(data, tmp_path, norms="batch", model=network, seeds=2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    first, second = found.runs
    assert first.evaluations[0] == second.evaluations[0]
    assert losses(first) != losses(second)
    assert "Every seed starts from the weights of the given network" in found.report_path.read_text()


def test_the_default_directory_is_a_new_one():
    assert experiment.default_directory().parent == Path("batchnorm-compare")
