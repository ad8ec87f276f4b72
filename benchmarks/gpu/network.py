"""A training step of ResNet-50."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from batchnorm.surgery.accelerate import accelerate
from benchmarks.gpu.layers import OURS, TORCH, settings_of
from benchmarks.gpu.timing import Clock
from benchmarks.measuring import records
from benchmarks.subjects import cases, networks


def measure_network(clock: Clock, batch: int, dry: bool, repeats: int) -> list[records.Row]:
    """Measure a training step of ResNet-50, channels-last bfloat16 autocast: accelerated and torch's layers."""
    shape, size = ((batch, 3, 32, 32), {"depths": (1, 1), "width": 4}) if dry else ((batch, 3, 224, 224), {})
    rows: list[records.Row] = []
    for contender in (OURS, TORCH):
        model = networks.resnet50(**size)
        model = accelerate(model).model if contender == OURS else model
        model = model.to(clock.device, memory_format=torch.channels_last)
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
