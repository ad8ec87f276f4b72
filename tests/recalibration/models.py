"""Networks, data and snapshots for the tests of `recalibrate`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

SIZES = (7, 16, 1, 9)  # one of a single sample, which has many pixels


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 5, 3), norm(5), nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, 3), norm(4), nn.Flatten(), nn.Linear(4 * 4, 2),
    )  # fmt: skip
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:  # far from right
            module.running_mean.uniform_(-3, 3)
            module.running_var.uniform_(0.1, 9)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model


def batches(offset: float = 0.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [i + offset + torch.randn(n, 3, 8, 8, generator=generator) for i, n in enumerate(SIZES)]


def norms(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if getattr(m, "running_mean", None) is not None}


class Recorder:
    """Records the inputs of every normalization through hooks, as a user may."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, list[Tensor]] = {path: [] for path in norms(model)}
        for path, layer in norms(model).items():
            layer.register_forward_pre_hook(lambda _, args, path=path: self.seen[path].append(args[0].detach().clone()))

    def two_pass(self, path: str, start: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        values = np.concatenate([x.double().transpose(0, 1).flatten(1).numpy() for x in self.seen[path][start:]], 1)
        mean = values.mean(1)
        return mean, ((values - mean[:, None]) ** 2).sum(1) / (values.shape[1] - 1)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The state that must be unchanged."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "momentum": [getattr(m, "momentum", None) for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    assert_close(snapshot(model), before, rtol=0, atol=0)
