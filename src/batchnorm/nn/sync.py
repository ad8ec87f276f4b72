"""Batch normalization synchronized over the processes of a group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm import walk
from batchnorm.nn.parts import PartsLayer
from batchnorm.undo import restorer


class SyncBatchNorm(PartsLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization of `[N, C, *S]` by the statistics of all processes' batches together.

    In training, the layer computes the same mean, variance, running statistics and gradient of x as one process with
    the joined batch of all processes. Each process may have any number of samples, even none. The equations are those
    of `BatchNorm`. Forward uses one collective (count, mean and sum of squared deviations), and backward uses another
    (two sums per channel). In evaluation, without `torch.distributed`, or with a single process in the group, the layer
    computes the same as `BatchNorm` and does not communicate.

    The gradient of x is the gradient of the sum of all processes' losses. The gradients of weight and bias are this
    process's part of it, and `DistributedDataParallel` averages them over the processes. With batches of equal size,
    the averages are the gradients of the joined batch's mean loss. Otherwise, multiply each process's mean loss by
    `n·W/Σn`, where n is its number of samples and W the number of processes.

    Every process must call the same synchronized layers in the same order, forward and backward.

    Args:
        num_features: C, the number of x's channels; the same on every process.
        eps: Added to the variance; positive.
        momentum: Weight of the new batch, in [0, 1]. None gives the cumulative average of all batches.
        affine: Whether there are weight (γ) and bias (β), each `[C]`.
        track_running_stats: Whether there are running statistics; without them, evaluation uses the local batch's.
        process_group: The processes to join, from `torch.distributed.new_group`; None: all.
        device: The device of parameters and buffers.
        dtype: The dtype of parameters and buffers.
        bias: Whether there is β (keyword only).
        on_nonfinite: As in `BatchNorm`, for the joint statistics: with "error", all processes raise the error; the same
            on every process (keyword only).
        on_single: As in `BatchNorm`, for the values of all processes together; the same on every process (keyword
            only).
        channel_dim: As in `BatchNorm` (keyword only).
        name: The layer's name in errors, usually its path in the model; the same on every process (keyword only).

    Attributes:
        process_group: The process group, which can be changed. A copy of the layer keeps it. An unpickled layer finds
            its group by name.
        name: The layer's name in errors.

    Shape:
        x and y: `[N, C, *S]`, where N and `*S` may differ between processes.
        mask: booleans or weights, broadcastable to `[N, *S]`; positions where it is 0 do not enter the statistics.

    Raises:
        TypeError: num_features is not an int; process_group is not a process group; in forward, x is not a
            floating-point tensor, or its dtype does not match that of the parameters.
        ValueError: eps, momentum, on_nonfinite, on_single or channel_dim out of range; this process is not in
            process_group; in forward, a wrong rank or number of channels, or one value per channel over all processes
            in training if on_single is "error".
        RuntimeError: in forward or backward, a process died, has another number of channels or is in another layer.
            Every remaining process raises this error within the group's timeout. It names the layer and the ranks.

    Numerics: for all dtypes, the processes exchange float64 and merge in the order of ranks. Their running statistics
    are therefore bitwise equal.

    Source: Ioffe & Szegedy 2015, algorithm 1, over the joined batch; moments merged after Chan, Golub & LeVeque 1979.

    Examples:
        >>> layer = SyncBatchNorm(3)  # alone: as BatchNorm
        >>> layer(torch.rand(4, 3, 5, 5)).shape
        torch.Size([4, 3, 5, 5])
    """

    layer_name = "SyncBatchNorm"
    sync = True

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, process_group: Any = None, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        name: str = "",
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.process_group = process_group
        self.name = name

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y for x `[N, C, *S]`; positions where `mask [N, *S]` is 0 do not enter the statistics."""
        if self._peers() is None:
            return self._normalize(input, mask=mask)
        return super().forward(input, mask)

    def extra_repr(self) -> str:
        """Describe the layer: torch's description, and the options that differ from their defaults."""
        parts = [super().extra_repr()]
        parts += [f"process_group={self._group_name!r}"] * (self._group_name is not None)
        parts += [f"name={self.name!r}"] * bool(self.name)
        return ", ".join(parts)


