"""`drop_redundant_bias`: the same outputs in both modes, with fewer parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.surgery.accelerate.accelerate import accelerate
from batchnorm.surgery.redundant_bias import drop_redundant_bias
from tests.surgery import networks


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """With statistics, biases and affine parameters that are not those of a new model."""
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    for _ in range(3):
        model(x)
    return model


def assert_same_function(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    assert_close(ours.eval()(x), theirs.eval()(x))
    assert_close(ours.train()(x), theirs.train()(x))
    assert_close(ours.eval()(x), theirs.eval()(x))  # and after the statistics moved


@pytest.mark.parametrize(
    ("make", "shape", "dropped"),
    [
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (3, 8), ["0"]),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), bn.BatchNorm2d(4)), (4, 6, 6), ["0"]),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)), (3, 4, 4), ["0"]),
        (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), bn.BatchNormAct3d(4, activation="silu")), (3, 5, 5, 5), ["0"]),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (3,), ["0"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)), (3, 6, 6), ["0"]),
        (
            lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Identity(), bn.BatchNorm(4)),
            (3, 6, 6),
            ["0.0"],
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (3, 6, 6), []),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (3, 6, 6), []),
        (networks.ResNet, (3, 12, 12), ["layer2.0.downsample.0"]),
        (
            networks.Network3d,
            (3, 6, 6, 6),
            [f"blocks.{i}.{part}" for i in range(2) for part in ("shortcut.0", "body.0", "body.3")] + ["fc1"],
        ),
    ],
    ids=["1d", "grouped", "transposed", "3d", "linear", "no affine", "identity", "relu", "no bias", "resnet", "3d net"],
)
def test_outputs_stay_in_both_modes(make: Any, shape: tuple[int, ...], dropped: list[str]) -> None:
    x = torch.randn(4, *shape, dtype=torch.float64)
    model = trained(make(), x)
    before = sum(p.numel() for p in model.parameters())
    fewer, report = drop_redundant_bias(model, example_inputs=x)
    assert [change.path for change in report.changed] == dropped
    assert report.left == ()
    for path in dropped:
        assert fewer.get_submodule(path).bias is None
        assert f"{path}.bias" not in fewer.state_dict()
        assert model.get_submodule(path).bias is not None
    assert (sum(p.numel() for p in fewer.parameters()) < before) == bool(dropped)
    assert_same_function(fewer, model, x)


def test_the_present_mode_of_the_model_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    for inputs in (None, torch.randn(4, 3, 6, 6)):
        fewer, report = drop_redundant_bias(model, example_inputs=inputs)
        assert [change.path for change in report.changed] == ["0"]
        assert not any(module.training for module in fewer.modules())


def test_without_running_statistics() -> None:
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).double()
    fewer, report = drop_redundant_bias(model)
    assert len(report.changed) == 1
    assert_same_function(fewer, model, x)


def test_before_and_after_acceleration() -> None:
    x = torch.randn(4, 3, 6, 6, 6, dtype=torch.float64)
    model = trained(networks.Network3d(), x)
    both = [
        drop_redundant_bias(accelerate(model, x).model, example_inputs=x).model,
        accelerate(drop_redundant_bias(model, example_inputs=x).model, x).model,
    ]
    for ours in both:
        assert sum(getattr(m, "bias", 0) is None for m in ours.modules()) == 7
        assert any("_rewrite" in vars(type(m)) for m in ours.modules())
        assert_close(ours.eval()(x), model.eval()(x))


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.fc, self.norm1d = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "two consumers":
            y = self.conv(x)
            return self.norm(y) + y
        if self.kind == "called twice":
            return self.norm(self.conv(self.conv(x)))
        if self.kind == "two layers":
            return self.norm(self.conv(x)) + self.norm2(self.conv(x * 2))
        if self.kind == "read":
            return self.norm(self.conv(x)) + self.conv.bias.sum()
        if self.kind == "by mode":
            return self.norm(self.conv(x)) if self.training else F.relu(self.conv(x))
        if self.kind == "shapes":
            return self.norm(self.conv(x)) if x.shape[2] > 1 else self.conv(x)
        return self.norm1d(self.fc(x[:, :, :, 0]))  # [N, 5, 5]: channels are not the features


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("two consumers", "the bias of conv has other uses too"),
        ("called twice", "the bias of conv has other uses too"),
        ("two layers", "the bias of conv has other uses too"),
        ("read", "the bias of conv has other uses too"),
        ("by mode", "the model (Net) does not compute the same in training and in evaluation"),
        ("shapes", "the model (Net) branches on shapes or values in its forward"),
        ("features last", "its output is not [N, C] in the example, so its features are not the layer's channels"),
    ],
)
def test_biases_with_an_effect_stay(kind: str, reason: str) -> None:
    model = Net(kind).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) if kind != "features last" else torch.randn(4, 5, 5, 1).double()
    fewer, report = drop_redundant_bias(model, example_inputs=x)
    assert report.changed == ()
    assert reason in [change.reason for change in report.left]
    assert fewer.state_dict().keys() == model.state_dict().keys()
    assert_same_function(fewer, model, x)


class KeepsEvaluation(nn.Sequential):
    """Keeps its normalization in evaluation, as detectors with `norm_eval` do."""

    def train(self, mode: bool = True) -> KeepsEvaluation:
        super().train(mode)
        self[1].eval()
        return self


class ByRunning(nn.BatchNorm2d):
    """Normalizes by the running statistics in its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def in_evaluation() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].eval()
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: bn.freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).model, "is frozen"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), bn.FrozenBatchNorm2d(4, trainable_affine=True)), "is frozen"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), bn.nn.FrozenBatchNormAct2d(4)), "is frozen"),
        (lambda: KeepsEvaluation(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "stays in evaluation mode in training"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ByRunning(4)), "ByRunning, has its own forward"),
        (in_evaluation, "stays in evaluation mode in training"),
    ],
    ids=["freeze", "frozen", "frozen act", "train overridden", "own forward", "eval within training"],
)
def test_a_bias_that_nothing_subtracts_stays(make: Any, reason: str, training: bool) -> None:
    model = make().train() if make is not in_evaluation else make()
    x = torch.randn(4, 3, 6, 6)
    model(x).square().sum().backward()
    assert model[0].bias.grad.abs().max() > 0.1
    if make is not in_evaluation:  # in an evaluated model, only its `train` tells which layers stay as they are
        model.train(training)
    modes = [module.training for module in model.modules()]
    for inputs in (None, x):
        fewer, report = drop_redundant_bias(model, example_inputs=inputs)
        assert not report.changed
        assert [change.path for change in report.left] == ["0"]
        assert reason in report.left[0].reason
        assert fewer[0].bias is not None
        assert [module.training for module in model.modules()] == modes
    assert "BN110" not in [finding.code for finding in bn.diagnose(model).findings]


