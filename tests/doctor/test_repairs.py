"""Every fix is code that runs as pasted, and removes its finding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm import walk
from batchnorm.doctor import Finding, Severity, diagnose
from batchnorm.doctor.report.page import is_code
from batchnorm.doctor.rules import load_rules
from batchnorm.doctor.wording import example_as_code, loader_as_code, samples_as_code
from tests.doctor.case import Case
from tests.doctor.cases import PLANTED, four_processes
from tests.doctor.defective import Sequences
from tests.doctor.measure.test_padding import Masked, of_photographs, with_labels
from tests.doctor.networks import Plain, batches, criterion, train, trained

Names = dict[str, Any]
CODES = [rule.code for rule in load_rules()]


def planted(code: str) -> tuple[Case, Finding]:
    """Return a case, and the worst finding of its rule."""
    case = PLANTED[code]()
    with case.around():
        found = diagnose(case.model, case.data, **case.options)
    return case, next(finding for finding in found.findings if finding.code == code)


def pasted(finding: Finding, model: nn.Module, training_data: Any) -> Names:
    """Run the fix with the user's objects under the names that it uses; return all names afterwards."""
    names = {"batchnorm": batchnorm, "torch": torch, "model": model, "training_data": training_data or batches(4)}
    exec(compile(finding.repair, finding.code, "exec"), names)
    return names


def left(code: str, model: nn.Module, data: Any, **options: Any) -> list[Finding]:
    return [finding for finding in diagnose(model, data, **options).findings if finding.code == code]


def above_notes(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity > Severity.NOTE]


# The fixes of these rules have tests of their own, here or in `test_mistakes`. The others change the model, after which
# their rule finds nothing.
OWN_TESTS = {
    "BN101", "BN102", "BN103", "BN104", "BN105", "BN108", "BN109", "BN111", "BN112", "BN113", "BN114", "BN115", "BN116",
    "BN201", "BN203", "BN206", "BN209", "BN210", "BN212", "BN213", "BN214", "BN215", "BN216", "BN217",
}  # fmt: skip


@pytest.mark.parametrize("code", [code for code in CODES if code not in OWN_TESTS])
def test_after_the_fix_nothing_is_found(code: str) -> None:
    case, finding = planted(code)
    model = pasted(finding, case.model, case.data)["model"]
    assert not left(code, model, case.data, **case.options)


# A note stays: there is always some gap, and no update was counted.
@pytest.mark.parametrize("code", ["BN102", "BN216"])
def test_after_the_fix_there_is_nothing_above_a_note(code: str) -> None:
    case, finding = planted(code)
    model = pasted(finding, case.model, case.data)["model"]
    assert not above_notes(left(code, model, case.data, **case.options))
    assert not above_notes(left("BN101", model, case.data, **case.options))


def test_the_gap_names_its_causes_whose_repairs_close_it() -> None:
    case, finding = planted("BN101")
    assert not finding.repair and finding.causes == ("BN102",) and finding.summary.endswith("by BN102")
    _, cause = planted("BN102")
    model = pasted(cause, case.model, case.data)["model"]
    assert not above_notes(left("BN101", model, case.data, **case.options))


def test_a_gap_without_a_cause_is_repaired_by_its_own() -> None:
    model, data = trained("plain"), [x for x, _ in batches()]
    last = model.blocks[5][1]
    last.running_mean -= 0.24 * last.running_var.sqrt()  # less than the rule reports, in every channel
    (finding,) = left("BN101", model, data)
    assert is_code(finding.repair) and not left("BN102", model, data)
    assert not left("BN101", pasted(finding, model, data)["model"], data)


