"""Each planted defect is found by its rule, and healthy networks have nothing above a note."""

from __future__ import annotations

import builtins
import copy
import functools
import symtable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import batchnorm
from batchnorm.doctor import Diagnosis, Severity, diagnose, watch
from batchnorm.doctor.rules import load_rules
from batchnorm.rule_texts import rule_texts
from tests.doctor.case import Case, healthy, norms
from tests.doctor.cases import HEALTHY, PLANTED, RELATED
from tests.doctor.networks import Plain, batches, criterion, train, trained

CODES = [rule.code for rule in load_rules()]


def test_every_rule_has_a_planted_case_and_its_own_code() -> None:
    assert set(PLANTED) == set(CODES)
    assert len(set(CODES)) == len(CODES)


@functools.cache
def diagnosed(make) -> tuple[Diagnosis, Case]:
    case = make()
    with case.around():
        return diagnose(case.model, case.data, **case.options), case


def above_notes(diagnosis: Diagnosis) -> list[str]:
    return [f"{f.code} {f.summary} {f.evidence}" for f in diagnosis.findings if f.severity > Severity.NOTE]


# The names that a fix may use: the packages, and the user's objects.
NAMES = {"batchnorm", "torch", "model", "training_data", "data"}


def undefined(code: str) -> set[str]:
    """Return the names that code reads and does not define."""
    table = symtable.symtable(code, "fix", "exec")
    every = [table, *table.get_children()]
    defined = {s.get_name() for each in every for s in each.get_symbols() if s.is_assigned() or s.is_imported()}
    read = {s.get_name() for each in every for s in each.get_symbols() if s.is_referenced()}
    return {name for name in read - defined if not hasattr(builtins, name) and not name.startswith(".")}


@pytest.mark.parametrize("code", CODES)
def test_a_planted_defect_is_found(code: str) -> None:
    diagnosis, case = diagnosed(PLANTED[code])
    found = [finding for finding in diagnosis.findings if finding.code == code]
    assert found, str(diagnosis)
    assert max(finding.severity for finding in found) >= case.severity
    assert all(finding.summary and (finding.repair or finding.causes) for finding in found)
    assert all(undefined(finding.repair) <= NAMES for finding in diagnosis.findings)
    errors = {finding.code for finding in diagnosis.findings if finding.severity == Severity.ERROR}
    assert errors <= {code, *RELATED.get(code, set())}


@pytest.mark.parametrize("code", CODES)
def test_the_same_network_without_the_defect_is_healthy(code: str) -> None:
    diagnosis, _ = diagnosed(HEALTHY.get(code, healthy))
    assert above_notes(diagnosis) == []
    if code != "BN101":  # there is always some gap, which is then a note
        assert code not in {finding.code for finding in diagnosis.findings}


@pytest.mark.parametrize("make", [healthy, *HEALTHY.values()], ids=["healthy", *HEALTHY])
def test_the_watch_reports_nothing_about_a_healthy_training(make) -> None:
    _, case = diagnosed(make)
    model = copy.deepcopy(case.model).float().train()
    loss, data = case.options.get("loss", criterion), case.data or batches()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    with watch(model, every=1, warn=False) as w:
        for x, y in data:
            optimizer.zero_grad()
            loss(model(x.float()), y).backward()
            optimizer.step()
    assert not w.findings, [finding.summary for finding in w.findings]


@pytest.mark.parametrize("name", ["mobilenet", "densenet", "transformers"])
def test_trained_networks_of_several_kinds_are_healthy(name: str) -> None:
    diagnosis = diagnose(trained(name), batches(6), loss=criterion)
    assert above_notes(diagnosis) == []
    assert len(diagnosis.layers) >= 10
    assert diagnosis.samples == 384


def test_without_a_loss_nothing_is_an_error_by_its_effect() -> None:
    case = PLANTED["BN103"]()
    diagnosis = diagnose(case.model, case.data)
    severities = {finding.code: finding.severity for finding in diagnosis.findings}
    assert severities["BN101"] == severities["BN103"] == Severity.WARNING


def test_a_leak_in_dependent_batches_is_found_without_a_loss() -> None:
    case = PLANTED["BN112"]()
    found = diagnose(case.model, case.data)
    assert [finding.severity for finding in found.findings if finding.code == "BN112"] == [Severity.WARNING]


