"""Batch normalization with separate statistics for each domain."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm import _options
from batchnorm.nn.rows import PlainBatchNorm, RowsLayer, checked_number_of_rows, checked_row


@dataclass(frozen=True, eq=False)
class _Block:
    """A `use_domain` block that has been entered.

    Attributes:
        domain: The domain that it sets.
        backward: The backward pass in which it was entered, or -1.
        can_suspend: Whether it is in a coroutine, which may suspend it.
    """

    domain: int | Tensor
    backward: int
    can_suspend: bool


# The blocks of the current context. In asyncio, each task has its own context. The last block applies.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("batchnorm.nn.use_domain", default=())
# A value instead of a domain, if the blocks of a thread belong to several contexts.
_SEVERAL = "several"


class _Current(threading.local):
    """The domain of this thread, for `torch.compile`, which does not support context variables.

    Compiled code must read the context, with a graph break, in three cases: the thread has no blocks, it has blocks of
    other contexts, or it may get some when it runs another task.
    """

    domain: int | Tensor | str | None = None
    backward: int = -1
    blocks: tuple[_Block, ...] = ()


_current = _Current()


def _set_blocks(of_context: tuple[_Block, ...], of_thread: tuple[_Block, ...]) -> None:
    _blocks.set(of_context)
    _current.blocks = of_thread
    if of_context != of_thread or any(block.can_suspend for block in of_thread):
        _current.domain, _current.backward = _SEVERAL, -1
    else:
        last = of_context[-1:]
        _current.domain = last[0].domain if last else None
        _current.backward = last[0].backward if last else -1


def _domain_and_backward() -> tuple[int | Tensor | None, int]:
    """Return the domain of the innermost `use_domain`, and the backward pass in which it was entered."""
    if torch.compiler.is_compiling() and _current.domain is not None and not isinstance(_current.domain, str):
        return _current.domain, _current.backward
    blocks = _blocks.get()
    return (blocks[-1].domain, blocks[-1].backward) if blocks else (None, -1)


def _backward_pass() -> int:
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _is_in_coroutine(depth: int) -> bool:
    """Return whether the caller's frame, or the one `depth` frames above it, is a coroutine or an async generator."""
    return bool(sys._getframe(depth + 1).f_code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR))


@contextmanager
def use_domain(domain: int | Tensor) -> Iterator[None]:
    """Set the domain of every `DomainBatchNorm` called within the block, for models that do not pass a domain.

    It also works as a decorator. Blocks can be nested, and the innermost one applies. An argument of the layer's call
    overrides it. The block applies to the current thread, and in asyncio to the current task. Replicas that
    `DataParallel` creates within it inherit the domain if it is an int. Activation checkpointing repeats layers inside
    backward, when this block has ended or another is active. There, the layers raise an error unless
    `context_fn=keep_domain` restores the domain.

    Args:
        domain: An int for all samples, or an int64 tensor `[N]`, one for each.

    Raises:
        TypeError: domain is neither. (Each layer checks the range.)

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), DomainBatchNorm1d(4, num_domains=2), torch.nn.ReLU())
        >>> with use_domain(1):
        ...     y = model(torch.rand(8, 3))
        >>> model[1].num_batches_tracked
        tensor([0, 1])
    """
    chosen = domain if isinstance(domain, Tensor) else _options.as_integer(domain)
    if chosen is None:
        raise TypeError(
            f"use_domain expects an int or an int64 tensor [N], got {domain!r} ({type(domain).__name__}). "
            "Pass the number of the domain, counted from 0."
        )
    if torch.compiler.is_compiling():  # nothing is suspended within compiled code
        former = _current.domain, _current.backward
        _current.domain, _current.backward = chosen, -1
        try:
            yield
        finally:
            _current.domain, _current.backward = former
        return
    block = _Block(chosen, _backward_pass(), _is_in_coroutine(2))
    _set_blocks((*_blocks.get(), block), (*_current.blocks, block))
    try:
        yield
    finally:  # blocks of generators may end in any order
        _set_blocks(*(tuple(b for b in blocks if b is not block) for blocks in (_blocks.get(), _current.blocks)))


