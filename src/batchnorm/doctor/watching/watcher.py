"""Watch every layer of batch normalization of a model while it trains."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchnorm.distributed.owners import sharded_modules
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.pytorch.inspection import check_model
from batchnorm.doctor.pytorch.layers import layers_of, optimized_by, settings_of
from batchnorm.doctor.watching.alarms import Alarms, BatchNormWarning, ObservedLayer
from batchnorm.doctor.watching.hooks import is_compiled, plain, remove, unwrapped, user_stacklevel, vector, weakly
from batchnorm.doctor.watching.observing import StepObserver
from batchnorm.doctor.watching.pace import Pace
from batchnorm.doctor.watching.records import QUANTITIES, LayerState, RecentBatches, Record, copied, recorded
from batchnorm.doctor.watching.table import table
from batchnorm.doctor.wording import explain_command, named
from batchnorm.text import printable
from batchnorm.walk import norm_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Largest number of looks that are kept. Beyond it, every other look is dropped, and looks become half as frequent.
_KEPT = 1000


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    every: int | None = None,
    overhead: float = 0.02,
    warn: bool = True,
    writer: Any = None,
) -> Watch:
    """Watch every layer of batch normalization while the model trains, in any loop.

    A training step ends when an optimizer that has parameters of the model takes its step. In some training steps, the
    watch looks at each layer. It measures the distance between running and batch statistics, the noise of the batch
    statistics, the share of dead channels, and the number of updates of the running statistics. The first look is at
    the second step, when everything that is created only once exists. Between looks, only the optimizer has a hook.
    Watching changes no bit of the training and draws no random number. Batches in evaluation do not count.

    Nothing is attached to the model, so it can be copied, pickled and saved while it is watched. In compiled code, the
    watch sees no batch. It computes distances from the updates of the running statistics, and noise is unknown. Under
    `DistributedDataParallel`, each process watches its own batches.

    Args:
        model: The network, with or without a wrapper such as `DistributedDataParallel` or `torch.compile`.
        optimizer: The optimizer whose step ends a training step. Pass it if several optimizers train the model, as in a
            GAN. By default, any optimizer that has parameters of the model.
        every: Look at every n-th step, from the second on. By default, look as often as `overhead` allows.
        overhead: Share of the training time that looks may take, measured during training.
        warn: Whether to issue a `BatchNormWarning` for each finding, once for each layer. `findings` contains the
            findings in either case.
        writer: A `torch.utils.tensorboard.SummaryWriter` that each look is written to.

    Returns:
        The watch. It ends with its `with` block, or with `close()`.

    Raises:
        TypeError: model is not a module; every is not an int.
        ValueError: the model has no batch normalization, or lazy layers before their first batch; every or overhead is
            out of range.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model, every=1) as w:
        ...     for _ in range(3):
        ...         model(torch.randn(64, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> [(record.step, record.layer, record.updates) for record in w.history]
        [(2, '1', 1), (3, '1', 1)]
    """
    return Watch(model, optimizer, every=every, overhead=overhead, warn=warn, writer=writer)


class Watch:
    """A running watch, as `watch` returns it. It prints as a table of the last look.

    Attributes:
        layers: Paths of the layers, in the model's order.
        steps: Number of training steps so far.
        looks: Number of steps in which the layers were looked at.
        findings: Findings of the doctor's rules, in the order in which they were found.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int | None = None,
        overhead: float = 0.02,
        warn: bool = True,
        writer: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_model("watch", model)
        _check_pace(every, overhead)
        self._root = unwrapped(model)
        self._modules = [found.module for found in norm_layers(self._root)]
        self._layers = layers_of(self._root)
        self.layers = tuple(layer.path for layer in self._layers)
        self.steps = self.looks = 0
        self.findings: list[Finding] = []
        self._history: list[list[Record]] = []
        self._written = 0
        self._optimizer = optimizer
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._sharded = sharded_modules(model)
        self._compiled = any(is_compiled(module) for module in model.modules())
        self._recent = [RecentBatches() for _ in self._layers]
        self._alarms = Alarms(type(self._root).__name__, self._sharded)
        self._warn, self._writer = warn, writer
        self._pace = Pace(overhead, every, clock)
        self._observer = StepObserver(self._root, dict(zip(self.layers, self._modules, strict=True)), self._pace)
        self._handles: list[Any] = []
        self._handles_of_look: list[Any] = []
        self.closed = False
        self._waited = False
        weakref.finalize(self, remove, self._handles, self._handles_of_look)
        self._handles.append(register_optimizer_step_post_hook(weakly(self._stepped)))

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching and remove every hook; the history stays. May be called again."""
        ended, self.closed = not self.closed, True
        remove(self._handles, self._handles_of_look)
        self._observer.forget()
        found = self._alarms.at_the_end(self.steps) if ended else []
        self.findings += found
        for finding in found:  # last, because it raises if warnings are errors
            self._report(finding)

    # Steps ------------------------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._optimizer is not None:
            mine = optimizer is self._optimizer
        else:
            mine = any(id(p) in self._parameters for group in optimizer.param_groups for p in group["params"])
        if mine:
            self.step()

    def step(self) -> None:
        """End a training step; call this if the optimizer does not derive from `torch.optim.Optimizer`."""
        if self.closed:
            return
        found: list[Finding] = []
        if self._pace.looking:
            with self._pace.spending():
                if self._nothing_seen() and not self._waited:
                    self._waited = True  # the second optimizer of a step, perhaps
                    return
                self.steps += 1
                found = self._end_look()
        else:
            self.steps += 1
        if self._pace.step():
            with self._pace.spending():
                self._begin_look()
        for finding in found:  # last, because it raises if warnings are errors
            self._report(finding)

    def _begin_look(self) -> None:
        self._before = self._states()
        self._observer.begin([state.mean for state in self._before])
        self._waited = False
        if not self._compiled:
            self._handles_of_look += self._observer.hooks()

    def _nothing_seen(self) -> bool:
        if self._observer.seen:
            return False
        return all(a.updates == b.updates for a, b in zip(self._before, self._states(), strict=True))

    def _end_look(self) -> list[Finding]:
        remove(self._handles_of_look)
        observations = self._observer.observations
        batches = iter(copied([seen.batch for seen in observations if seen.batch is not None]))
        observed = []
        optimized = optimized_by(self._optimizer)
        for layer, module, seen, recent, before, after in zip(
            self._layers, self._modules, observations, self._recent, self._before, self._states(), strict=True
        ):
            batch = None if seen.batch is None else next(batches)
            layer = replace(layer, **settings_of(module, optimized))
            record, measured = recorded(self.steps, layer, module, seen, batch, recent, before, after)
            observed.append(ObservedLayer(measured, module, seen, after, record))
        self._history.append([one.record for one in observed])
        self.looks += 1
        if any(one.record.updates and not one.observation.forward for one in observed):
            self._compiled = True  # compiled code compiles again for each hook that it sees: no more hooks
        found = self._alarms.findings(self.steps, self._observer, observed)
        self._observer.forget()
        self.findings += found
        if self._writer is not None:
            self.write(self._writer)
        if len(self._history) > _KEPT and self._pace.every is None:
            del self._history[1::2]
            self._written = len(self._history)
            self._pace.least *= 2
        return found

    def _states(self) -> list[LayerState]:
        names = ("running_mean", "running_var", "weight", "num_batches_tracked")
        # Between steps a process holds only its part of a sharded γ, or freed memory.
        unreadable = {(module, "weight") for module in self._sharded}
        vectors = [
            [None if (m, name) in unreadable else vector(getattr(m, name, None)) for name in names]
            for m in self._modules
        ]
        copies = iter(copied([v for row in vectors for v in row if v is not None]))
        rows = [[None if v is None else next(copies) for v in row] for row in vectors]
        return [LayerState(plain(m), plain(v), plain(w), None if n is None else int(n.max())) for m, v, w, n in rows]

    def _report(self, finding: Finding) -> None:
        if not self._warn:
            return
        rank = ""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = f"[rank {torch.distributed.get_rank()}] "
        lines = [f"{rank}{finding.code} {finding.title}: {printable(finding.summary)}"]
        lines += [f"  {printable(line)}" for line in finding.evidence]
        if finding.repair:
            lines += ["Fix:", *(f"  {printable(line)}" for line in finding.repair.splitlines())]
        lines.append(f"Documentation: {explain_command(finding.code)}")
        warnings.warn("\n".join(lines), BatchNormWarning, stacklevel=user_stacklevel())

    # Results ---------------------------------------------------------------------------------------------------------

    @property
    def history(self) -> list[Record]:
        """The records of every look that is kept, layer by layer; `pandas.DataFrame(w.history)` makes a table of them.

        With `every=`, all looks are kept; without it, up to a thousand, evenly over the run.
        """
        return [record for records in self._history for record in records]

    @property
    def cost(self) -> float | None:
        """Duration of the last look in seconds; None before the first."""
        return self._pace.cost

    def metrics(self, *, per_layer: bool = True) -> dict[str, float]:
        """Return the last look as figures by name, for loggers; empty before the first look.

        Args:
            per_layer: `batchnorm/<quantity>/<layer>` for each layer; otherwise `batchnorm/<quantity>` of the layer
                with the largest absolute value.
        """
        found: dict[str, float] = {}
        for quantity in QUANTITIES:
            values = {r.layer: getattr(r, quantity) for r in (self._history[-1] if self._history else ())}
            known = {path: float(v) for path, v in values.items() if v is not None and not math.isnan(v)}
            if per_layer:
                found |= {f"batchnorm/{quantity}/{named(path)}": value for path, value in known.items()}
            elif known:
                found[f"batchnorm/{quantity}"] = max(known.values(), key=abs)
        return found

    def write(self, writer: Any, step: int | None = None) -> None:
        """Write the looks that have not been written yet.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`, or any object with its `add_scalar(name, value, step)`.
            step: Write only the last look, at this step. By default, write each look at its own step.
        """
        looks = self._history[-1:] if step is not None else self._history[self._written :]
        for records in looks:
            for record in records:
                for quantity in QUANTITIES:
                    value = getattr(record, quantity)
                    if value is not None and not math.isnan(value):
                        name = f"batchnorm/{quantity}/{named(record.layer)}"
                        writer.add_scalar(name, value, record.step if step is None else step)
        self._written = len(self._history)

    def plot(self) -> Figure:
        """Draw layers against steps, a map for each quantity.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there was no look yet.
        """
        from batchnorm.doctor.watching.picture import draw

        return draw(self._history, self.findings)

    def save(self, path: str | Path) -> None:
        """Write the picture to a file, completely or not at all.

        Args:
            path: Ends in `.png`, `.svg` or `.pdf`.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: the path has another ending, or there was no look yet.
        """
        from batchnorm.doctor.watching.picture import save

        save(self.plot, Path(path))

    def __str__(self) -> str:
        return table(self._history, self.findings, self.steps)


def _check_pace(every: object, overhead: float) -> None:
    if every is not None and (not isinstance(every, int) or isinstance(every, bool)):
        raise TypeError(
            f"watch expects every to be an int, got {every!r} ({type(every).__name__}). It is a number of steps."
        )
    if every is not None and every < 1:
        raise ValueError(f"watch expects every >= 1, got {every}. 1 looks at every step.")
    if not 0 < overhead <= 1:
        raise ValueError(
            f"watch expects overhead in (0, 1], got {overhead}. It is a share of the training time, such as 0.02."
        )
