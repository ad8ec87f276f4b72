"""Pruning removes channels exactly where γ is zero, and leaves the others with the reason."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm import walk
from batchnorm.models.gate import TOLERANCE, relative
from batchnorm.nn import BatchNormAct2d
from batchnorm.surgery.prune import PruneError, PruneReport, prune_channels
from tests.surgery.networks import NETWORKS, network


def vgg() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.SiLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(12 * 4, 10), nn.BatchNorm1d(10), nn.PReLU(10), nn.Linear(10, 4, bias=False)]
    return nn.Sequential(*layers, *head).double(), torch.randn(4, 3, 14, 14).double()


def transformers_resnet() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[12, 16], depths=[2, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config).double(), torch.randn(2, 3, 16, 16).double()


class Excited(nn.Module):
    """A gate multiplies the channels, and the network's second input shifts them all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), BatchNormAct2d(8)
        self.squeeze, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.out = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        gate = torch.sigmoid(self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.out(x * gate)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{name: (lambda name=name: network(name)) for name in NETWORKS},
    "vgg": vgg,
    "excited": lambda: (Excited().double(), torch.randn(2, 3, 9, 9).double()),
    "transformers": transformers_resnet,
    "depthwise": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.GELU(),
            nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), nn.Softplus(),
            nn.ConvTranspose2d(12, 12, 1, groups=12), nn.Conv2d(12, 4, 1, bias=False),
        ).double(),
        torch.randn(2, 3, 7, 7).double(),
    ),
    "transposed": lambda: (
        nn.Sequential(
            nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
            nn.ConvTranspose2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, 2),
        ).double(),
        torch.randn(2, 3, 5, 5).double(),
    ),
    "channels last": lambda: (
        nn.Sequential(
            nn.Linear(4, 8), batchnorm.nn.BatchNorm1d(8, channel_dim=-1), nn.GELU(), nn.Linear(8, 3),
        ).double(),
        torch.randn(3, 6, 4).double(),
    ),
    "sequences": lambda: (
        nn.Sequential(
            nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6),
            nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3),
        ).double(),
        torch.randn(3, 4, 20).double(),
    ),
}  # fmt: skip