def test_noise_of_small_independent_batches_is_no_leak() -> None:
    found = diagnose(trained("plain"), [x for x, _ in batches(24, 4)]).findings
    assert "BN112" not in {finding.code for finding in found}
    (gap,) = [finding for finding in found if finding.code == "BN104"]
    assert gap.severity == Severity.NOTE


def test_stale_statistics_and_shifted_data_are_distinguished() -> None:
    stale, _ = diagnosed(PLANTED["BN102"])
    shifted, _ = diagnosed(PLANTED["BN103"])
    assert "BN103" not in {finding.code for finding in stale.findings}
    assert "BN102" not in {finding.code for finding in shifted.findings}


def test_pruned_weights_have_stale_statistics() -> None:
    model = trained("plain")
    for layer in [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]:
        prune.l1_unstructured(layer, "weight", 0.6)
        prune.remove(layer, "weight")
    found = {f.code: f for f in diagnose(model, batches(), loss=criterion).findings}
    assert found["BN102"].figures["cause"] == "stale"
    assert found["BN102"].severity == Severity.ERROR


def test_an_evaluation_without_eval_comes_before_what_was_measured() -> None:
    model, data = trained("plain"), batches(24, 4)
    found = diagnose(model, data, loss=criterion, evaluate=lambda model: model(data[0][0])).findings
    assert [finding.code for finding in found if finding.severity == Severity.WARNING][:2] == ["BN208", "BN104"]


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.SGD(trained("plain").parameters(), 0.1)
    with pytest.raises(ValueError, match="an optimizer of the model's parameters, got SGD with none of them. A copy"):
        diagnose(trained("plain"), batches(1), optimizer=optimizer)


def test_statistics_that_lag_after_a_jump_of_the_learning_rate_are_no_error() -> None:
    model = trained("plain")
    optimizer, data = train(model, 10, lr=0.1, falls=False), batches(5, start=0)
    parameters, buffers, state = (
        copy.deepcopy(of) for of in ([*model.parameters()], [*model.buffers()], optimizer.state_dict())
    )
    found = {f.code: f for f in diagnose(model, data, loss=criterion, optimizer=optimizer).findings}
    assert found["BN101"].severity == found["BN102"].severity == Severity.WARNING
    assert found["BN102"].figures["cause"] == "lag"
    assert any("10 more steps" in line for line in found["BN102"].evidence)
    for now, before in zip([*model.parameters(), *model.buffers()], [*parameters, *buffers], strict=True):
        assert torch.equal(now, before)
    assert str(optimizer.state_dict()) == str(state)

    unknown = {f.code: f for f in diagnose(model, data, loss=criterion).findings}["BN102"]
    assert unknown.severity == Severity.ERROR and any("optimizer=" in line for line in unknown.evidence)
    optimizer.param_groups[0]["lr"] = 1e-4  # the weights hardly move, so something else has changed them
    slow = {f.code: f for f in diagnose(model, data, loss=criterion, optimizer=optimizer).findings}["BN102"]
    assert slow.severity == Severity.ERROR and slow.figures["cause"] == "stale"


def test_statistics_that_lag_at_a_constant_learning_rate_are_a_note() -> None:
    model = trained("plain")
    train(model, 80, lr=0.02, falls=False)
    found = diagnose(model, batches(start=0), loss=criterion)
    assert above_notes(found) == []
    (lag,) = [finding for finding in found.findings if finding.code == "BN102"]
    assert lag.figures["cause"] == "lag" and "learning rate" in lag.summary
    assert lag.cost["loss"] > 0.1 * float(lag.evidence[0].split(" against ")[2].split()[0])  # elsewhere a warning
    (stale,) = [finding for finding in diagnosed(PLANTED["BN102"])[0].findings if finding.code == "BN102"]
    assert stale.figures["cause"] == "stale" and stale.severity == Severity.ERROR


def test_too_few_updates_are_named() -> None:
    diagnosis, _ = diagnosed(PLANTED["BN217"])
    found = diagnosis.findings[0]
    assert found.code == "BN217"
    assert found.summary == "momentum 0.01 over 20 steps keeps 82% of the initial running statistics"


def test_too_few_updates_are_estimated_without_a_counter() -> None:
    case = PLANTED["BN217"]()
    for layer in norms(case.model):
        layer.num_batches_tracked = None
    found = diagnose(case.model, case.data, **case.options).findings[0]
    assert found.code == "BN217"
    assert found.summary == (
        "momentum 0.01 keeps about 82% of the initial running statistics (estimated: the layers count no updates)"
    )


