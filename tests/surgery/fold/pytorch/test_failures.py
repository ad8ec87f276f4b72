"""Folds that must be refused, mistakes, and failures in the middle, after which the model is as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.models import gate
from batchnorm.models.report import FoldError
from batchnorm.surgery.fold import fold
from batchnorm.surgery.fold.plan import FoldPlan
from batchnorm.surgery.fold.pytorch import folding
from tests.surgery.fold.pytorch.patterns import IMAGE
from tests.surgery.fold.pytorch.test_fold import assert_equal, trained


def test_a_weight_beyond_its_dtype_is_not_folded() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))).half()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(1e3)
        model[1].running_var.fill_(1e-4)
        model[1].running_mean.zero_()
    _, report = fold(model, torch.randn(2, 4, 5, 5).half() * 1e-3)
    assert report.remaining == 1
    assert "must be finite in torch.float16" in report.left[0].reason


def test_a_fold_with_a_large_error_is_refused_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.BatchNorm2d(3))
    )
    into = FoldPlan.backward.__func__

    def wrong(cls, network, node):
        plan = into(cls, network, node)
        for key, state in plan.states.items():
            if getattr(state, "weight", None) is None:
                continue
            if state.weight.shape[0] == 6:
                plan.states[key] = type(state)(**{**vars(state), "weight": state.weight * 1.01})
        return plan

    monkeypatch.setattr(FoldPlan, "backward", classmethod(wrong))
    folded, report = fold(model, torch.randn(IMAGE))
    assert [(row.path, row.now) for row in report.changed] == [("1", "fused with relu"), ("4", "in 3")]
    assert "folding it has an error of" in report.changed[0].reason
    assert_equal(folded, model, torch.randn(IMAGE))


def test_an_overflow_of_the_original_allows_no_error_elsewhere() -> None:
    own = torch.tensor([float("inf"), 1.0, 2.0])
    exact = torch.tensor([1e5, 1.0, 2.0], dtype=torch.float64)
    for overflows, value, allowed in [
        (True, 1.0, True),  # overflows in the same place
        (False, 1.0, True),  # or no longer
        (True, 1.5, False),
    ]:
        folded = torch.tensor([float("inf") if overflows else 1e5, value, 2.0])
        assert gate.Error.of(gate.Results([own], [folded], [exact])).allowed(1e-2) == allowed
    wrong = torch.tensor([2e5, 1.0, 2.0])
    assert not gate.Error.of(gate.Results([own], [wrong], [exact])).allowed(1e-2)
    overflow = gate.Results([exact], [own], [exact])
    assert not gate.Error.of(overflow).allowed(1e-2)


def test_a_wrong_result_is_an_error_that_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())).train()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(folding._Original, "compared", lambda *_: gate.Error(1e-7, 0.5))
    with pytest.raises(FoldError, match="must give the original's results, but its error against float64 is 5.0e-01"):
        fold(model, torch.randn(IMAGE), inplace=True)
    assert type(model) is nn.Sequential
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "inputs", "error", "text"),
    [
        (
            "net.pth",
            torch.randn(IMAGE),
            TypeError,
            "fold expects a torch.nn.Module, got str",
        ),
        (nn.BatchNorm2d(3), 3, TypeError, "example_inputs must be a tensor, a tuple of arguments or a dict"),
        (
            nn.BatchNorm2d(3),
            torch.randn(2, 4, 5, 5),
            ValueError,
            "inputs that the model takes, but calling it raised",
        ),
    ],
)
def test_a_wrong_argument_is_reported(model, inputs, error, text: str) -> None:
    with pytest.raises(error, match=text):
        fold(model, inputs)


def test_a_model_that_cannot_be_copied_is_reported() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    model.kept = (i for i in range(3))
    with pytest.raises(ValueError, match=r"fold expects a model that can be copied, got Sequential with TypeError"):
        fold(model, torch.randn(IMAGE))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (folding.tracing, "trace"), (folding.TorchProof, "compute"),
        (FoldPlan, "carry_out"), (folding.Emitter, "emit"), (folding._Original, "compared"),
        (folding, "counted"), (folding.walk, "copied"),
    ],
)  # fmt: skip
def test_a_failure_anywhere_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, inplace: bool
) -> None:
    class Noisy(nn.Module):
        """Draws random numbers, and keeps count of its calls in a buffer."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + 0.0 * torch.rand(1)

    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    model = trained(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), Noisy(), nn.Conv2d(6, 2, 1)))
    model[1].train()
    hook = model[2].register_forward_hook(lambda *_: None)
    x = torch.randn(IMAGE)
    state, tensors, given = copy.deepcopy(model.state_dict()), list(model.parameters()), x.clone()
    modes, random_state = [m.training for m in model.modules()], torch.get_rng_state()

    def fails(*_: object, **__: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(where, name, fails)
        with pytest.raises((MemoryError, ValueError), match="no memory"):
            fold(model, x, inplace=inplace)
    assert type(model) is nn.Sequential
    assert [m.training for m in model.modules()] == modes
    assert list(model[2]._forward_hooks) == [hook.id]
    assert all(p is q for p, q in zip(model.parameters(), tensors, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, given)
    folded, report = fold(model, x, inplace=inplace)  # and it can still be folded
    assert report.remaining == 0
    assert (folded is model) is inplace


def test_data_that_the_model_changes_in_place_stays() -> None:
    class Scales(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2.0)

    model, x = trained(nn.Sequential(Scales(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))), torch.randn(IMAGE)
    given = x.clone()
    folded, report = fold(model, x)
    assert report.remaining == 0
    assert torch.equal(x, given)
    with torch.no_grad():
        assert torch.allclose(folded(x.clone()), model(x.clone()), atol=1e-5)


WRITES = {
    "clamp_": lambda y: torch.clamp_(y, -0.1, 0.1),
    "exp_": torch.exp_,
    "hardtanh_": F.hardtanh_,
    "out": lambda y: torch.mul(y, 3.0, out=y),
    "out of a part": lambda y: torch.mul(y[:, :2], 3.0, out=y[:, :2]),
    "a list": lambda y: torch._foreach_mul_([y], 3.0),
    "item": lambda y: y.__setitem__((slice(None), 0), 0.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_tensors_that_functions_change_in_place_are_read_changed(name: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            WRITES[name](y)
            y = self.norm(y)
            WRITES[name](y)
            return self.out(y)

    model, x = trained(Writes()), torch.randn(IMAGE)
    folded, _ = fold(model, x)
    assert_equal(folded, model, x)
