"""The training loop of one network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.compare.inputs.data import Data
from batchnorm.compare.inputs.importing import user_code
from batchnorm.compare.inputs.learning_rate import CONSTANT, LearningRate
from batchnorm.compare.inputs.norms import Norm
from batchnorm.compare.inputs.sampling import IID, Sampling
from batchnorm.compare.records import Distribution, Histogram, Layer, Recorder, Step, finite
from batchnorm.compare.training.distributions import SAMPLES, distributions
from batchnorm.compare.training.measurements import Activations, Stopwatch, evaluate, gradient_norm, layers
from batchnorm.compare.training.parallel import Processes


@dataclass(frozen=True)
class LoopOptions:
    """How long to train, on which batches, and when to evaluate.

    Attributes:
        steps: Number of training steps.
        batch_size: Samples in each step.
        evaluate_every: Steps from one evaluation to the next.
        sampling: How the batches are drawn.
        learning_rate: The schedule of the optimizer's learning rate.
    """

    steps: int
    batch_size: int
    evaluate_every: int
    sampling: Sampling = IID
    learning_rate: LearningRate = CONSTANT

    def evaluates_after(self, step: int) -> bool:
        """Return whether an evaluation follows this step."""
        return step % self.evaluate_every == 0 or step == self.steps


def train(
    network: nn.Module,
    norm: Norm,
    data: Data,
    optimizer: torch.optim.Optimizer,
    options: LoopOptions,
    activations: Activations,
    recorder: Recorder,
    on_step: Callable[[int, float], None],
    processes: Processes,
) -> None:
    """Train a network, and record each step and each evaluation.

    Training ends early at the first loss that is not finite. Only the first process evaluates. The first step and each
    step followed by an evaluation also record histograms and the norm of the gradient, off the clock.

    Args:
        network: Trained in place, in training mode, on the device of the data.
        norm: The norm that the network was built with.
        data: The training and test data.
        optimizer: Holds the network's parameters.
        options: How long to train, and when to evaluate.
        activations: Takes the histograms.
        recorder: Receives every record; the seed of its run decides the data order.
        on_step: Called with step and training loss after each step, off the clock.
        processes: The processes that train the network together, each on its share of every batch.

    Raises:
        ComparisonError: If the network fails.
    """
    watch = Stopwatch(data.x_train.device)
    diverged_at: int | None = None
    what = f"with norm {norm.spec!r}, seed {recorder.run.seed},"
    order = options.sampling.batches(data.y_train.cpu(), options.batch_size, recorder.run.seed)
    scheduler = options.learning_rate.scheduler(optimizer, options.steps)
    joined = processes.joined(network)

    def evaluate_after(step: int) -> None:
        if not processes.first:
            return
        with user_code(what, f"was tested after step {step}"):
            evaluation = evaluate(network, data, step, watch.seconds)
        recorder.add(evaluation)

    evaluate_after(0)
    for step in range(1, options.steps + 1):
        index = next(order)
        histograms: list[Histogram] = []
        watched = step == 1 or options.evaluates_after(step)
        with user_code(what, f"took training step {step}"):
            with activations.watch(step, watch, histograms) if watched else nullcontext():
                loss = _step(joined, data, index, optimizer, watch, processes)
            norm_of_gradient = gradient_norm(network) if watched else None
            scheduler.step()
        recorder.add(Step(step, watch.seconds, finite(loss), norm_of_gradient))
        for record in histograms:
            recorder.add(record)
        diverged = finite(loss) is None
        if diverged or options.evaluates_after(step):
            evaluate_after(step)
        on_step(step, loss)
        if diverged:
            diverged_at = step
            break
    at_end: list[Distribution | Layer] = list(layers(network, norm))
    if processes.first:
        with user_code(what, "was run once more after training"):
            at_end[:0] = distributions(network, norm, data.train_part[0][:SAMPLES])
    recorder.end(at_end, diverged_at)


def _step(
    network: nn.Module,
    data: Data,
    index: Tensor,
    optimizer: torch.optim.Optimizer,
    watch: Stopwatch,
    processes: Processes,
) -> float:
    """Take one training step on the clock; return the loss of the batch before the update."""
    watch.start()
    share = processes.share(index).to(data.x_train.device)
    loss = F.cross_entropy(network(data.x_train[share]), data.y_train[share])
    loss = loss * (len(share) * processes.size / len(index))  # so that the average over processes is the batch's mean
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    watch.stop()
    return processes.mean(loss.detach())