def test_too_few_updates_are_a_note_without_data() -> None:
    model = trained("plain")
    model.blocks[2][1].momentum = 0.001
    (found,) = [f for f in diagnose(model).findings if f.code == "BN217"]
    assert found.severity == Severity.NOTE and found.paths == ("blocks.2.1",)
    assert found.summary == "momentum 0.001 over 80 steps keeps 92% of the initial running statistics"


def test_dropout_before_a_layer_is_a_note_without_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Dropout2d(0.2), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8), nn.Dropout(0.0), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(),
    )  # fmt: skip
    (found,) = [f for f in diagnose(model).findings if f.code == "BN111"]
    assert found.severity == Severity.NOTE and found.paths == ("4",)
    assert found.figures["dropout"] == {"4": 0.3}
    assert not [f for f in diagnose(model.requires_grad_(False)).findings if f.code == "BN111"]
    assert [rule.code for rule in diagnose(Odd()).not_checked if rule.code in ("BN110", "BN111")] == ["BN110", "BN111"]


def test_what_is_measured_counts_more_than_where_dropout_stands() -> None:
    case = HEALTHY["BN111"]()
    case.model.blocks[0].insert(1, nn.Dropout(0.01))
    assert not [f for f in diagnose(case.model, case.data, **case.options).findings if f.code == "BN111"]


