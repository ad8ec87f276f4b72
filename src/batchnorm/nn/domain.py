"""Batch normalization with statistics for each of several domains."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from batchnorm.nn import batch
from batchnorm.nn.rows import RowsLayer, batch_norm_by_rows, check_row


class _Current(threading.local):
    """What the innermost `use_domain` of this thread says; a context variable would not compile."""

    domain: int | Tensor | None = None
    backward: int = -1  # the pass of autograd in which it was entered; -1: none


_current = _Current()


def _backward_pass() -> int:
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@contextmanager
def use_domain(domain: int | Tensor) -> Iterator[None]:
    """Choose the domain of every `DomainBatchNorm` that is called within, for models that do not pass it on.

    Also a decorator. The innermost one counts, and an argument to the layer counts more. It holds in the thread that
    entered it; the replicas that `DataParallel` makes within take it along where it is an int. Activation
    checkpointing runs layers again inside backward, where the `with` of the forward pass is over, or another's: there
    it is refused, unless `context_fn=keep_domain` brings it back.

    Args:
        domain: An int for all samples, or an int64 tensor `[N]`, one for each.

    Raises:
        TypeError: domain is neither. (Whether it is in range is for each layer to say.)

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), DomainBatchNorm1d(4, num_domains=2), torch.nn.ReLU())
        >>> with use_domain(1):
        ...     y = model(torch.rand(8, 3))
        >>> model[1].num_batches_tracked
        tensor([0, 1])
    """
    if not isinstance(domain, int | Tensor) or isinstance(domain, bool):
        raise TypeError(
            f"use_domain expects an int or an int64 tensor [N], got {domain!r} ({type(domain).__name__}). "
            "Pass the number of the domain, counted from 0."
        )
    former = _current.domain, _current.backward
    _current.domain, _current.backward = domain, _backward_pass()
    try:
        yield
    finally:
        _current.domain, _current.backward = former


def keep_domain() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Carry the domain of `use_domain` into recomputation: `context_fn` of `torch.utils.checkpoint.checkpoint`.

    Returns:
        The contexts of the first pass and of the second, which chooses the domain chosen now.

    Examples:
        >>> from torch.utils.checkpoint import checkpoint
        >>> block = torch.nn.Sequential(torch.nn.Linear(3, 4), DomainBatchNorm1d(4, num_domains=2))
        >>> with use_domain(1):
        ...     y = checkpoint(block, torch.rand(8, 3), use_reentrant=False, context_fn=keep_domain)
        >>> y.sum().backward()
    """
    return nullcontext(), nullcontext() if _current.domain is None else use_domain(_current.domain)