def slimmed(model: nn.Module, zeros: float = 0.4, *, negative: bool = True, seed: int = 0) -> nn.Module:
    """Give the model the statistics and parameters of a trained one, and some γ = 0, with β < 0 or any β."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (found.module for found in walk.norm_layers(model)):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            layer.weight.uniform_(0.5, 1.5, generator=generator)
            layer.bias.normal_(generator=generator)
            which = torch.rand(layer.num_features, generator=generator) < zeros
            layer.weight[which] = 0
            if negative:
                layer.bias[which] = -layer.bias[which].abs()
    return model


def made(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = NETS[name]()
    return slimmed(model, **options), x


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, x: Tensor, *, training: bool = False) -> float:
    results = []
    for each in (model, other):
        torch.manual_seed(1)
        found = copy.deepcopy(each).train(training)(x)
        results.append(found if isinstance(found, Tensor) else found.logits)
    return relative(*results)


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (path, module.training, dict(module._forward_hooks), {k: v for k, v in vars(module).items() if k[0] != "_"})
        for path, module in model.named_modules()
    ]


def removed(model: nn.Module, pruned: nn.Module) -> dict[str, Tensor]:
    """Return for each layer which channels are missing, by their means, which are all different."""
    before, after = ({f.path: f.module for f in walk.norm_layers(m)} for m in (model, pruned))
    return {path: ~torch.isin(before[path].bias, after[path].bias) for path in before}


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "negative"),
    [*((name, True) for name in NETS), *((name, False) for name in NETS if name not in ("transformers", "unet", "3d"))],
)
def test_removing_channels_with_zero_gamma_changes_nothing(name: str, negative: bool) -> None:
    model, x = made(name, negative=negative)
    before, values = state(model), {key: value.clone() for key, value in model.state_dict().items()}
    pruned, report = prune_channels(model, x)
    assert state(model) == before and all(torch.equal(values[key], v) for key, v in model.state_dict().items())
    assert report.changed and report.channels < report.channels_before
    assert error(model, pruned, x) < TOLERANCE["float64"]
    assert error(model, pruned, torch.randn_like(x)) < TOLERANCE["float64"]
    assert report.difference < TOLERANCE["float64"]
    assert type(pruned) is type(model) and pruned.training == model.training
    assert report.parameters == sum(p.numel() for p in pruned.parameters()) < report.parameters_before
    for path, which in removed(model, pruned).items():
        layer = pruned.get_submodule(path)
        sizes = {len(t) for t in (*layer.parameters(), *layer.buffers()) if t.dim()}
        assert sizes == {layer.num_features} == {int((~which).sum())}
    copy.deepcopy(pruned).load_state_dict(pruned.state_dict())


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "vgg", "3d"])
def test_the_pruned_network_trains_as_the_original(name: str) -> None:
    model, x = made(name)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    pruned, report = prune_channels(model, x)
    assert report.changed
    assert error(model, pruned, x, training=True) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_memory_format_and_trained_parameters_are_kept(dtype: torch.dtype) -> None:
    model, x = made("resnet")
    model = model.to(dtype).to(memory_format=torch.channels_last)
    model.layer1[1].conv2.weight.requires_grad_(False)
    pruned, report = prune_channels(model, x.to(dtype))
    assert report.changed
    weight = pruned.layer1[1].conv2.weight
    assert weight.dtype == dtype and not weight.requires_grad and weight.shape[1] < 8
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_constant_goes_into_the_bias_or_the_running_mean() -> None:
    for bias in (True, False):
        for norm in (True, False):
            after = nn.BatchNorm2d(5) if norm else nn.Identity()
            model = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 5, 3, bias=bias), after
            )
            slimmed(model.double())
            pruned, report = prune_channels(model, x := torch.randn(2, 3, 9, 9).double())
            assert error(model, pruned, x) < TOLERANCE["float64"]
            assert (pruned[3].bias is not None) == (bias or not norm)
            assert any("new biases" in note for note in report.notes) == (not bias and not norm)
            if norm:
                assert torch.equal(pruned[4].running_mean, model[4].running_mean) == bias


def test_channels_that_are_added_are_removed_together() -> None:
    model, x = made("resnet", zeros=0.0)
    layers = [model.bn1, model.layer1[0].bn2, model.layer1[1].bn2]
    with torch.no_grad():
        for layer in layers:
            layer.weight[2], layer.bias[2] = 0, -1
        layers[0].weight[5] = layers[1].weight[5] = 0
    pruned, report = prune_channels(model, x)
    assert next(which.nonzero().tolist() for which in removed(model, pruned).values()) == [[2]]
    assert {change.path for change in report.changed} == {"bn1", "layer1.0.bn2", "layer1.1.bn2"}
    assert pruned.layer2[0].downsample[0].in_channels == pruned.layer1[0].conv1.in_channels == 7
    assert all("1 with small γ stay: their values vary" in change.reason for change in report.changed[:2])
    assert not report.changed[2].reason
    assert error(model, pruned, x) < TOLERANCE["float64"]


def test_each_layer_keeps_a_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    slimmed(model.double(), zeros=1.1)
    pruned, report = prune_channels(model, x := torch.randn(2, 3, 7, 7).double())
    assert pruned[1].num_features == pruned[0].out_channels == pruned[3].in_channels == 1
    assert error(model, pruned, x) < TOLERANCE["float64"]
    assert "keeps at least one" in report.changed[0].reason


# Small γ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vgg", "excited", "densenet"])
def test_removing_small_gammas_equals_masking_them(name: str) -> None:
    model, x = made(name, zeros=0.0)
    with torch.no_grad():
        for found in walk.norm_layers(model):
            if name != "vgg":
                found.module.bias.abs_().neg_()
    pruned, report = prune_channels(model, x, threshold=0.8)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for path, which in removed(model, pruned).items():
            weight = masked.get_submodule(path).weight
            weight[which & (weight <= 0.8)] = 0
    assert report.changed and report.difference > 1e-3
    assert math.isclose(error(model, pruned, x), report.difference, rel_tol=0.9)
    assert error(masked, pruned, x) < 1e-11


def test_with_zero_padding_the_constant_is_right_inside() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1),
    )  # fmt: skip
    slimmed(model.double())
    with torch.no_grad():
        model[4].weight.fill_(1)
    x = torch.randn(2, 3, 14, 14).double()
    _, report = prune_channels(model, x)
    assert not report.changed and "vary at conv2d in 5" in report.left[0].reason
    pruned, report = prune_channels(model, x, threshold=0.0)
    assert report.changed and report.difference > 1e-3
    a, b = model.eval()(x), pruned.eval()(x)
    assert relative(b[..., 2:-2, 2:-2], a[..., 2:-2, 2:-2]) < 1e-12
    assert report.difference == pytest.approx(error(model, pruned, x), rel=0.9)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_share_removes_the_smallest_of_all_layers(share: float) -> None:
    model, x = made("vgg", zeros=0.0)
    pruned, report = prune_channels(model, x, share=share)
    gone = removed(model, pruned)
    assert sum(int(which.sum()) for which in gone.values()) == round(share * (8 + 12 + 10 - 3))
    gammas = {path: model.get_submodule(path).weight.detach() for path in gone}
    smallest_kept = min(float(gammas[path][~which].min()) for path, which in gone.items() if not which.all())
    if share < 0.9:  # otherwise some layers keep their last channel
        assert max(float(gammas[path][which].max()) for path, which in gone.items() if which.any()) < smallest_kept
    assert report.channels_before - report.channels == round(share * 27)


def test_share_works_if_all_gammas_are_equal() -> None:
    torch.manual_seed(0)
    model, x = NETS["mobilenet"]()
    _, report = prune_channels(model, x, share=0.5)
    assert 0.3 < 1 - report.channels / report.channels_before < 0.7


def test_only_chooses_the_layers() -> None:
    model, x = made("resnet")
    _, report = prune_channels(model, x, only="layer2.*")
    assert {change.path for change in report.changed} == {"layer2.0.bn1", "layer2.1.bn1"}
    assert all(change.path.startswith("layer2.") for change in report.left)


# Channels that stay ---------------------------------------------------------------------------------------------------


def chain(norm: nn.Module, *after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), *after)


class Called(nn.Module):
    """A convolution, batch normalization and a function of the two layers after it."""

    def __init__(self, function: Callable[..., Tensor], last: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), function
        self.last = nn.Conv2d(8, 4, 3) if last is None else last
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.norm(self.conv(x)).relu())


def tied() -> nn.Module:
    model = chain(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model[5].weight = model[3].weight
    return model


def hooked() -> nn.Module:
    model = chain(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    model[1].register_forward_hook(lambda *_: None)
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "output": (lambda: chain(nn.BatchNorm2d(8)), "channels of the network's output"),
    "grouped": (lambda: chain(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, groups=2)), "a grouped convolution"),
    "shuffled": (lambda: chain(nn.BatchNorm2d(8), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)), "PixelShuffle"),
    "group norm": (lambda: chain(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), "GroupNorm"),
    "tied": (tied, "used in several places"),
    "hooked": (hooked, "it has hooks"),
    "shared": (lambda: Called(lambda m, x: m.norm(x), nn.Identity()), "used in several places"),
    "weight norm": (
        lambda: chain(nn.BatchNorm2d(8), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1))), "Parametrized",
    ),
    "written size": (lambda: Called(lambda m, x: m.last(x.reshape(-1, 8 * 25)), nn.Linear(200, 4)), "a reshape"),
    "split": (lambda: Called(lambda m, x: operator.add(*x.chunk(2, 1))), "split into parts"),
    "a parameter": (lambda: Called(lambda m, x: m.last(x * m.scale)), "a constant has a value"),
    "computed weight": (lambda: Called(lambda m, x: F.conv2d(x, m.last.weight * 2)), "channels of conv2d"),
    "counted pool": (lambda: chain(nn.BatchNorm2d(8), nn.Sigmoid(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1)), "vary"),
    "zero padding": (
        lambda: chain(nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1)), "not zero, and conv2d in 4 pads",
    ),
    "statistics of the batch": (
        lambda: Called(lambda m, x: m.last(F.batch_norm(x, None, None, training=True))), "channels of batch_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_channels_stay_with_the_reason(name: str) -> None:
    torch.manual_seed(0)
    make, reason = LEFT[name]
    model = slimmed(make().double())
    x = torch.randn(2, 3, 7, 7).double()
    pruned, report = prune_channels(model, x)
    assert not report.changed and report.difference == 0.0
    (left,) = report.left
    assert reason in left.reason, left.reason
    assert error(model, pruned, x) == 0.0


def test_a_model_that_cannot_be_traced_is_left() -> None:
    class Looping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            while float(x.abs().max()) > 1:
                x = x / 2
            return super().forward(x)

    model = slimmed(Looping(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)))
    pruned, report = prune_channels(model, torch.randn(2, 3, 7, 7))
    assert "cannot be traced" in report.left[0].reason and pruned[1].num_features == 8


JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "frames of clips": lambda y: y.view(-1, 4, *y.shape[1:]).mean(1),
    "triplets": lambda y: operator.sub(*y[: y.shape[0] // 3 * 3].view(-1, 3, *y.shape[1:]).unbind(1)[:2]),
    "one sample by its number": lambda y: y[5],
    "time first": lambda y: y.reshape(4, -1, *y.shape[1:]).transpose(0, 1),
}


@pytest.mark.parametrize("name", JOINED)
def test_networks_that_join_the_first_axis_are_pruned(name: str) -> None:
    class Joined(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return JOINED[name](super().forward(x))

    model, x = (
        slimmed(Joined(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))).eval(),
        torch.randn(12, 3, 7, 7),
    )
    pruned, report = prune_channels(model, x)
    assert pruned[1].num_features < 8 and not report.left, str(report)
    assert relative(pruned(x), model(x)) <= TOLERANCE["float32"]


@pytest.mark.parametrize(
    "kind", ["BatchNorm2d", "BatchNormAct2d", "BatchRenorm2d", "FrozenBatchNorm2d", "GhostBatchNorm"]
)
def test_layers_of_this_library_are_pruned(kind: str) -> None:
    options = {"ghost_size": 2} if kind == "GhostBatchNorm" else {}
    model = slimmed(chain(getattr(batchnorm.nn, kind)(8, **options), nn.Conv2d(8, 4, 3)).double())
    pruned, report = prune_channels(model, x := torch.randn(4, 3, 7, 7).double())
    assert report.changed and error(model, pruned, x) < TOLERANCE["float64"]
    pruned.train()(x).sum().backward()


def test_an_accelerated_model_is_pruned() -> None:
    model, x = made("resnet")
    accelerated, report = batchnorm.accelerate(model, x)
    assert report.changed
    pruned, report = prune_channels(accelerated, x)
    assert len(report.changed) == 3 and error(model, pruned, x) < TOLERANCE["float64"]


# Failures, and the model itself ---------------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """Training, or a larger image, calls one more layer, which the trace of the example does not show."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.more = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        more = self.training if self.size is None else x.shape[-1] > self.size
        return self.head(x) + self.more(x) if more else self.head(x)


