"""Every layer of batch normalization of a model, watched from one optimizer step to the next."""

from __future__ import annotations

import inspect
import math
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchnorm.doctor.finding import Finding
from batchnorm.doctor.inspection import check_model
from batchnorm.doctor.measure.layers import layers_of
from batchnorm.doctor.watch.alarms import Alarms, BatchNormWarning, Seen
from batchnorm.doctor.watch.hooks import (
    has_one_batch,
    is_compiled,
    level_of_user,
    plain,
    remove,
    unwrapped,
    vector,
    weakly,
)
from batchnorm.doctor.watch.pace import Pace
from batchnorm.doctor.watch.record import QUANTITIES, Held, Look, Pool, Record, fetched, recorded
from batchnorm.models.outputs import outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Looks that are kept; then every other one goes, and half as many are taken from there on.
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

    A step ends with the step of an optimizer that has parameters of the model. In some steps each layer is looked at:
    how far running and batch statistics are apart, how noisy the batch's are, which share of the channels is dead, how
    often the running statistics moved. The first look is at the second step, when all that is made once has been made.
    Between the looks nothing is hooked but the optimizer. What is computed in
    training has the same bits as unwatched, and no random number is drawn. Batches in evaluation do not count.

    Nothing is attached to the model: it can be copied, pickled and saved as ever while it is watched. Within compiled
    code no batch is seen: there, distances come from how the running statistics moved, and noise is not known. Under
    `DistributedDataParallel` each process watches its own batches.

    Args:
        model: The network; a wrapper such as `DistributedDataParallel` or a compiled model will do.
        optimizer: The one whose step ends a step of training; None: any that has parameters of the model. Name it
            where several train the model, as in a GAN.
        every: Look at each so manieth step, from the second on; None: as often as `overhead` allows.
        overhead: Share of the training time that looking may take, measured as it goes.
        warn: Whether a rule of the doctor that fires is told as a `BatchNormWarning`, once for each layer; it is in
            `findings` in any case.
        writer: A `torch.utils.tensorboard.SummaryWriter` that each look is written to.

    Returns:
        What was seen; closes at the end of `with`, or by `close()`.

    Raises:
        TypeError: model is no module; every is not an int.
        ValueError: the model has no batch normalization, or layers that have not seen their first batch; every or
            overhead is out of range.

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
    """What `watch` sees; prints as a table of the last look.

    Attributes:
        layers: Paths of the layers, in the model's order.
        steps: Steps of training so far.
        looks: In how many of them the layers were looked at.
        findings: What the doctor's rules found, in the order in which it was found.
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
        self._layers = layers_of(self._root)
        self.layers = tuple(layer.path for layer in self._layers)
        self.steps = self.looks = 0
        self.findings: list[Finding] = []
        self._history: list[list[Record]] = []
        self._written = 0
        self._optimizer = optimizer
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._number = {layer.module: number for number, layer in enumerate(self._layers)}
        self._signatures = [inspect.signature(layer.module.forward) for layer in self._layers]
        self._compiled = any(is_compiled(module) for module in model.modules())
        self._pools = [Pool() for _ in self._layers]
        self._alarms = Alarms(self._root)
        self._warn, self._writer = warn, writer
        self._pace = Pace(overhead, every, clock)
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
        """Stop watching and remove every hook; what was seen stays. May be called again."""
        self.closed = True
        remove(self._handles, self._handles_of_look)

    # Steps ------------------------------------------------------------------------------------------------------------

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._optimizer is not None:
            mine = optimizer is self._optimizer
        else:
            mine = any(id(p) in self._parameters for group in optimizer.param_groups for p in group["params"])
        if mine:
            self.step()

    def step(self) -> None:
        """Say that a step of training is over, where the optimizer is not one of `torch.optim`'s kind."""
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
        for finding in found:  # last, as it raises where warnings are errors
            self._tell(finding)

    def _begin_look(self) -> None:
        self._looks = [Look() for _ in self._layers]
        self._before = self._held()
        self._calls = self._most_calls = 0
        self._waited = False
        if not self._compiled:
            self._handles_of_look.append(register_module_forward_pre_hook(weakly(self._enter)))
            self._handles_of_look.append(register_module_forward_hook(weakly(self._leave), with_kwargs=True))

    def _nothing_seen(self) -> bool:
        if any(look.forward or look.backward for look in self._looks):
            return False
        return all(a.updates == b.updates for a, b in zip(self._before, self._held(), strict=True))

    def _end_look(self) -> list[Finding]:
        remove(self._handles_of_look)
        after = self._held()
        seen = [look.batch for look in self._looks if look.batch is not None]
        batches = iter(fetched(seen))
        records = [
            recorded(self.steps, layer, look, None if look.batch is None else next(batches), pool, before, held)
            for layer, look, pool, before, held in zip(
                self._layers, self._looks, self._pools, self._before, after, strict=True
            )
        ]
        self._history.append(records)
        self.looks += 1
        if any(not look.forward and record.updates for look, record in zip(self._looks, records, strict=True)):
            self._compiled = True  # code that is compiled anew for each hook that it sees: none from here on
        found = self._alarms.findings(Seen(self.steps, self._most_calls, self._layers, self._looks, after, records))
        self.findings += found
        if self._writer is not None:
            self.write(self._writer)
        if len(self._history) > _KEPT and self._pace.every is None:
            del self._history[1::2]
            self._written = len(self._history)
            self._pace.least *= 2
        return found

    def _held(self) -> list[Held]:
        names = ("running_mean", "running_var", "weight", "num_batches_tracked")
        vectors = [[vector(getattr(layer.module, name, None)) for name in names] for layer in self._layers]
        copies = iter(fetched([v for row in vectors for v in row if v is not None]))
        rows = [[None if v is None else next(copies) for v in row] for row in vectors]
        return [Held(plain(m), plain(v), plain(w), None if n is None else int(n.max())) for m, v, w, n in rows]

    def _tell(self, finding: Finding) -> None:
        if not self._warn:
            return
        rank = ""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = f"[rank {torch.distributed.get_rank()}] "
        lines = [f"{rank}{finding.code} {finding.title}: {finding.summary}"]
        lines += [f"  {line}" for line in finding.evidence]
        if finding.repair:
            lines += ["Repair:", *(f"  {line}" for line in finding.repair.splitlines())]
        warnings.warn("\n".join(lines), BatchNormWarning, stacklevel=level_of_user())

    # Hooks ------------------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        number = self._number.get(module)
        if number is None and module is not self._root:
            return
        if not module.training:
            return
        again = torch._C._current_graph_task_id() != -1
        if module is self._root and not again:
            self._calls += 1
            self._most_calls = max(self._most_calls, self._calls)
        if number is not None:
            look = self._looks[number]
            look.forward, look.backward = look.forward + (not again), look.backward + again

    def _backward(self, *_: Any) -> None:
        self._calls = 0

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        number = self._number.get(module)
        if (number is None and module is not self._root) or not module.training:
            return
        if torch._C._current_graph_task_id() != -1:
            return
        if module is self._root:
            node = next((tensor.grad_fn for tensor in outputs(y) if tensor.grad_fn is not None), None)
            if node is not None:
                node.register_prehook(weakly(self._backward))
        if number is None:
            return
        look = self._looks[number]
        if look.batch_size is not None or not has_one_batch(module):
            return
        x: Any = args[0] if args else kwargs.get("input")
        if type(x) not in (Tensor, nn.Parameter) or not x.is_floating_point() or x.dim() < 2:
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        with self._pace.spending():
            if len(args) + len(kwargs) > 1:
                given = self._signatures[number].bind(*args, **kwargs).arguments
                if given.get("mask") is not None:
                    look.batch_size = x.shape[0]
                    return
            look.take(x, self._before[number].mean)

    # What was seen ----------------------------------------------------------------------------------------------------

    @property
    def history(self) -> list[Record]:
        """Every look that is kept, layer by layer: `pandas.DataFrame(w.history)` makes a table of it.

        With `every=` all are kept; without, up to a thousand, evenly over the run.
        """
        return [record for records in self._history for record in records]

    @property
    def cost(self) -> float | None:
        """Seconds that the last look took; None before the first."""
        return self._pace.cost

    def metrics(self, *, per_layer: bool = True) -> dict[str, float]:
        """The last look as figures by name, for loggers; empty before the first.

        Args:
            per_layer: `batchnorm/<quantity>/<layer>` for each layer; otherwise `batchnorm/<quantity>`, of the layer
                where it is largest in size.
        """
        found: dict[str, float] = {}
        for quantity in QUANTITIES:
            values = {r.layer: getattr(r, quantity) for r in (self._history[-1] if self._history else ())}
            known = {path: float(v) for path, v in values.items() if v is not None and not math.isnan(v)}
            if per_layer:
                found |= {f"batchnorm/{quantity}/{path or '(model)'}": value for path, value in known.items()}
            elif known:
                found[f"batchnorm/{quantity}"] = max(known.values(), key=abs)
        return found

    def write(self, writer: Any, step: int | None = None) -> None:
        """Write what was not written yet.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`, or what has its `add_scalar(name, value, step)`.
            step: Where on its axis the last look belongs, which is then all that is written; None writes each look at
                its own step.
        """
        looks = self._history[-1:] if step is not None else self._history[self._written :]
        for records in looks:
            for record in records:
                for quantity in QUANTITIES:
                    value = getattr(record, quantity)
                    if value is not None and not math.isnan(value):
                        name = f"batchnorm/{quantity}/{record.layer or '(model)'}"
                        writer.add_scalar(name, value, record.step if step is None else step)
        self._written = len(self._history)

    def plot(self) -> Figure:
        """Draw layers against steps, a map for each quantity.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: nothing was seen yet.
        """
        from batchnorm.doctor.watch.picture import draw

        return draw(self._history, self.findings)

    def save(self, path: str | Path) -> None:
        """Write the picture to a file: whole, or not at all.

        Args:
            path: Ends in `.png`, `.svg` or `.pdf`.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: the path ends in something else, or nothing was seen yet.
        """
        from batchnorm.doctor.watch.picture import save

        save(self.plot, Path(path))

    def __str__(self) -> str:
        from batchnorm.doctor.watch.table import table

        return table(self._history, self.findings, self.steps)


def _check_pace(every: object, overhead: float) -> None:
    if every is not None and (not isinstance(every, int) or isinstance(every, bool)):
        raise TypeError(f"watch expects every to be an int, got {every!r} ({type(every).__name__}). It counts steps.")
    if every is not None and every < 1:
        raise ValueError(f"watch expects every >= 1, got {every}. 1 looks at every step.")
    if not 0 < overhead <= 1:
        raise ValueError(
            f"watch expects overhead in (0, 1], got {overhead}. It is a share of the training time, such as 0.02."
        )