def test_larger_batches_are_less_noisy() -> None:
    case, finding = planted("BN104")
    names = pasted(finding, case.model, case.data)
    assert all(isinstance(f.module, batchnorm.SyncBatchNorm) for f in walk.norm_layers(names["model"]))
    size = finding.figures["batch_size_needed"]
    x, y = (torch.cat(part) for part in zip(*batches(24), strict=True))
    data = list(zip(x.split(size), y.split(size), strict=True))[: len(x) // size]
    assert not above_notes(left("BN104", trained("plain"), data, loss=criterion))


def test_a_last_batch_of_one_is_dropped() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    dataset = TensorDataset(torch.randn(193, 4))
    (finding,) = left("BN104", model, DataLoader(dataset, 64), max_samples=None)
    loader = pasted(finding, model, DataLoader(dataset, 64))["loader"]
    assert not left("BN104", model, loader, max_samples=None)


def test_a_last_batch_of_one_is_normalized_by_the_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    loader = DataLoader(TensorDataset(torch.randn(193, 4)), 64)
    (finding,) = left("BN104", model, loader, max_samples=None)
    repair = finding.repair.partition("# or: ")[2]
    names = {"batchnorm": batchnorm, "model": model}
    exec(repair, names)
    assert not left("BN104", names["model"], loader, max_samples=None)
    alone = DataLoader(TensorDataset(torch.randn(3, 4)), 1)
    assert left("BN104", names["model"], alone)[0].severity == Severity.ERROR


def test_shuffled_batches_are_independent() -> None:
    case, finding = planted("BN105")
    names = pasted(finding, case.model, case.data)
    assert not left("BN105", names["model"], names["loader"], **case.options)


def test_columns_standardized_in_float64_do_not_cancel() -> None:
    case, finding = planted("BN108")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1024, 8, generator=generator, dtype=torch.float64)
    rows[:, 3] = 1.7e9 + 1000 * rows[:, 3]
    names = pasted(finding, case.model, None)
    standardizer = batchnorm.Standardizer().fit(rows)
    assert "batchnorm.Standardizer().fit(data)" in finding.repair
    x = standardizer.transform(rows).float()
    data = [(part, part[:, :1] * 0) for part in x.split(128)]
    model, _ = batchnorm.recalibrate(names["model"], data)
    assert not left("BN108", model, data, **case.options)


def test_a_module_in_several_places_has_statistics_for_each() -> None:
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(8, momentum=None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), shared, nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), shared, nn.Flatten())
    with torch.no_grad():
        model[3].weight.mul_(4)
    data = [x for x, _ in batches()]
    for x in data:
        model(x)
    (finding,) = left("BN109", model, data)
    assert above_notes([finding])
    assert not left("BN109", pasted(finding, model, data)["model"], data)


def test_without_batch_statistics_nothing_leaks() -> None:
    case, finding = planted("BN112")
    names = pasted(finding, case.model, case.data)
    assert not walk.norm_layers(names["model"])
    assert isinstance(names["loader"].sampler, torch.utils.data.RandomSampler)
    train(names["model"], 2)


class MaskedSequences(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        mask = (x != 0).any(1)
        for layer in self.body:
            if isinstance(layer, nn.Conv1d):
                x = layer(x)
                mask = mask[:, :: layer.stride[0]]
            else:
                x = layer(x, mask=mask) if isinstance(layer, nn.BatchNorm1d) else layer(x)
        return self.head(x.mean(2))


def test_masks_keep_padding_of_sequences_out() -> None:
    case, finding = planted("BN113")
    names = pasted(finding, case.model, case.data)
    assert left("BN113", names["model"], case.data, **case.options)
    names["model"].__class__ = MaskedSequences
    assert not left("BN113", names["model"], case.data, **case.options)


def test_masks_keep_padding_of_images_out() -> None:
    torch.manual_seed(0)
    model, data = Plain(), with_labels(of_photographs())
    (finding,) = left("BN113", model, data, loss=criterion)
    names = pasted(finding, model, data)
    assert left("BN113", names["model"], data, loss=criterion)
    names["model"].blocks.__class__ = Masked
    assert not left("BN113", names["model"], data, loss=criterion)


def test_autocast_to_bfloat16_does_not_overflow() -> None:
    case, finding = planted("BN114")
    names = pasted(finding, case.model, case.data)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch[0])

    assert not left("BN114", names["model"], batches(), forward=forward, loss=case.options["loss"])


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=0.05),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
])  # fmt: skip
def test_the_optimizer_comes_back_without_decay_of_the_layers(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = trained("plain")
    (finding,) = left("BN203", model, None, optimizer=(optimizer := make(model.parameters())))
    again = pasted(finding, model, None)["optimizer"]
    assert again.defaults == optimizer.defaults | {"weight_decay": again.defaults["weight_decay"]}
    assert {group["weight_decay"] for group in again.param_groups} == {0.0, optimizer.defaults["weight_decay"]}
    assert not left("BN203", model, None, optimizer=again)


def test_groups_keep_weight_decay_from_killing_channels() -> None:
    case, finding = planted("BN206")
    optimizer = torch.optim.SGD(pasted(finding, case.model, None)["groups"], lr=0.1)
    assert not left("BN203", case.model, None, optimizer=optimizer)


@pytest.mark.parametrize("code", ["BN212", "BN213"])
def test_folded_away_nothing_is_left(code: str) -> None:
    case, finding = planted(code)
    x = batches(1)[0][0]
    folded = pasted(finding, case.model, None)["folded"]
    assert not walk.norm_layers(folded)
    assert torch.allclose(folded.eval()(x), case.model.eval()(x), atol=1e-4)


def test_synchronized_layers_share_their_batch() -> None:
    case, finding = planted("BN214")
    model = pasted(finding, case.model, case.data)["model"]
    with case.around():
        assert not left("BN214", model, case.data, **case.options)


def test_broadcast_parameters_are_those_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    case, finding = planted("BN215")
    sent: list[int] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append(tensor.data_ptr()))
    with four_processes():
        model = pasted(finding, case.model, None)["model"]
    held = {tensor.data_ptr() for tensor in (*case.model.parameters(), *case.model.buffers())}
    assert set(sent) == held
    assert all(isinstance(f.module, batchnorm.SyncBatchNorm) for f in walk.norm_layers(model))