@pytest.mark.parametrize("size", [None, 5])
def test_layers_called_only_in_training_or_for_larger_images_are_noticed(size: int | None) -> None:
    model = slimmed(Auxiliary(size))
    with pytest.raises(PruneError, match=r"expects a model that runs with fewer channels.*only="):
        prune_channels(model, torch.randn(2, 3, 7, 7), inplace=True)
    assert model.norm.num_features == len(model.norm.weight) == 8


def test_inplace_keeps_modules_hooks_and_modes() -> None:
    model, x = made("resnet")
    expected, _ = prune_channels(model, x)
    model.register_forward_hook(hook := lambda *_: None)
    model.layer1.eval()
    kept = dict(model.named_modules())
    modes = {path: module.training for path, module in model.named_modules()}
    same, report = prune_channels(model, x, inplace=True)
    assert same is model and dict(model.named_modules()) == kept
    assert {path: m.training for path, m in model.named_modules()} == modes
    assert list(model._forward_hooks.values()) == [hook]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert any("create the optimizer after" in note for note in report.notes)


def test_an_interruption_leaves_the_model_unchanged() -> None:
    model, x = made("resnet")
    held = [*model.parameters(), *model.buffers()]
    before = state(model)
    last = model.layer2[1].conv2

    class Interrupted(dict):  # type: ignore[type-arg]
        def __setitem__(self, name: str, value: Any) -> None:
            if self is last._parameters:
                raise KeyboardInterrupt
            super().__setitem__(name, value)

    last._parameters = Interrupted(last._parameters)
    with pytest.raises(KeyboardInterrupt):
        prune_channels(model, x, inplace=True)
    assert all(a is b for a, b in zip(held, [*model.parameters(), *model.buffers()], strict=True))
    assert state(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.5, "threshold": 0.1}, "share or threshold"),
        ({"share": 0.0}, "share above 0 and below 1"),
        ({"share": 1.0}, "share above 0 and below 1"),
        ({"threshold": -1.0}, "threshold >= 0"),
        ({"threshold": float("nan")}, "threshold >= 0"),
        ({"only": "nothing.*"}, "matches none"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    model, x = made("vgg")
    with pytest.raises(ValueError, match=f"prune_channels expects .*{message}"):
        prune_channels(model, x, **options)


def test_wrong_models_and_examples_are_refused() -> None:
    with pytest.raises(TypeError, match="prune_channels expects a torch.nn.Module"):
        prune_channels(torch.relu, torch.ones(1))  # type: ignore[arg-type]
    model, x = made("vgg")
    with pytest.raises(ValueError, match="prune_channels expects example_inputs that the model takes"):
        prune_channels(model, x[:, :2])
    with pytest.raises(ValueError, match="prune_channels expects a model with values, got '0.weight' on the meta"):
        prune_channels(model.to("meta"), x)


def test_the_report_prints_sizes_and_times() -> None:
    model, x = made("resnet")
    report = batchnorm.prune_channels(model, x).report
    assert isinstance(report, PruneReport) and report.bytes < report.bytes_before
    assert report.seconds > 0 and report.seconds_before > 0
    text = str(report)
    for part in ("channels: 100 -> ", "parameters: 7,645 -> ", "MB", "forward pass:", "relative difference", "left"):
        assert part in text