@contextmanager
def join(parallel: DistributedDataParallel, example_inputs: tuple[Any, ...] | None = None) -> Iterator[None]:
    """Let the processes of `DistributedDataParallel` train on different numbers of batches, also with `SyncBatchNorm`.

    Use it in place of `parallel.join()`, which does not work with synchronized layers. A process that has run out of
    batches still takes part in every step of the others. It runs the model on its last batch, which does not count in
    any statistics, and whose gradients are 0. The others therefore compute the statistics and gradients of their own
    samples. `parallel` divides the sum of gradients by the number of all processes, including those that ran out. At
    the end, every process gets the parameters and buffers of a process that ran out last.

    In a process that ran out, layers without synchronization keep their running statistics until the end. If the block
    raises on one process, the others raise an error after the group's timeout.

    Args:
        parallel: The model. Its synchronized layers must belong to its process group.
        example_inputs: Positional arguments of the model, for a process that may have no batch at all.

    Raises:
        TypeError: parallel is not a DistributedDataParallel.
        RuntimeError: this process had no batch, and there are no example_inputs.

    Examples:
        >>> def train(parallel, batches, optimizer):
        ...     with join(parallel):
        ...         for x, labels in batches:
        ...             optimizer.zero_grad()
        ...             torch.nn.functional.cross_entropy(parallel(x), labels).backward()
        ...             optimizer.step()
    """
    if not isinstance(parallel, DistributedDataParallel):
        raise TypeError(
            f"join expects a model in DistributedDataParallel, got {type(parallel).__name__}. Wrap it first; a "
            "single process needs no join."
        )
    shared = _Join(parallel, example_inputs)
    with shared.watching():
        yield
    last = True
    while any(step := shared.exchange_flags(has_batch=False)):
        shared.take_part(*step[1:])
        last = False
    shared.copy_from_one(last)


class _Join:
    """The part of one process in `join`."""

    def __init__(self, parallel: DistributedDataParallel, example: tuple[Any, ...] | None) -> None:
        self.parallel = parallel
        self.group = parallel.process_group
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None if example is None else (example, {})
        self.used: set[int] = set()  # the outputs that the last loss depended on

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Announce every call of the model to the other processes, and keep its arguments."""

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.exchange_flags(has_batch=True)
            self.inputs = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))

        def after(_: Any, args: Any, output: Any) -> None:
            self.used = set()
            for number, tensor in enumerate(_trained(output)):
                tensor.register_hook(lambda _, number=number, used=self.used: used.add(number))

        handles = [
            self.parallel.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            self.parallel.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def exchange_flags(self, *, has_batch: bool) -> list[bool]:
        """Return whether any process has a batch, and whether it needs gradients, is in training, and reduces them."""
        parallel = self.parallel
        state = (True, torch.is_grad_enabled(), parallel.training, parallel.require_backward_grad_sync)
        flags = torch.tensor([has_batch and flag for flag in state], dtype=torch.float32, device=parallel.join_device)
        dist.all_reduce(flags, group=self.group)
        return [flag > 0 for flag in flags.tolist()]

    def take_part(self, gradients: bool, training: bool, reduced: bool) -> None:
        """Run the model as the other processes do, with values that do not count."""
        if self.inputs is None:
            raise RuntimeError(
                "join expects at least one batch on every process, got none on this one. Pass example_inputs=, "
                "arguments that the model takes."
            )
        parallel = self.parallel
        layers = [m for m in parallel.modules() if isinstance(m, PartsLayer) and m.sync]
        others = [b for m in parallel.modules() if m not in layers for b in m.buffers(recurse=False)]
        args, kwargs = self.inputs
        with ExitStack() as undo:
            undo.enter_context(walk.restored(parallel))
            undo.enter_context(torch.set_grad_enabled(gradients))
            undo.enter_context(nullcontext() if reduced else parallel.no_sync())
            if not training:
                walk.set_mode(parallel, training=False)
            for buffer in others:
                undo.callback(restorer(buffer))
            for layer in layers:
                layer._absent = True
                undo.callback(layer.__dict__.pop, "_absent")
            results = _trained(parallel(*args, **kwargs))
            if gradients and results:
                chosen = [results[number] for number in sorted(self.used)] or results
                torch.autograd.backward(chosen, [torch.zeros_like(result) for result in chosen])
        parallel.zero_grad()

    @torch.no_grad()
    def copy_from_one(self, last: bool) -> None:
        """Copy the parameters and buffers of a process that ran out last to every process."""
        rank = torch.tensor(dist.get_rank(self.group) if last else -1, device=self.parallel.join_device)
        dist.all_reduce(rank, op=dist.ReduceOp.MAX, group=self.group)
        source = dist.get_global_rank(self.group, int(rank))
        for tensor in (*self.parallel.module.parameters(), *self.parallel.module.buffers()):
            dist.broadcast(tensor, source, group=self.group)


def _trained(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
