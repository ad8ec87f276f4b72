"""The diagnosis only reads the model, reports usage errors, and is written to files."""

from __future__ import annotations

import copy
import io
import json
import random
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.doctor import Diagnosis, Severity, diagnose
from batchnorm.doctor.pytorch.inspection import inspect_layers
from batchnorm.doctor.pytorch.measuring import measure_model
from batchnorm.doctor.rules import load_rules
from batchnorm.doctor.wording import signed
from batchnorm.models.data.batches import Batches
from tests.doctor.networks import Plain, batches, criterion, trained


class Net(nn.Module):
    """Dropout, a buffer that moves, layers in several modes, gradients and hooks of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.drop, self.norm2 = nn.Dropout(0.5), nn.BatchNorm2d(6, momentum=None)
        self.head = nn.Linear(6, 10)
        self.register_buffer("calls", torch.zeros(()))
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("planted")
        self.count = 0

    def forward(self, x):
        self.calls += 1
        self.count += 1
        if self.fail_at == self.count:
            raise self.error
        y = self.norm2(self.drop(self.norm(self.conv(x)).relu_()))
        return self.head(y.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(1)
    model = Net()
    for x, y in batches(2, 8):
        criterion(model(x), y).backward()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    model.conv.register_forward_hook(lambda *_: None)
    model.count = 0
    return model


def state(model: nn.Module) -> dict:
    return {
        "tensors": {k: (v, v.clone()) for k, v in (*model.named_parameters(), *model.named_buffers())},
        "grads": {k: (p.grad, None if p.grad is None else p.grad.clone()) for k, p in model.named_parameters()},
        "required": {k: p.requires_grad for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "hooks": {k: [list(h) for n, h in vars(m).items() if "_hooks" in n and h] for k, m in model.named_modules()},
        "momentum": {k: getattr(m, "momentum", None) for k, m in model.named_modules()},
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # noqa: NPY002
    }


def assert_same(before: dict, after: dict) -> None:
    for what in ("tensors", "grads"):
        assert before[what].keys() == after[what].keys()
        for name, (held, value) in before[what].items():
            now, now_value = after[what][name]
            assert held is now
            assert value is None or torch.equal(value, now_value)
    for what in ("required", "modes", "hooks", "momentum", "random"):
        assert before[what] == after[what]


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_before(training: bool) -> None:
    model = net()
    if not training:
        model.eval()
    data = [(x.clone(), y) for x, y in batches(3, 16)]
    given = copy.deepcopy(data)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = state(model)
    diagnosis = diagnose(model, data, loss=criterion, optimizer=optimizer)
    assert_same(before, state(model))
    assert not optimizer.state
    assert all(torch.equal(a, b) for pair, own in zip(data, given, strict=True) for a, b in zip(pair, own, strict=True))
    assert diagnosis.samples == 48


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("call", [1, 2, 6, 8])
def test_everything_is_as_before_when_the_model_fails(call: int, error: BaseException) -> None:
    model = net()
    model.fail_at, model.error = call, error
    before = state(model)
    with pytest.raises(type(error)):
        diagnose(model, batches(3, 16), loss=criterion)
    assert_same(before, state(model))


def test_a_training_step_that_fails_is_not_checked() -> None:
    model = net()
    model.fail_at = 10  # after three passes over three batches
    before = state(model)
    diagnosis = diagnose(model, batches(3, 16), loss=criterion)
    assert_same(before, state(model))
    (missed,) = [rule for rule in diagnosis.not_checked if rule.code == "BN106"]
    assert "RuntimeError: planted" in missed.reason


def test_everything_is_as_before_when_data_loss_or_a_rule_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()

    def broken():
        yield from batches(2, 16)
        raise OSError("disk")

    def worse(returned, y):
        torch.rand(1)
        raise ZeroDivisionError

    def rule(self, probe):
        model.norm.running_mean.add_(1)
        raise AssertionError("rule")

    before = state(model)
    with pytest.raises(OSError, match="disk"):
        diagnose(model, broken())
    with pytest.raises(ZeroDivisionError):
        diagnose(model, batches(1, 16), loss=worse)
    monkeypatch.setattr(load_rules()[-1], "check", rule)
    with pytest.raises(AssertionError, match="rule"):
        diagnose(model, batches(1, 16))
    assert_same(before, state(model))


def test_a_step_is_not_made_where_gradients_start_an_update() -> None:
    model = Plain()
    weight = model.head.weight
    weight.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    diagnosis = diagnose(model, batches(2, 8), loss=criterion)
    assert weight.abs().sum() > 0
    assert "hooks" in next(rule.reason for rule in diagnosis.not_checked if rule.code == "BN106")


def test_passes_over_the_data_are_bounded() -> None:
    model = net()
    diagnose(model, batches(4, 16), loss=criterion, budget=0)
    traced = model.count - 3 * 4 - 1
    model.count = 0
    diagnose(model, batches(8, 16), loss=criterion, budget=0)
    assert model.count - 3 * 8 - 1 == traced


class Counted(Plain):
    count = 0  # of its calls

    def forward(self, x):
        self.count += 1
        return super().forward(x)


def test_three_passes_and_one_for_each_suspicious_layer_within_the_budget() -> None:
    model = trained("plain")
    model.__class__ = Counted
    for block in model.blocks:
        block[1].running_mean += block[1].running_var.sqrt()

    def calls(number: int, budget: int) -> tuple[int, Diagnosis]:
        model.count = 0
        found = diagnose(model, batches(number, 16), loss=criterion, budget=budget)
        return model.count, found

    (fixed, found), (more, _) = calls(4, 0), calls(12, 0)
    (gap,) = [finding for finding in found.findings if finding.code == "BN101"]
    assert len(gap.paths) == 6
    assert more - fixed == 3 * 8  # three passes, and what does not grow with the data
    assert fixed - 3 * 4 <= 8  # a training step, and the tries and sizes of the trace
    for budget, passes in ((1, 1), (4, 4), (6, 6), (100, 6)):
        number, found = calls(4, budget)
        assert number - fixed == 4 * passes
        (gap,) = [finding for finding in found.findings if finding.code == "BN101"]
        assert sum("in this layer alone" in line for line in gap.evidence) == passes


def test_without_a_pass_left_the_report_says_what_was_not_measured() -> None:
    assert [
        rule.code for rule in diagnose(net(), batches(3, 16), budget=0).not_checked if "budget=1" in rule.reason
    ] == ["BN112"]


def test_pictures_have_no_classes() -> None:
    picture = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    table = nn.Sequential(*picture, nn.Flatten(), nn.Linear(4 * 12 * 12, 3))
    with torch.no_grad():
        picture[1].running_mean += 5
    for model, classes in ((picture, False), (table, True)):
        (gap,) = [f for f in diagnose(model, [x for x, _ in batches(4)]).findings if f.code == "BN101"]
        assert ("predictions change" in gap.summary) == classes == ("other_class" in gap.cost)


def test_a_loss_that_falls_has_a_true_minus() -> None:
    assert [signed(value) for value in (-0.01763, 1.5, -2e-7)] == ["−0.0176", "+1.5", "−2e−07"]


def test_max_samples_ends_the_data() -> None:
    assert diagnose(net(), batches(8, 16), max_samples=40).samples == 48


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": 3}, TypeError, "diagnose expects a torch.nn.Module, got int"),
        ({"model": nn.Linear(2, 2)}, ValueError, "diagnose expects a model with batch normalization, got Linear"),
        ({"model": nn.LazyBatchNorm1d()}, ValueError, "diagnose expects layers that know their channels"),
        ({"data": torch.ones(2, 2)}, TypeError, "diagnose expects data to be an iterable of batches"),
        ({"data": []}, ValueError, "diagnose expects at least one batch"),
        ({"data": [3]}, TypeError, "diagnose expects batches that are tensors"),
        ({"max_samples": 0}, ValueError, "diagnose expects max_samples >= 1"),
        ({"budget": -1}, ValueError, "diagnose expects budget >= 0"),
    ],
)
def test_invalid_arguments_raise_errors(change, error, text) -> None:
    with pytest.raises(error, match=text):
        diagnose(**{"model": nn.BatchNorm1d(2), **change})


def test_models_that_return_no_numbers_or_nan_are_diagnosed() -> None:
    class Nothing(nn.Sequential):
        def forward(self, x):
            super().forward(x)

    quiet = diagnose(Nothing(nn.BatchNorm1d(2)), [torch.randn(8, 2)])
    assert any("no floating-point tensor" in rule.reason for rule in quiet.not_checked)
    broken = diagnose(nn.Sequential(nn.BatchNorm1d(2)), [torch.full((8, 2), torch.nan)])
    assert any("not finite" in rule.reason for rule in broken.not_checked)


def test_batches_may_be_dicts() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Plain()

        def forward(self, pixels):
            return {"logits": self.net(pixels)}

    data = [{"pixels": x, "y": y} for x, y in batches(3, 16)]
    loss = lambda out, batch: criterion(out["logits"], batch["y"])  # noqa: E731
    diagnosis = diagnose(Named(), data, loss=loss)
    assert diagnosis.samples == 48
    assert "trace" not in str(diagnosis.not_checked)


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    model = net()
    model.conv._forward_hooks.clear()  # whose place would not show
    return diagnose(model, batches(3, 16), loss=criterion)


def test_the_report_prints_worst_first(found: Diagnosis) -> None:
    severities = [finding.severity for finding in found.findings]
    assert severities == sorted(severities, reverse=True)
    text = str(found)
    for finding in found.findings:
        assert f"batchnorm explain {finding.code}" in text and all(line in text for line in finding.repair.splitlines())
    for rule in found.not_checked:
        assert rule.reason in text


def test_the_report_is_drawn_by_rich(found: Diagnosis) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    assert found.summary() in " ".join(text.split())
    assert all(finding.code in text for finding in found.findings)


def test_json_holds_everything(found: Diagnosis, tmp_path) -> None:
    held = json.loads(found.to_json())
    assert held["schema"] == 1
    assert [f["code"] for f in held["findings"]] == [f.code for f in found.findings]
    assert {f["severity"] for f in held["findings"]} <= {s.label for s in Severity}
    assert [layer["path"] for layer in held["layers"]] == ["norm", "norm2"]
    found.save(tmp_path / "bn.json")
    assert json.loads((tmp_path / "bn.json").read_text(encoding="utf-8")) == held
    found.save(tmp_path / "bn.txt")
    assert (tmp_path / "bn.txt").read_text(encoding="utf-8") == f"{found}\n"
    with pytest.raises(ValueError, match=r"ends in \.html, \.json or \.txt"):
        found.save(tmp_path / "bn.pdf")
    assert {path.name for path in tmp_path.iterdir()} == {"bn.json", "bn.txt"}


def test_the_facts_say_where_a_layer_stands(found: Diagnosis) -> None:
    first, second = found.layers
    assert (first.after, first.before, first.foldable) == ("conv (conv2d)", "relu", True)
    assert (first.training, second.training) == (False, True)
    assert second.momentum is None
    assert first.updates == 2
    assert (first.parameters, first.buffers) == (12, 13)


def test_the_facts_say_the_mode_of_each_layer() -> None:
    model = net()
    assert [layer.training for layer in inspect_layers(model)] == [False, True]
    assert [layer.training for layer in inspect_layers(model.eval())] == [False, False]


def test_measurements_cannot_be_changed() -> None:
    measurements = measure_model(net())
    for item in (measurements, measurements.layers[0]):
        for field in fields(item):
            with pytest.raises(FrozenInstanceError):
                setattr(item, field.name, None)


def test_the_schema_names_every_field(found: Diagnosis) -> None:
    path = Path(__file__).parents[2] / "docs" / "doctor" / "schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    held = found.to_dict()
    assert schema["properties"]["schema"]["const"] == held["schema"]
    assert set(schema["required"]) == set(held)
    for part in ("findings", "not_checked", "layers"):
        assert held[part]
        assert set(schema["properties"][part]["items"]["required"]) == set(held[part][0])


def test_outputs_of_several_sizes_are_compared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].running_mean += 5
    diagnosis = diagnose(model, [torch.randn(32, 3, 8, 8 + size) for size in range(4)])
    assert [finding.code for finding in diagnosis.findings if finding.severity == Severity.WARNING] == [
        "BN102",
        "BN101",
    ]


def test_the_bar_says_how_long_it_will_take(capsys) -> None:
    diagnose(Plain(), batches(2, 4), loss=criterion, budget=2, progress=True)
    assert re.search(r"^2 batches: about 0:00:0\d, with 2 passes for single layers 0:0", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    ("data", "most", "number"), [([0] * 8, None, 8), ([0] * 8, 30, 3), (iter([0]), 30, 3), (iter([0]), None, None)]
)
def test_the_number_of_batches_is_known_where_it_can_be(data, most, number) -> None:
    assert Batches(data, most).expected(10) == number