def keep_domain() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Restore the domain of `use_domain` in a recomputation: `context_fn` of `torch.utils.checkpoint.checkpoint`.

    Returns:
        The contexts of the first pass and of the recomputation, which uses the domain that is active now.

    Examples:
        >>> from torch.utils.checkpoint import checkpoint
        >>> block = torch.nn.Sequential(torch.nn.Linear(3, 4), DomainBatchNorm1d(4, num_domains=2))
        >>> with use_domain(1):
        ...     y = checkpoint(block, torch.rand(8, 3), use_reentrant=False, context_fn=keep_domain)
        >>> y.sum().backward()
    """
    domain, _ = _domain_and_backward()
    return nullcontext(), nullcontext() if domain is None else use_domain(domain)


class DomainBatchNorm(RowsLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization with separate statistics of each domain, for `[N, C, *S]` with any number of dimensions.

    A batch, or each sample, belongs to one of `num_domains` domains, such as real and generated images, source and
    target, clean and adversarial, or teacher and student. Each domain has its own statistics and running statistics.
    Outputs, gradients and buffers are the same as with one `BatchNorm` per domain, called with the domain's part of the
    batch. All domains are computed in one pass.

    Pass the domain in the call, or enclose the model's call in `use_domain`.

    Args:
        num_features: C. All arguments that are not listed here are those of `BatchNorm`.
        momentum: Weight of the new batch; None gives the cumulative average over the domain's batches.
        on_nonfinite: "propagate" or "skip", separately for each domain; or "error".
        on_single: "error" or "running"; "running" applies to each domain separately.
        num_domains: K (keyword only).
        affine_per_domain: Whether weight and bias are `[K, C]`, one row per domain, instead of `[C]` (keyword only).

    Attributes:
        running_mean: `[K, C]`.
        running_var: `[K, C]`.
        num_batches_tracked: `[K]`, the number of batches with a sample of the domain.

    Shape:
        x and y: `[N, C, *S]`; domain: an int, or int64 `[N]`.

    A domain without samples does not change. A domain with a single value in a mixed batch has no variance: its output
    is β, and only the running mean is updated. With `on_single="running"`, it is normalized by its running statistics,
    and nothing is updated. The `state_dict` of plain batch normalization loads (with `strict=True`) into every domain;
    `select` returns the plain layer of one domain.

    Raises:
        TypeError: as `BatchNorm`; the domain is neither an int nor an int64 tensor.
        ValueError: as `BatchNorm`; there is no domain, it is out of range (checked for tensors on the CPU only), or its
            shape is not `[N]`.
        RuntimeError: in a recomputation inside backward, the domain comes from a `use_domain` without `keep_domain`.

    Numerics: as `batchnorm.functional.batch_norm`. The layer is a torch `_BatchNorm`, but not a `BatchNorm2d`, because
    tools expect vectors `[C]` there.

    Source: Chang et al. 2019, Domain-Specific Batch Normalization (with `affine_per_domain`); Xie et al. 2020,
    Adversarial Examples Improve Image Recognition; Li et al. 2017, Revisiting Batch Normalization for Practical Domain
    Adaptation.

    Examples:
        >>> layer = DomainBatchNorm(1, num_domains=2)
        >>> x = torch.tensor([[0.0], [100.0], [2.0], [104.0]])
        >>> layer(x, torch.tensor([0, 1, 0, 1])).detach().round(decimals=3)
        tensor([[-1.],
                [-1.],
                [ 1.],
                [ 1.]])
        >>> layer.running_mean
        tensor([[ 0.1000],
                [10.2000]])
    """

    layer_name = "DomainBatchNorm"

    _replica_domain: int | None = None

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        num_domains: int, affine_per_domain: bool = False,
    ) -> None:  # fmt: skip
        requirement = f"{self.layer_name} expects num_domains to be an int >= 1"
        num_domains = checked_number_of_rows(requirement, num_domains, "Pass the number of domains.")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.num_domains = num_domains
        self.affine_per_domain = affine_per_domain
        self._make_rows(num_domains, ("running_mean", "running_var", "num_batches_tracked"))
        if affine_per_domain:
            self._make_rows(num_domains, ("weight", "bias"))

    def forward(  # type: ignore[override]  # the domain is second, because generic callers pass only x
        self, input: Tensor, domain: int | Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return y for x of the layer's shape.

        Args:
            input: x, `[N, C, *S]`.
            domain: The domain of all samples, or int64 `[N]`; None: the domain of `use_domain`.
            mask: The positions that count, as in `batchnorm.functional.batch_norm`.
        """
        domain = self._current_domain() if domain is None else domain
        return self._normalize_by_rows(
            input, domain, self.num_domains, self.weight, self.bias, mask, own_statistics=True, choice_name="domain"
        )

    def _current_domain(self) -> int | Tensor:
        domain, backward = _domain_and_backward()
        domain = self._replica_domain if domain is None else domain
        if _backward_pass() not in (-1, backward):
            raise RuntimeError(
                f"{self.layer_name} expects the domain of the first pass when activation checkpointing repeats it, "
                "got an unknown one: `use_domain` of the forward pass has ended, or another is active. Pass "
                "context_fn=batchnorm.nn.keep_domain to checkpoint (use_reentrant=False), or domain to the layer."
            )
        if domain is None:
            raise ValueError(
                f"{self.layer_name} expects a domain, got none. Pass layer(x, domain), or call the model within "
                "`with batchnorm.nn.use_domain(domain):` in the same thread and task."
            )
        return domain

    def _replicate_for_data_parallel(self) -> DomainBatchNorm:
        replica: DomainBatchNorm = super()._replicate_for_data_parallel()
        domain, _ = _domain_and_backward()
        if isinstance(domain, int):  # replicas run in other threads
            replica._replica_domain = domain
        return replica

    def select(self, domain: int) -> PlainBatchNorm:
        """Return plain batch normalization with copies of one domain's parameters and buffers.

        Raises:
            ValueError: domain is not in `[0, num_domains)`.
        """
        return self._plain(checked_row(self.layer_name, "domain", domain, self.num_domains))

    def extra_repr(self) -> str:
        """Describe the batch normalization and the domains."""
        parts = [super().extra_repr(), f"num_domains={self.num_domains}"]
        if self.affine_per_domain:
            parts.append("affine_per_domain=True")
        return ", ".join(parts)


class DomainBatchNorm1d(DomainBatchNorm):
    """`DomainBatchNorm` of `[N, C]` or `[N, C, L]`.

    Examples:
        >>> DomainBatchNorm1d(8, num_domains=2)(torch.rand(4, 8, 100), 1).shape
        torch.Size([4, 8, 100])
    """

    layer_name = "DomainBatchNorm1d"


class DomainBatchNorm2d(DomainBatchNorm):
    """`DomainBatchNorm` of `[N, C, H, W]`.

    Examples:
        >>> layer = DomainBatchNorm2d(8, num_domains=2)
        >>> _ = layer.load_state_dict(torch.nn.BatchNorm2d(8).state_dict())
        >>> layer(torch.rand(4, 8, 5, 5), torch.tensor([0, 0, 1, 1])).shape
        torch.Size([4, 8, 5, 5])
        >>> layer.select(1)
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    layer_name = "DomainBatchNorm2d"


class DomainBatchNorm3d(DomainBatchNorm):
    """`DomainBatchNorm` of `[N, C, D, H, W]`.

    Examples:
        >>> DomainBatchNorm3d(2, num_domains=2)(torch.rand(4, 2, 3, 5, 5), 0).shape
        torch.Size([4, 2, 3, 5, 5])
    """

    layer_name = "DomainBatchNorm3d"
