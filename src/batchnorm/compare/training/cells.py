"""The cells of the grid: one choice and one seed each."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from batchnorm.compare.directory import recording
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs import models
from batchnorm.compare.inputs.choices import Choice
from batchnorm.compare.inputs.data import Data
from batchnorm.compare.inputs.learning_rate import LearningRate
from batchnorm.compare.inputs.models import Model
from batchnorm.compare.inputs.norms import Norm, parse
from batchnorm.compare.inputs.optimizers import OPTIMIZERS
from batchnorm.compare.inputs.sampling import Sampling
from batchnorm.compare.inputs.settings import Settings
from batchnorm.compare.records import Recorder, Run
from batchnorm.compare.training.boards import board
from batchnorm.compare.training.environment import environment
from batchnorm.compare.training.loop import LoopOptions, train
from batchnorm.compare.training.measurements import Activations, kept_bytes
from batchnorm.compare.training.parallel import Processes
from batchnorm.compare.training.remaining import Costs

# The error of this library and of torch for a batch with one value per channel.
_SINGLE = re.compile("more than (one|1) value per channel")
SAMPLE = 64  # inputs that each new network is tried on


@dataclass(frozen=True)
class Cells:
    """The cells of one comparison, and how to train each.

    Attributes:
        settings: The settings of the comparison.
        models: The networks, by name.
        data: The data, on the device.
        processes: The processes that train each network together.
    """

    settings: Settings
    models: dict[str, Model]
    data: Data
    processes: Processes

    def warm_up(self, choices: Iterable[Choice]) -> dict[Choice, Costs]:
        """Train each network for a few steps, so that failures appear at once and no run includes first calls.

        Returns:
            The time that each kind of run takes; the keys are those of `kind_of`.
        """
        return {choice: self._trial(choice) for choice in dict.fromkeys(map(self.kind_of, choices))}

    def _trial(self, choice: Choice) -> Costs:
        """Train a network for at most three steps; return the time that this choice takes."""
        begun = time.perf_counter()
        network, norm, _ = self._build(choice, 0)
        options = self._options(choice)
        steps = min(3, options.steps)
        options = replace(options, steps=steps, evaluate_every=steps + 1)
        recorder, watched = Recorder(Run(choice, 0), io.StringIO()), self._activations(network, norm)
        optimizer = self._optimizer(network, choice)
        ends = [time.perf_counter()]

        def note_end(*_: object) -> None:
            ends.append(time.perf_counter())

        try:
            train(network, norm, self.data, optimizer, options, watched, recorder, note_end, self.processes)
        except ComparisonError as error:
            if not _SINGLE.search(str(error.__cause__)):
                raise
            each = f" on {self.processes.size} processes" if self.processes.size > 1 else ""
            raise ComparisonError(
                f"batch_size must give {choice.norm!r} in {choice.model} more than one value per channel, got "
                f"{choice.batch_size}{each}. Choose a larger one, or norms that do not use batch statistics."
            ) from error
        # An evaluation precedes the first step and follows the last one; the first step also includes first calls.
        step = ends[2] - ends[1] if len(ends) > 2 else 0.0
        evaluation = (time.perf_counter() - ends[0] - (len(ends) - 1) * step) / 2
        return Costs(ends[0] - begun, step, max(evaluation, 0.0))

    def kind_of(self, choice: Choice) -> Choice:
        """Return a choice that stands for all that take the same time: the learning rate makes no difference."""
        return replace(choice, lr=self.settings.grid.lr[0])

    def initial_values(self, seed: int) -> dict[str, Tensor]:
        """Return the initial values of the first choice's network, which the other networks share."""
        torch.manual_seed(seed)
        choice = self.settings.grid.choices[0]
        norm = self._norm(choice)
        network = self.models[choice.model](norm, self.data.x_train[:SAMPLE], self.data.num_classes)
        return models.initial_values(network, norm)

    def train(
        self,
        choice: Choice,
        seed: int,
        values: dict[str, Tensor],
        directory: Path,
        tensorboard: bool,
        on_step: Callable[[int, float], None],
    ) -> Run:
        """Train one network, and write its file.

        Args:
            choice: The settings to train it with.
            seed: Decides initial values and data order.
            values: The `initial_values` of this seed.
            directory: The directory that the first process writes to.
            tensorboard: Whether to write TensorBoard logs there, too.
            on_step: Called with step and training loss after each step, off the clock.
        """
        network, norm, names = self._build(choice, seed, values)
        watched = self._activations(network, norm)
        run = Run(
            choice=choice,
            seed=seed,
            parameters=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
            watched=watched.descriptions,
            shared=names["shared"],
            own=names["own"],
            kept_bytes=self._kept_bytes(network, choice),
            environment=environment(self.processes.size, self._device),
        )
        self.processes.seed(seed)  # so that dropout does not depend on how the network was built
        optimizer, options = self._optimizer(network, choice), self._options(choice)
        with self._recorder(run, directory, tensorboard) as recorder:
            train(network, norm, self.data, optimizer, options, watched, recorder, on_step, self.processes)
        return run

    @property
    def _device(self) -> torch.device:
        return torch.device(self.settings.device)

    def _norm(self, choice: Choice) -> Norm:
        return parse(choice.norm, choice.placement, choice.dropout)

    def _build(
        self, choice: Choice, seed: int, values: dict[str, Tensor] | None = None
    ) -> tuple[nn.Module, Norm, dict[str, list[str]]]:
        """Return the network on the device, its norm, and the names of its shared and its own parameters."""
        torch.manual_seed(seed)
        norm, sample = self._norm(choice), self.data.x_train[:SAMPLE]
        model = self.models[choice.model]
        network = model(norm, sample, self.data.num_classes)
        if model.pretrained and choice.model != self.settings.grid.model[0]:
            values = None  # it keeps the weights that it was given with
        names = models.share_initial_values(network, norm, values or {})
        if self.settings.input_norm:
            network = models.with_input_norm(network, self.data.in_shape)
        return network.to(self._device), norm, names

    def _activations(self, network: nn.Module, norm: Norm) -> Activations:
        return Activations(network, norm, self.data.x_train[:SAMPLE])

    def _options(self, choice: Choice) -> LoopOptions:
        samples = len(self.data.y_train)
        return LoopOptions(
            steps=self.settings.steps_of(choice, samples),
            batch_size=choice.batch_size,
            evaluate_every=self.settings.interval_of(choice, samples),
            sampling=Sampling.parse(choice.sampling),
            learning_rate=LearningRate.parse(self.settings.schedule),
        )

    def _optimizer(self, network: nn.Module, choice: Choice) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return OPTIMIZERS[self.settings.optimizer].build(parameters, lr=choice.lr)

    def _kept_bytes(self, network: nn.Module, choice: Choice) -> int:
        share = self.processes.share(torch.arange(choice.batch_size, device="cpu")).to(self._device)
        return kept_bytes(network, self.data.x_train[share], self.data.y_train[share])

    @contextmanager
    def _recorder(self, run: Run, directory: Path, tensorboard: bool) -> Iterator[Recorder]:
        with ExitStack() as stack:
            if not self.processes.first:
                yield Recorder(run, stack.enter_context(open(os.devnull, "w")))
                return
            listeners = [stack.enter_context(board(run, directory))] if tensorboard else []
            yield stack.enter_context(recording(run, directory, *listeners))
