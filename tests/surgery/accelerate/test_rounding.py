"""In float32 an accelerated network errs as torch's does: as much as that changes with the number of threads."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.surgery.accelerate.accelerate import accelerate
from tests.surgery.networks import NETWORKS

SAMPLES, THREADS = 16, (1, 2)


def batch(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples large enough for the threads to share the work."""
    size = 24 if len(shape) == 3 else 8
    x = torch.randn(SAMPLES, shape[0], *(size for _ in shape[1:]), generator=generator)
    return x, torch.randint(5, (SAMPLES,), generator=generator)


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    y = model(x)
    return F.cross_entropy(y.flatten(2).mean(2) if y.dim() > 2 else y, target)


def losses(model: nn.Module, dtype: torch.dtype, threads: int, seed: int, steps: int = 8) -> Tensor:
    """Of a training run, on batches that are the same for every model."""
    torch.set_num_threads(threads)
    model = copy.deepcopy(model).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x, target = batch((3, 12, 12), generator)
        loss = loss_of(model, x.to(dtype), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor, target: Tensor, threads: int = 1) -> tuple[float, Tensor]:
    """The loss, and all gradients in one vector, in float64."""
    torch.set_num_threads(threads)
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    loss = loss_of(model, x, target)
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradients_of_a_step_have_torchs_errors(name: str) -> None:
    """From the same weights. The typical error over batches, as one ReLU on the other side of 0 makes it large."""
    make, shape, _, _ = NETWORKS[name]
    model, generator = make().train(), torch.Generator().manual_seed(0)
    fast, exact = accelerate(model).model, copy.deepcopy(model).double()
    of_loss: dict[str, list[float]] = {}
    of_gradients: dict[str, list[float]] = {}
    for _ in range(9):
        x, target = batch(shape, generator)
        loss, expected = gradients(exact, x.double(), target)
        for threads in THREADS:
            for who, network in (("torch", model), ("ours", fast)):
                found_loss, found = gradients(network, x, target, threads)
                of_loss.setdefault(who, []).append(abs(found_loss - loss))
                of_gradients.setdefault(f"{who} {threads}", []).append(
                    float((found - expected).norm() / expected.norm())
                )
    assert max(of_loss["ours"]) <= max(of_loss["torch"]) + torch.finfo(torch.float32).eps * loss
    typical = {who: statistics.median(errors) for who, errors in of_gradients.items()}
    theirs = max(error for who, error in typical.items() if who.startswith("torch"))
    assert all(error <= 1.5 * theirs for error in typical.values()), typical


def test_a_run_diverges_from_float64_as_torchs_does() -> None:
    """A ReLU on the other side of 0 moves the weights, and the runs part: torch's from torch's as ours from torch's."""
    apart: dict[str, list[float]] = {"torch": [], "ours": []}
    for seed in range(3):
        torch.manual_seed(seed)
        model = NETWORKS["resnet"][0]()
        exact = losses(model, torch.float64, 1, seed)
        for threads in THREADS:
            apart["torch"].append(float((losses(model, torch.float32, threads, seed) - exact).abs().max()))
        fast = accelerate(model).model
        apart["ours"].append(float((losses(fast, torch.float32, 2, seed) - exact).abs().max()))
    assert statistics.median(apart["ours"]) <= max(apart["torch"]), apart