@pytest.mark.parametrize(
    "norm",
    [
        lambda: bn.BatchRenorm2d(4, rmax=1.5, dmax=0.5),
        lambda: bn.GhostBatchNorm2d(4, ghost_size=2),
        lambda: bn.SyncBatchNorm(4),
        lambda: bn.DecorrelatedBatchNorm2d(4, group_size=2),
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
    ],
    ids=["renorm", "ghost", "sync", "decorrelated", "no running statistics"],
)
def test_every_layer_that_subtracts_the_mean_of_a_batch_makes_the_bias_redundant(norm: Any) -> None:
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm()), x)
    fewer, report = drop_redundant_bias(model)
    assert [change.path for change in report.changed] == ["0"]
    assert_same_function(fewer, model, x)
    assert not report.left


def test_linear_layers_wait_for_example_inputs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    report = drop_redundant_bias(model).report
    assert report.changed == ()
    assert report.left[0].reason == "only example_inputs show whether its output is [N, C] or [N, L, C]"


def test_shared_hooked_and_parametrized_ones_stay() -> None:
    conv = nn.Conv2d(3, 3, 1)
    tied = nn.Sequential(conv, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    tied[2].bias = conv.bias
    shared = nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.BatchNorm2d(3)))
    hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    hooked[0].register_forward_hook(lambda m, a, y: y)
    parametrized = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    nn.utils.parametrize.register_parametrization(parametrized[0], "bias", nn.Tanh())
    for model in (tied, shared, hooked, parametrized):
        report = drop_redundant_bias(model, inplace=True).report
        assert report.changed == ()
        assert report.left


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizer_forgets_the_biases_and_goes_on(kind: Any) -> None:
    def run(drop: bool) -> tuple[list[float], int]:
        torch.manual_seed(0)
        model = networks.Network3d().double()
        groups = [{"params": list(m.parameters())} for m in (model.blocks, model.fc1, model.bn, model.fc2)]
        optimizer = kind(groups, lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        losses = []
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            x = torch.randn(6, 3, 6, 6, 6, generator=generator, dtype=torch.float64)
            if drop and step == 3:
                drop_redundant_bias(model, optimizer, example_inputs=x[:2], inplace=True)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert set(optimizer.state) == set(held)
        return losses, len(held)

    (losses, fewer), (expected, all_of_them) = run(True), run(False)
    assert all_of_them - fewer == 7
    assert_close(losses, expected, rtol=0, atol=1e-8)


def test_named_parameters_keep_their_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    drop_redundant_bias(model, optimizer, inplace=True)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight", "1.bias"]


def test_wrong_arguments() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="drop_redundant_bias expects a torch.nn.Module, got list"):
        drop_redundant_bias([model])
    with pytest.raises(ValueError, match="expects inplace=True with an optimizer, got inplace=False"):
        drop_redundant_bias(model, optimizer)
    with pytest.raises(TypeError, match=r"expects a torch\.optim\.Optimizer .*, got Tensor\. .* as example_inputs="):
        drop_redundant_bias(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="holds none of its parameters"):
        drop_redundant_bias(networks.ResNet(), optimizer, inplace=True)
    with pytest.raises(ValueError, match=r"takes, got a tensor \[2, 5\] of torch.float32"):
        drop_redundant_bias(model, example_inputs=torch.randn(2, 5), inplace=True)
    assert model[0].bias is not None


class Reads(nn.Module):
    """Uses the bias of a module within, which no graph of that module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.block[0].bias
        return self.block(x) if bias is None else self.block(x) + bias.sum()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_changed_output_undoes_everything(inplace: bool) -> None:
    model = Reads()
    with torch.no_grad():
        model.block[0].bias.fill_(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bias, before = model.block[0].bias, {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="whose output changed by .* the model is unchanged"):
        drop_redundant_bias(
            model, optimizer if inplace else None, example_inputs=torch.randn(2, 3, 4, 4), inplace=inplace
        )
    assert model.block[0].bias is bias
    assert list(model.state_dict()) == list(before)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert model.training