class Odd(nn.Module):
    """Takes no input that could be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, lengths):
        return self.norm(self.conv(x))


def test_a_change_of_unknown_cause_is_reported_as_unsure() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 2))
    data = [torch.randn(64, 8) for _ in range(4)]
    model(torch.cat(data))
    with torch.no_grad():
        model[1].running_mean += torch.randn(8)
        model[1].running_var *= torch.rand(8) * 8
    (found,) = [f for f in diagnose(model, data).findings if f.code == "BN102"]
    assert found.figures["cause"] == "unknown"
    assert any("unsure" in line for line in found.evidence)


@pytest.mark.parametrize("change", ["noise", "scale", "colours"])
def test_data_of_another_kind_are_a_shift(change: str) -> None:
    generator = torch.Generator().manual_seed(0)
    changes = {
        "noise": lambda x: x + 0.3 * torch.randn(x.shape, generator=generator),
        "scale": lambda x: 255 * x,
        "colours": lambda x: x.flip(1),
    }
    data = [(changes[change](x), y) for x, y in batches()]
    codes = {finding.code for finding in diagnose(trained("plain"), data, loss=criterion).findings}
    assert "BN103" in codes and "BN102" not in codes


def test_layers_that_explain_the_gap_are_ranked_by_it() -> None:
    model = trained("plain")
    with torch.no_grad():
        model.blocks[3][1].running_mean += 3 * model.blocks[3][1].running_var.sqrt()
    (found,) = [f for f in diagnose(model, batches(6), loss=criterion).findings if f.code == "BN101"]
    assert found.paths == ("blocks.3.1",)
    assert "blocks.3.1: the population's statistics in this layer alone lower the loss from" in found.evidence[3]
    assert found.evidence[3].endswith(", 100% of the excess")


def test_recalibration_repairs_what_the_doctor_found() -> None:
    case = PLANTED["BN103"]()
    repaired, _ = batchnorm.recalibrate(case.model, case.data)
    assert above_notes(diagnose(repaired, case.data, **case.options)) == []


def test_one_value_per_channel_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    every = diagnose(model, [torch.randn(1, 4) for _ in range(3)]).findings
    last = diagnose(model, [torch.randn(256, 4), torch.randn(256, 4), torch.randn(1, 4)]).findings
    assert [f.severity for f in every if f.code == "BN104"] == [Severity.ERROR]
    (found,) = [f for f in last if f.code == "BN104"]
    assert found.severity == Severity.WARNING
    assert 'on_single="running"' in found.repair


@pytest.mark.parametrize("make", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
def test_only_layers_that_move_in_the_backward_pass_are_named(make) -> None:
    model = PLANTED["BN106"]().model
    for block in model.network.blocks:
        block[1].__class__ = make
    codes = {finding.code for finding in diagnose(model, batches(3, 16), loss=criterion).findings}
    assert ("BN106" in codes) == (make is nn.BatchNorm2d)


def test_a_loss_that_calls_the_model_twice_moves_twice() -> None:
    def twice(model: nn.Module, batch):
        return model(batch[0]) + model(batch[0].flip(3))

    (found,) = [f for f in diagnose(trained("plain"), batches(4, 32), forward=twice).findings if f.code == "BN106"]
    assert found.figures["calls"] == 2
    assert "update_running_stats" in found.repair


def test_frozen_layers_are_not_half_frozen() -> None:
    model = trained("plain")
    model.blocks.requires_grad_(False)
    frozen, _ = batchnorm.freeze(model)
    assert "BN107" not in {finding.code for finding in diagnose(frozen).findings}


def test_parameters_that_the_optimizer_lacks_are_frozen() -> None:
    model = trained("plain")
    optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
    (found,) = [f for f in diagnose(model, optimizer=optimizer).findings if f.code == "BN107"]
    assert len(found.paths) == 6


def test_a_layer_without_parameters_that_stays_in_evaluation_is_a_note() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8), nn.BatchNorm1d(8))
    assert not [f for f in diagnose(model).findings if f.code == "BN107"]
    model[1].eval()
    (found,) = [f for f in diagnose(model).findings if f.code == "BN107"]
    assert found.severity == Severity.NOTE and found.paths == ("1",)
    frozen, _ = batchnorm.freeze(model, only=["1"])
    assert not [f for f in diagnose(frozen).findings if f.code == "BN107"]


def test_a_model_that_is_not_trained_is_not_half_frozen() -> None:
    assert diagnose(Plain().requires_grad_(False).eval()).healthy


def test_half_precision_cancels() -> None:
    layer = nn.BatchNorm2d(4).to(torch.bfloat16)
    x = (torch.randn(16, 4, 8, 8) + 50).to(torch.bfloat16)
    (found,) = [f for f in diagnose(nn.Sequential(layer), [x]).findings if f.code == "BN108"]
    assert found.severity >= Severity.WARNING
    assert "bfloat16" in found.summary


def test_a_module_in_several_places_is_named_with_all_of_them() -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.Conv2d(3, 3, 1), shared)
    (found,) = [f for f in diagnose(model).findings if f.code == "BN109"]
    assert found.paths == ("0", "2")
    assert found.severity == Severity.NOTE


@pytest.mark.parametrize(
    ("changes", "evidence"),
    [
        ({"track_running_stats": False}, "because of track_running_stats=False"),
        ({"momentum": 0.0}, "because of momentum=0"),
        ({"update_running_stats": False}, "because of update_running_stats=False"),
    ],
)
def test_statistics_that_training_never_updates_are_found_without_data(changes: dict, evidence: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), batchnorm.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    assert "BN216" not in {finding.code for finding in diagnose(model).findings}
    for name, value in changes.items():
        setattr(model[1], name, value)
    (found,) = [f for f in diagnose(model).findings if f.code == "BN216"]
    assert found.severity == Severity.WARNING and found.paths == ("1",)
    assert found.evidence == (evidence,)
    frozen, _ = batchnorm.freeze(model, only=["1"])
    assert "BN216" not in {finding.code for finding in diagnose(frozen).findings}
    model.requires_grad_(False)
    assert [f.severity for f in diagnose(model).findings if f.code == "BN216"] == [Severity.NOTE]


@pytest.mark.parametrize("rule", load_rules(), ids=CODES)
def test_a_rule_documents_itself(rule) -> None:
    for name in ("title", "why", "evidence", "severity", "repair", "source"):
        text = getattr(rule, name)
        assert text and text == text.strip(), name
    compile(rule.repair, rule.code, "exec")
    assert "..." not in rule.repair + rule.repair_keras
    assert undefined(rule.repair) <= {*NAMES, "example_inputs"} and undefined(rule.repair_keras) <= NAMES


def test_a_page_is_made_from_each_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import rule_pages

    texts = rule_texts()
    assert list(texts) == CODES
    for rule in load_rules():
        assert {name: getattr(rule, name) for name in vars(texts[rule.code])} == vars(texts[rule.code])
        text = texts[rule.code].markdown()
        assert text.startswith(f"# {rule.code}: {rule.title}\n\n{rule.why}\n\n## Evidence\n")
        assert f"```py\n{rule.repair}\n```\n" in text and text.endswith(f"## Source\n\n{rule.source}\n")
        assert f"| [{rule.code}]({rule.code.lower()}.md) | {rule.title} |" in rule_pages.table()
