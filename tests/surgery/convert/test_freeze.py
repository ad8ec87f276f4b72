"""freeze and unfreeze: nothing moves, whatever the mode, and everything is as before afterwards."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm.nn import act, batch, domain, frozen, ghost, renorm, sync
from batchnorm.surgery import convert, unfreeze
from batchnorm.surgery.convert import freeze, replacement

LAYERS: dict[str, Any] = {
    "torch": lambda: nn.BatchNorm2d(4, momentum=0.3, eps=1e-3),
    "torch_none": lambda: nn.BatchNorm2d(4, momentum=None, bias=False),
    "torch_plain": lambda: nn.BatchNorm2d(4, affine=False),
    "torch_sync": lambda: nn.SyncBatchNorm(4),
    "ours": lambda: batch.BatchNorm2d(4, momentum=0.3, on_nonfinite="skip"),
    "any_rank": lambda: batch.BatchNorm(4),
    "renorm": lambda: renorm.BatchRenorm2d(4, momentum=0.01, rmax=2.0),
    "ghost": lambda: ghost.GhostBatchNorm2d(4, ghost_size=3),
    "sync": lambda: sync.SyncBatchNorm(4),
    "fused": lambda: act.BatchNormAct2d(4, activation="silu"),
}


def network(make: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(), nn.ReLU())
    with torch.no_grad():
        for tensor in model[1].state_dict().values():
            tensor.uniform_(0.5, 2.0) if tensor.is_floating_point() else tensor.fill_(5)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    return {name: (id(t), t.clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = state(model)
    assert now.keys() == before.keys()
    for name, (identity, value, requires_grad) in before.items():
        assert now[name][0] == identity, name
        assert torch.equal(now[name][1], value), name
        assert now[name][2] == requires_grad, name


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_in_training_and_as_before_afterwards(name: str) -> None:
    model = network(LAYERS[name])
    layer, before, printed, attributes = model[1], state(model), repr(model), set(vars(model[1]))
    x = torch.randn(2, 3, 5, 5)
    expected = model.eval()(x)
    result = freeze(model.train(), inplace=True)
    assert result.model is model
    assert len(result.report.changed) == 1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for training in (True, False):
        y = model.train(training)(x)
        assert_close(y, expected)
        y.sum().backward()
    optimizer.step()
    assert [p.requires_grad for p in model[1].parameters()] == [False] * len(list(model[1].parameters()))
    assert all(p.grad is None for p in model[1].parameters())
    model.zero_grad()
    unfreeze(model.train(), inplace=True)
    assert model[1] is layer
    assert repr(model) == printed
    assert set(vars(layer)) == attributes
    assert_untouched(model, before)
    moved = model[1].running_mean.clone()
    if not isinstance(layer, nn.SyncBatchNorm):
        model(x)
        assert not torch.equal(model[1].running_mean, moved)


def test_a_copy_leaves_the_model_alone() -> None:
    model = network(LAYERS["torch"])
    before = state(model)
    frozen_model, report = freeze(model)
    assert type(model[1]) is nn.BatchNorm2d
    frozen_model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert_untouched(model, before)
    assert str(report).splitlines()[0] == "freeze: 1 changed, 0 left"
    back = unfreeze(frozen_model).model
    assert type(back[1]) is nn.BatchNorm2d
    assert back[1].weight.requires_grad
    assert type(frozen_model[1]) is frozen.FrozenBatchNorm2d


def test_gamma_and_beta_keep_training_if_asked() -> None:
    model = network(LAYERS["torch"])
    model[1].bias.requires_grad_(False)
    trains = freeze(model, trainable_affine=True).model
    assert (trains[1].weight.requires_grad, trains[1].bias.requires_grad) == (True, False)
    again = freeze(trains).report
    assert again.left[0].reason == (
        "it is frozen already, with trainable_affine=True: unfreeze it first to change that"
    )
    assert freeze(trains, trainable_affine=True).report.left[0].reason == "it is frozen already"
    back = unfreeze(freeze(model).model).model
    assert (back[1].weight.requires_grad, back[1].bias.requires_grad) == (True, False)


def test_settings_changed_while_frozen_are_kept() -> None:
    model = freeze(network(LAYERS["torch"])).model
    model[1].momentum = 0.7
    model[1].weight.requires_grad_(True)
    checkpoint = network(LAYERS["torch"]).state_dict()
    model.load_state_dict(checkpoint)
    back = unfreeze(model.eval().double()).model
    assert back[1].momentum == 0.7
    assert (back[1].weight.requires_grad, back[1].bias.requires_grad) == (True, True)
    assert not back[1].training
    assert back[1].running_var.dtype == torch.float64
    assert_close(
        dict(back.state_dict()), {k: v.double() if v.is_floating_point() else v for k, v in checkpoint.items()}
    )


def test_only_some_are_frozen() -> None:
    model = nn.ModuleDict({"stem": network(LAYERS["torch"]), "body": network(LAYERS["ours"])})
    freeze(model, only="stem.*", inplace=True)
    assert type(model["stem"][1]) is frozen.FrozenBatchNorm2d
    assert type(model["body"][1]) is batch.BatchNorm2d
    freeze(model, only=lambda path, layer: path.startswith("body"), inplace=True)
    unfreeze(model, only=["body.*"], inplace=True)
    assert type(model["stem"][1]) is frozen.FrozenBatchNorm2d
    assert type(model["body"][1]) is batch.BatchNorm2d
    with pytest.raises(ValueError, match=r"unfreeze expects `only` to match a layer, got 'head.\*', which m"):
        unfreeze(model, only="head.*")


def test_a_shared_layer_is_frozen_once() -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.Sequential(shared))
    freeze(model, inplace=True)
    assert model[0] is model[1][0]
    unfreeze(model, inplace=True)
    assert model[0] is model[1][0] is shared


def test_layers_that_cannot_be_frozen_are_left_and_reported() -> None:
    class Mine(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    apart = domain.DomainBatchNorm2d(4, num_domains=2)
    apart.running_mean[1] += 1
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), Mine(4), apart)
    _, report = freeze(model)
    assert [c.path for c in report.changed] == ["0"]
    reasons = [c.reason for c in report.left]
    assert reasons[0].startswith("FrozenBatchNorm2d expects track_running_stats=True, got False")
    assert reasons[1] == "its class Mine has its own forward, which would be lost"
    assert reasons[2].startswith("the rows of its running_mean differ")
    with pytest.raises(ValueError, match=r"freeze cannot change any layer; 0: FrozenBatchNorm1d expects track_running"):
        freeze(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (frozen.FrozenBatchNorm1d(3), batch.BatchNorm1d), (frozen.FrozenBatchNorm(3), batch.BatchNorm),
        (frozen.FrozenBatchNormAct3d(3, activation="gelu"), act.BatchNormAct3d),
    ],
    ids=["1d", "any", "act"],
)  # fmt: skip
def test_a_layer_that_was_made_frozen_becomes_one_that_trains(layer: nn.Module, expected: type[nn.Module]) -> None:
    new = unfreeze(nn.Sequential(layer)).model[0]
    assert type(new) is expected
    assert [p.requires_grad for p in new.parameters()] == [True, True]
    assert getattr(new, "activation", "none") == getattr(layer, "activation", "none")
    assert vars(new).keys() == vars(expected(3)).keys()


def test_frozen_models_copy_pickle_and_convert_back() -> None:
    model = freeze(network(LAYERS["renorm"])).model
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        back = unfreeze(again).model
        assert (type(back[1]), back[1].rmax, back[1].momentum) == (renorm.BatchRenorm2d, 2.0, 0.01)
        assert back[1].weight.requires_grad
    chained = freeze(convert(network(LAYERS["torch"]), to=ghost.GhostBatchNorm, ghost_size=3).model).model
    assert type(convert(chained, to=torch.nn).model[1]) is nn.BatchNorm2d
    assert convert(chained, to=torch.nn).model[1].weight.requires_grad
    assert unfreeze(chained).model[1].ghost_size == 3


def test_a_parametrized_weight_is_frozen_too() -> None:
    model = network(LAYERS["torch"])
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    before = model.eval()(torch.ones(1, 3, 2, 2))
    freeze(model, inplace=True)
    assert not any(p.requires_grad for p in model[1].parameters())
    assert_close(model.train()(torch.ones(1, 3, 2, 2)), before)
    unfreeze(model, inplace=True)
    assert all(p.requires_grad for p in model[1].parameters())
    assert nn.utils.parametrize.type_before_parametrizations(model[1]) is nn.BatchNorm2d


def test_a_third_party_model_fine_tunes_with_batches_of_one() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = transformers.ResNetForImageClassification(config).double().train()
    model(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    statistics = {k: v.clone() for k, v in model.named_buffers()}
    freeze(model, inplace=True)
    optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), lr=0.1)
    image, losses = torch.randn(1, 3, 16, 16, dtype=torch.float64), []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model.train()(image).logits, torch.tensor([2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in model.named_buffers():
        assert torch.equal(value, statistics[name]), name


@pytest.mark.parametrize("how", ["freeze", "convert", "attribute"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
    ids=["SGD", "AdamW", "RMSprop"],
)
def test_an_optimizer_does_not_move_what_was_frozen_in_training(optimizer: Any, how: str) -> None:
    layer = batch.BatchNorm2d(4) if how != "attribute" else frozen.FrozenBatchNorm2d(4, trainable_affine=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    optimizer = optimizer(model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(2, 3, 5, 5)).pow(3).sum().backward()
        optimizer.step()

    step()
    if how == "freeze":
        freeze(model, inplace=True)
    elif how == "convert":
        convert(model, to=frozen.FrozenBatchNorm, inplace=True)
    else:
        layer.trainable_affine = False
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "0.bias"}
    assert model[1].weight.grad is None
    assert model[1].bias.grad is None


def test_the_report_says_what_an_optimizer_holds() -> None:
    model = network(LAYERS["ours"])
    (note,) = freeze(model, inplace=True).report.notes
    assert note.startswith("Parameters that no longer train: 2. They have no gradient")
    (note,) = unfreeze(model, inplace=True).report.notes
    assert note.startswith("Parameters that train now but did not before: 2; removed: 0.")
    assert convert(model, to=torch.nn, inplace=True).report.notes == ()
    (note,) = convert(
        model, to=domain.DomainBatchNorm, num_domains=2, affine_per_domain=True, inplace=True
    ).report.notes
    assert note.startswith("Parameters that train now but did not before: 2; removed: 2.")
    report = convert(model, to=nn.Identity, inplace=True).report
    assert "did not before: 0; removed: 2. Pass the first" in str(report)
    assert freeze(network(LAYERS["ours"])).report.notes == ()  # no optimizer holds the parameters of a copy
    assert freeze(network(LAYERS["ours"]), trainable_affine=True, inplace=True).report.notes == ()


def test_a_failure_restores_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(batch.BatchNorm2d(4), batch.BatchNorm2d(4))
    model(torch.randn(2, 4, 3, 3)).pow(3).sum().backward()
    before = [p.grad for p in model.parameters()]
    commit = replacement.Replacement.commit

    def failing(self: Any, *args: Any) -> nn.Module:
        commit(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(replacement.Replacement, "commit", failing)
    with pytest.raises(KeyboardInterrupt):
        freeze(model, inplace=True)
    assert all(p.grad is grad and p.requires_grad for p, grad in zip(model.parameters(), before, strict=True))
