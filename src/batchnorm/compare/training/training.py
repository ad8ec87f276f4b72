"""The training of one network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.compare.inputs.data import Data
from batchnorm.compare.inputs.importing import blame
from batchnorm.compare.inputs.norms import Norm
from batchnorm.compare.inputs.sampling import IID, Sampling
from batchnorm.compare.records import Histogram, Recorder, Step, finite
from batchnorm.compare.training.learning_rate import CONSTANT, LearningRate
from batchnorm.compare.training.measurements import Activations, Stopwatch, evaluate, gradient_norm, layers
from batchnorm.compare.training.parallel import Processes

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer that can be named.

    Attributes:
        build: `build(parameters, lr=...)` returns it.
        lr: Its learning rate where none is given.
        title: What it is called in a sentence.
    """

    build: Callable[..., Optimizer]
    lr: float
    title: str


def _momentum(parameters: Iterator[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


OPTIMIZERS = {
    "sgd": OptimizerKind(torch.optim.SGD, 0.1, "stochastic gradient descent"),
    "momentum": OptimizerKind(_momentum, 0.01, "stochastic gradient descent with momentum 0.9"),
    "adam": OptimizerKind(torch.optim.Adam, 1e-3, "Adam"),
    "adamw": OptimizerKind(torch.optim.AdamW, 1e-3, "AdamW"),
    "rmsprop": OptimizerKind(torch.optim.RMSprop, 1e-3, "RMSprop"),
}


@dataclass(frozen=True)
class Schedule:
    """How long to train, and when to look.

    Attributes:
        steps: Number of training steps.
        batch_size: Samples in each step.
        evaluate_every: Steps from one look at the test set to the next.
        sampling: How the batches are drawn.
        learning_rate: How the optimizer's learning rate changes meanwhile.
    """

    steps: int
    batch_size: int
    evaluate_every: int
    sampling: Sampling = IID
    learning_rate: LearningRate = CONSTANT

    def looks(self, step: int) -> bool:
        """Whether the test set is looked at after this step."""
        return step % self.evaluate_every == 0 or step == self.steps


def train(
    network: nn.Module,
    norm: Norm,
    data: Data,
    optimizer: Optimizer,
    schedule: Schedule,
    activations: Activations,
    recorder: Recorder,
    on_step: Callable[[int, float], None],
    processes: Processes,
) -> None:
    """Trains a network, and records each step and each look at the test set.

    Training ends early at the first loss that is not finite. Of several processes the first looks. Histograms and the
    norm of the gradient are taken, off the clock, in the first step and in those after which the test set is looked at.

    Args:
        network: Trained in place, in training mode, on the device where the data are.
        norm: What the network was built with.
        data: What to train and test on.
        optimizer: Holds the network's parameters.
        schedule: How long, and when to look.
        activations: Where the histograms come from.
        recorder: Gets every record; its run's seed decides the data order.
        on_step: Called with step and training loss after each step, off the clock.
        processes: Which train it together, each on its share of every batch.

    Raises:
        ComparisonError: If the network fails.
    """
    watch = Stopwatch(data.x_train.device)
    diverged_at: int | None = None
    what = f"with norm {norm.spec!r}, seed {recorder.run.seed},"
    order = schedule.sampling.batches(data.y_train.cpu(), schedule.batch_size, recorder.run.seed)
    scheduler = schedule.learning_rate.scheduler(optimizer, schedule.steps)
    joined = processes.joined(network)

    def look(step: int) -> None:
        if not processes.first:
            return
        with blame(what, f"was tested after step {step}"):
            found = evaluate(network, data, step, watch.seconds)
        recorder.evaluation(found)

    look(0)
    for step in range(1, schedule.steps + 1):
        index = next(order)
        found: list[Histogram] = []
        watched = step == 1 or schedule.looks(step)
        with blame(what, f"took training step {step}"):
            with activations.watch(step, watch, found) if watched else nullcontext():
                loss = _step(joined, data, index, optimizer, watch, processes)
            norm_of_gradient = gradient_norm(network) if watched else None
            scheduler.step()
        recorder.step(Step(step, watch.seconds, finite(loss), norm_of_gradient))
        for record in found:
            recorder.histogram(record)
        diverged = finite(loss) is None
        if diverged or schedule.looks(step):
            look(step)
        on_step(step, loss)
        if diverged:
            diverged_at = step
            break
    recorder.end(layers(network, norm), diverged_at)


def _step(
    network: nn.Module, data: Data, index: Tensor, optimizer: Optimizer, watch: Stopwatch, processes: Processes
) -> float:
    """Takes one step of training on the clock, and returns the batch's loss before it."""
    watch.start()
    share = processes.share(index).to(data.x_train.device)
    loss = F.cross_entropy(network(data.x_train[share]), data.y_train[share])
    loss = loss * (len(share) * processes.size / len(index))  # averaged over the processes: the mean over the batch
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    watch.stop()
    return processes.mean(loss.detach())