class DomainBatchNorm(RowsLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization with statistics of each domain, for `[N, C, *S]` with any number of spatial dimensions.

    A batch, or each sample, belongs to one of `num_domains`: real and generated images, source and target, clean and
    adversarial, teacher's and student's. Samples of a domain are normalized by their own statistics and move their
    own running statistics: outputs, gradients and buffers are those of one `BatchNorm` for each domain, called with
    its part of the batch. All are computed in one pass.

    The domain is an argument of the call, or comes from a `use_domain` around the model.

    Args:
        num_features: C; it and the arguments up to `on_nonfinite` are those of `BatchNorm`.
        eps: As in `BatchNorm`.
        momentum: As in `BatchNorm`; None averages over a domain's own batches.
        affine: As in `BatchNorm`.
        track_running_stats: As in `BatchNorm`.
        device: As in `BatchNorm`.
        dtype: As in `BatchNorm`.
        bias: As in `BatchNorm`.
        on_nonfinite: As in `BatchNorm`, for each domain.
        num_domains: K (keyword only).
        affine_per_domain: Whether weight and bias are `[K, C]`, one row for each domain, or `[C]` for all (keyword
            only).

    Attributes:
        running_mean: `[K, C]`.
        running_var: `[K, C]`.
        num_batches_tracked: `[K]`: batches that had a sample of the domain.

    Shape:
        x and y: `[N, C, *S]`; domain: an int, or int64 `[N]`.

    A domain that no sample belongs to stays as it is. One with a single value in a mixed batch has no variance: that
    value becomes β, and moves the running mean alone. The state of plain batch normalization loads, strictly, into
    every domain; `select` gives one back.

    Raises:
        TypeError: as `BatchNorm`; the domain is neither an int nor an int64 tensor.
        ValueError: as `BatchNorm`; there is no domain, or it is out of range (of a tensor on the CPU), or not of
            shape `[N]`.
        RuntimeError: the domain comes from a `use_domain` that a recomputation inside backward must not trust.

    Numerics: as `batchnorm.functional.batch_norm`. As a `_BatchNorm` it is found by tools that look for one, but it is
    no `BatchNorm2d`, whose vectors are `[C]`.

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
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        on_nonfinite: str = "propagate",
        num_domains: int,
        affine_per_domain: bool = False,
    ) -> None:
        if not isinstance(num_domains, int) or isinstance(num_domains, bool) or num_domains < 1:
            raise ValueError(
                f"{self.layer_name} expects num_domains to be an int >= 1, got {num_domains!r}. "
                "Pass how many domains there are."
            )
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            on_nonfinite=on_nonfinite,
        )
        self.num_domains = num_domains
        self.affine_per_domain = affine_per_domain
        self._make_rows(num_domains, ("running_mean", "running_var", "num_batches_tracked"))
        if affine_per_domain:
            self._make_rows(num_domains, ("weight", "bias"))

    def forward(  # type: ignore[override]  # a domain comes second: no caller passes a mask unasked
        self, input: Tensor, domain: int | Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return y for x of the shape that the layer names.

        Args:
            input: x, `[N, C, *S]`.
            domain: The domain of all samples, or int64 `[N]`; None: that of `use_domain`.
            mask: Which positions count, as in `batchnorm.functional.batch_norm`.
        """
        moves = self.training and self.track_running_stats and self.update_running_stats
        tracked = moves or not self.training
        return batch_norm_by_rows(
            input,
            self._current_domain() if domain is None else domain,
            self.num_domains,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.num_batches_tracked if moves else None,
            self.weight,
            self.bias,
            mask,
            own_statistics=True,
            training=self.training or self.running_mean is None,
            momentum=self.momentum,
            eps=self.eps,
            on_nonfinite=self.on_nonfinite,
            caller=self.layer_name,
            name="domain",
        )

    def _current_domain(self) -> int | Tensor:
        domain = self._replica_domain if _current.domain is None else _current.domain
        if _backward_pass() not in (-1, _current.backward):
            raise RuntimeError(
                f"{self.layer_name} expects the domain of its first pass where activation checkpointing runs it again, "
                "got none that is sure: `use_domain` of the forward pass is over, or another's. Pass "
                "context_fn=batchnorm.nn.keep_domain to checkpoint (use_reentrant=False), or domain to the layer."
            )
        if domain is None:
            raise ValueError(
                f"{self.layer_name} expects a domain, got none. Pass layer(x, domain), or call the model within "
                "`with batchnorm.nn.use_domain(domain):` in the same thread."
            )
        return domain

    def _replicate_for_data_parallel(self) -> DomainBatchNorm:
        replica: DomainBatchNorm = super()._replicate_for_data_parallel()
        if isinstance(_current.domain, int):  # replicas run in threads that do not see it
            replica._replica_domain = _current.domain
        return replica

    def select(self, domain: int) -> batch.BatchNorm | batch.BatchNorm1d | batch.BatchNorm2d | batch.BatchNorm3d:
        """Return plain batch normalization with copies of one domain's parameters and buffers.

        Raises:
            ValueError: domain is not in `[0, num_domains)`.
        """
        check_row(self.layer_name, "domain", domain, self.num_domains)
        return self._plain(domain)

    def extra_repr(self) -> str:
        """The description of batch normalization, then the domains."""
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