def test_passes_that_must_not_count_do_not() -> None:
    model = trained("plain")

    def twice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]) + model(batch[0].flip(3))

    (finding,) = left("BN106", model, batches(4, 32), forward=twice)
    model = pasted(finding, model, None)["model"]
    assert left("BN106", model, batches(4, 32), forward=twice)

    def once(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        y = model(batch[0])
        with batchnorm.update_running_stats(model, False):
            return y + model(batch[0].flip(3))

    assert not left("BN106", model, batches(4, 32), forward=once)


def test_layers_that_train_on_fixed_statistics_are_recalibrated() -> None:
    model = trained("plain")
    for layer in walk.norm_layers(model):
        layer.module.eval()
    (finding,) = left("BN107", model, None)
    assert finding.severity == Severity.NOTE
    train(model.train(False).train(), 5, lr=0.2)
    repaired = pasted(finding, model, batches())["model"]
    assert not above_notes(left("BN102", repaired, batches(), loss=criterion))


@pytest.mark.parametrize("code", ["BN209", "BN210"])
def test_a_fix_without_code_says_what_to_change(code: str) -> None:
    _, finding = planted(code)
    assert finding.repair and not is_code(finding.repair)


X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


@pytest.mark.parametrize("data", [
    [X[:4], X[4:]],
    [(X[:4], Y[:4]), (X[4:], Y[4:])],
    [{"x": X[:4], "y": Y[:4]}, {"x": X[4:], "y": Y[4:]}],
    DataLoader(TensorDataset(X, Y), 4),
], ids=["tensors", "tuples", "dicts", "loader"])  # fmt: skip
def test_a_loader_of_all_samples_is_made_from_batches(data: Any) -> None:
    names = {"torch": torch, "training_data": data}
    exec(loader_as_code(samples_as_code(data, next(iter(data)))), names)
    (batch,) = names["loader"]
    x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list) else batch
    assert torch.equal(x[x[:, 0].argsort()], X)


@pytest.mark.parametrize("given", [
    (torch.ones(2, 3),), (torch.ones(2, dtype=torch.float64), torch.ones((), dtype=torch.int64)),
], ids=["one", "two"])  # fmt: skip
def test_an_example_has_the_shapes_and_types_of_the_arguments(given: tuple[Tensor, ...]) -> None:
    def described(*tensors: Tensor) -> list[Any]:
        return [(x.shape, x.dtype) for x in tensors]

    found = eval(example_as_code(given))
    assert described(*(found if isinstance(found, tuple) else (found,))) == described(*given)
    named = eval(example_as_code(given, ["a", "b"][: len(given)]))
    assert described(*named.values()) == described(*given) and "a" in named
    assert example_as_code([*given, None]) == example_as_code([]) == "example_inputs"


def test_every_fix_is_tested() -> None:
    here = Path(__file__)
    text = here.read_text(encoding="utf-8") + here.with_name("mistakes.py").read_text(encoding="utf-8")
    assert set(CODES) >= OWN_TESTS
    assert not [code for code in OWN_TESTS if text.count(f'"{code}"') < 2]
