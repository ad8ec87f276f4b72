"""The parts that several experiments share: a small network for images, and plain training and testing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.compare import Data
from batchnorm.compare.inputs.norms import Norm, parse
from batchnorm.compare.inputs.sampling import IID


def small_cnn(norm: Callable[[int], nn.Module], data: Data, *, bias: bool = False) -> nn.Module:
    """Return three convolutions of 8, 16 and 32 channels, each normalized and followed by ReLU, and a linear layer.

    Args:
        norm: `norm(channels)` returns a normalization layer.
        data: The data, whose images are 28×28.
        bias: Whether the convolutions have a bias; β makes it redundant.
    """

    def convolution(before: int, after: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride, 1, bias=bias), norm(after), nn.ReLU()]

    return nn.Sequential(
        *convolution(data.in_shape[0], 8, 1),
        *convolution(8, 16, 2),
        *convolution(16, 32, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 9, data.num_classes),
    )


def initialized_alike(
    build: Callable[[Norm, tuple[int, ...], int], nn.Module], norm: str, data: Data, seed: int
) -> nn.Module:
    """Return a network of `batchnorm.compare` whose initial weights do not depend on its normalization.

    Args:
        build: Builds the network, as in the comparison.
        norm: The norm, as in the comparison; parameters that the network with `none` has, too, get its values.
        data: The data.
        seed: Decides the initial values.
    """
    torch.manual_seed(seed)
    plain = build(parse("none"), data.in_shape, data.num_classes).state_dict()
    network = build(parse(norm), data.in_shape, data.num_classes)
    own = network.state_dict()
    network.load_state_dict(own | {key: value for key, value in plain.items() if key in own})
    return network


def half_size(data: Data) -> Data:
    """Return the images at half their size, by averaging 2×2 pixels."""
    return replace(data, x_train=F.avg_pool2d(data.x_train, 2), x_test=F.avg_pool2d(data.x_test, 2))


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    batches: Iterable[Tensor],
    after: Callable[[int], None] = lambda step: None,
) -> int | None:
    """Train with cross-entropy, one step per batch, until a loss is not finite.

    Args:
        network: Trained in place, in training mode.
        optimizer: Holds its parameters.
        x: Inputs.
        y: Their labels.
        batches: Indices of the samples of each batch.
        after: Called after each step with the number of steps taken.

    Returns:
        The step whose loss was not finite; None if there was none.
    """
    network.train()
    for step, index in enumerate(batches, 1):
        loss = F.cross_entropy(network(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step)
        if not loss.isfinite():
            return step
    return None


def train_to_rest(
    network: nn.Module, x: Tensor, y: Tensor, *, rate: float, batch_size: int, steps: int, seed: int
) -> int | None:
    """Train by SGD with momentum 0.9, at a learning rate that decays linearly from `rate` to zero.

    Args:
        network: Trained in place, in training mode; parameters that do not require gradients stay as they are.
        x: Inputs.
        y: Their labels.
        rate: Learning rate of the first step.
        batch_size: Samples in a batch.
        steps: Number of batches.
        seed: Decides their order.

    Returns:
        The result of `train`.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps)
    order = islice(IID.batches(y, batch_size, seed), steps)
    return train(network, optimizer, x, y, order, lambda _: schedule.step())


@torch.no_grad()
def test(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return accuracy (0 to 1) and mean cross-entropy in evaluation mode; the network's mode is restored."""
    training = network.training
    network.eval()
    scores = torch.cat([network(part) for part in x.split(1000)])
    network.train(training)
    return (scores.argmax(1) == y).double().mean().item(), F.cross_entropy(scores, y).item()
