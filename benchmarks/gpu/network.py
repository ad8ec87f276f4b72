"""ResNet-50, which takes its normalization as an argument, and its training step.

Source: He et al. 2016, table 1 (50 layers).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cases, networks, records
from benchmarks.gpu.layers import OURS, TORCH, settings_of
from benchmarks.gpu.timing import Clock
from benchmarks.networks import Norm, _conv


class _Bottleneck(nn.Module):
    def __init__(self, norm: Norm, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = _conv(inputs, width, 1), norm(width, "relu")
        self.conv2, self.norm2 = _conv(width, width, 3, stride), norm(width, "relu")
        self.conv3, self.norm3 = _conv(width, outputs, 1), norm(outputs, "relu")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs, "none"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y), self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50; `depths` and `width` give smaller versions."""

    def __init__(
        self, norm: Norm, classes: int = 1000, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64
    ) -> None:
        super().__init__()
        self.conv, self.norm = _conv(3, width, 7, 2), norm(width, "relu")
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(_Bottleneck(norm, inputs, width << stage, stride))
                inputs = 4 * (width << stage)
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)), 3, 2, 1)
        return self.classifier(self.blocks(x).mean((2, 3)))


def measure_network(clock: Clock, batch: int, dry: bool, repeats: int) -> list[records.Row]:
    """Measure a training step of ResNet-50, channels-last with bfloat16 autocast, with our layers and torch's."""
    shape, size = ((batch, 3, 32, 32), {"depths": (1, 1), "width": 4}) if dry else ((batch, 3, 224, 224), {})
    rows: list[records.Row] = []
    for contender, norm in ((OURS, networks.our_norm), (TORCH, networks.torch_norm)):
        model = ResNet50(norm, **size).to(clock.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        images = torch.randn(shape, device=clock.device).to(memory_format=torch.channels_last)
        labels = torch.zeros(shape[0], dtype=torch.int64, device=clock.device)

        def call(model=model, optimizer=optimizer, images=images, labels=labels) -> None:  # type: ignore[no-untyped-def]
            with torch.autocast(clock.device.type, torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        with settings_of(contender, clock.device):
            seconds, peak = clock.seconds([call], repeats=repeats, captured=False), clock.peak_bytes(call)
        rows.append(
            {
                "device": clock.name(),
                "shape": cases.shape_text(shape),
                "layout": "channels-last",
                "dtype": "bfloat16",
                "task": "ResNet-50 training step",
                "contender": contender,
                "ms_launched": seconds * 1e3,
                "peak_bytes": peak,
            }
        )
    return rows
