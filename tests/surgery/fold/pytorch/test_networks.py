"""Whole networks: others' definitions with random statistics, and the architectures where folding is hard, in small."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.models import gate
from batchnorm.surgery.fold import count_batch_norms, fold
from tests.surgery import networks
from tests.surgery.fold.pytorch.test_fold import trained


def assert_target(model: nn.Module, x: Tensor, *, remaining: int = 0, fused: int = 0) -> None:
    """The issue's bound: max(1e-5, twice the unfolded network's own error) against float64; and what runs."""
    folded, report = fold(model, x)
    assert report.before == count_batch_norms(model, x).batch_norm
    assert (report.remaining, report.fused) == (remaining, fused), str(report)
    assert report.how in ("fx", "export", "modules")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        for other in (x, torch.randn_like(x[:1]), F.pad(x, (0, 8) * (x.dim() - 2))):
            want = _tensor(exact(other.double()))
            own, ours = (gate.relative(_tensor(m(other)), want) for m in (model, folded))
            assert ours <= max(1e-5, 2 * own)


def _tensor(result: object) -> Tensor:
    return result if isinstance(result, Tensor) else result.logits  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["ResNet", "MobileNet", "UNet"])
def test_a_network_is_left_without_batch_normalization(name: str) -> None:
    assert_target(trained(getattr(networks, name)()), torch.randn(2, 3, 32, 32))


def test_a_network_of_volumes() -> None:
    model = trained(networks.Network3d())
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv3d)).in_channels
    assert_target(model, torch.randn(2, channels, 8, 8, 8))


def test_a_densenet_keeps_what_reads_a_stream_fused_with_its_relu() -> None:
    model = trained(networks.DenseNet())
    x = torch.randn(2, 3, 32, 32)
    _, report = fold(model, x)
    assert report.remaining == 0
    assert 0 < report.fused < report.before
    assert all("read by" in row.reason for row in report.changed if row.now.startswith("fused"))
    assert_target(model, x, fused=report.fused)


class Bottleneck(nn.Module):
    """Pre-activation (He 2016, "Identity mappings"); the shortcut projects what the first activation gives."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + shortcut


def test_a_pre_activation_network_fuses_only_what_its_shortcuts_read() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Bottleneck(6, 8), Bottleneck(8, 8), Bottleneck(8, 8), nn.BatchNorm2d(8),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))  # fmt: skip
    # The input of norm1 in the second and third block is the shortcut's too; so is a part of what the last one reads.
    assert_target(trained(model), torch.randn(2, 3, 16, 16), fused=3)


class Shuffle(nn.Module):
    """ShuffleNet v2's unit (Ma 2018): half of the channels pass, and the halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        y = torch.cat((kept, self.branch(changed)), dim=1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def test_shufflenet() -> None:
    assert_target(trained(nn.Sequential(nn.Conv2d(3, 8, 3), Shuffle(8), Shuffle(8))), torch.randn(2, 3, 12, 12))


class Excited(nn.Module):
    """EfficientNet's block: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12, eps=1e-3), nn.SiLU(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(12, 12, 5, padding=2, groups=12, bias=False), nn.BatchNorm2d(12, eps=1e-3), nn.SiLU(inplace=True)
        )
        self.squeeze, self.excite = nn.Conv2d(12, 2, 1), nn.Conv2d(2, 12, 1)
        self.project = nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4, eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.project(y * gate) + x


def test_efficientnet() -> None:
    assert_target(trained(nn.Sequential(nn.Conv2d(3, 4, 3), Excited(), Excited())), torch.randn(2, 3, 12, 12))


class LinearNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Attention(nn.Module):
    """LeViT's (Graham 2021): batch normalization after each projection of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = LinearNorm(8, 24), nn.Sequential(nn.Hardswish(), LinearNorm(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 2, 12).split([4, 4, 4], dim=3)
        weights = (q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)).softmax(dim=-1)
        return x + self.project((weights @ v.permute(0, 2, 1, 3)).transpose(1, 2).reshape(n, length, 8))


class LeViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.blocks, self.norm, self.head = nn.Sequential(Attention(), Attention()), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1)))


def test_levit() -> None:
    assert_target(trained(LeViT()), torch.randn(2, 3, 12, 12))


class RepBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.large = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs)
        )
        self.small = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        return F.relu(y if self.identity is None else y + self.identity(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_repvgg_becomes_a_chain_of_convolutions(groups: int) -> None:
    model = trained(nn.Sequential(RepBlock(4, 8, 2, groups), RepBlock(8, 8, 1, groups), RepBlock(8, 8, 1, groups)))
    assert_target(model, torch.randn(2, 4, 16, 16))
    folded, _ = fold(model, torch.randn(2, 4, 16, 16))
    calls = [node.target for node in folded.graph.nodes if node.op == "call_function"]
    assert calls == [F.conv2d, F.relu] * 3


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_transformers_resnet(layer_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type=layer_type, num_labels=5
    )
    assert_target(trained(transformers.ResNetForImageClassification(config)), torch.randn(2, 3, 32, 32))


def test_transformers_regnet_with_its_own_output_class() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    model = trained(transformers.RegNetModel(config))
    x = torch.randn(2, 3, 32, 32)
    folded, report = fold(model, {"pixel_values": x})
    assert report.remaining == 0
    found = folded(pixel_values=x)
    assert type(found).__name__ == "BaseModelOutputWithPoolingAndNoAttention"
    assert torch.allclose(found.pooler_output, model(x).pooler_output, atol=1e-4)
