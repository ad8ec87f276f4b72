"""Batch normalization with statistics for each of several domains."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from batchnorm.nn.rows import PlainBatchNorm, RowsLayer, check_number_of_rows, check_row


class _Current(threading.local):
    """The domain of this thread's innermost `use_domain`; a context variable would not compile."""

    domain: int | Tensor | None = None
    backward: int = -1  # the backward pass in which it was entered; -1: none


_current = _Current()


def _backward_pass() -> int:
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@contextmanager
def use_domain(domain: int | Tensor) -> Iterator[None]:
    """Choose the domain of every `DomainBatchNorm` called within the block, for models that do not pass it on.

    It is also a decorator. The innermost one applies, and an argument to the layer overrides it. It applies to the
    thread that entered it; the replicas that `DataParallel` makes within the block inherit a domain that is an int.
    Activation checkpointing runs layers again inside backward, where the block of the forward pass has ended or another
    is active: the layers refuse the domain there, unless `context_fn=keep_domain` restores it.

    Args:
        domain: An int for all samples, or an int64 tensor `[N]`, one for each.

    Raises:
        TypeError: domain is neither. (Each layer checks whether it is in range.)

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
        The contexts of the first pass and of the recomputation, which chooses the domain that is active now.

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
    adversarial, teacher's and student's. Each domain's samples are normalized by their own statistics and move their
    own running statistics: outputs, gradients and buffers are those of one `BatchNorm` for each domain, called with
    its part of the batch. All domains are computed in one pass.

    The domain is an argument of the call, or comes from a `use_domain` around the model.

    Args:
        num_features: C. The arguments that are not listed here are those of `BatchNorm`.
        momentum: Weight of the new batch; None averages over a domain's own batches.
        on_nonfinite: "propagate" or "skip", for each domain by itself.
        num_domains: K (keyword only).
        affine_per_domain: Whether weight and bias are `[K, C]`, one row for each domain, or `[C]` for all (keyword
            only).

    Attributes:
        running_mean: `[K, C]`.
        running_var: `[K, C]`.
        num_batches_tracked: `[K]`: batches that had a sample of the domain.

    Shape:
        x and y: `[N, C, *S]`; domain: an int, or int64 `[N]`.

    A domain without samples stays unchanged. A domain with a single value in a mixed batch has no variance: its output
    is β, and only the running mean is updated. The state of plain batch normalization loads, strictly, into every
    domain; `select` returns the plain layer of one.

    Raises:
        TypeError: as `BatchNorm`; the domain is neither an int nor an int64 tensor.
        ValueError: as `BatchNorm`; there is no domain, or it is out of range (of a tensor on the CPU), or not of
            shape `[N]`.
        RuntimeError: in a recomputation inside backward, the domain comes from a `use_domain` without `keep_domain`.

    Numerics: as `batchnorm.functional.batch_norm`. Tools that look for torch's `_BatchNorm` find it, but it is
    not a `BatchNorm2d`, whose vectors are `[C]`.

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
        bias: bool = True, on_nonfinite: str = "propagate", num_domains: int, affine_per_domain: bool = False,
    ) -> None:  # fmt: skip
        requirement = f"{self.layer_name} expects num_domains to be an int >= 1"
        check_number_of_rows(requirement, num_domains, "Pass how many domains there are.")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite,
        )  # fmt: skip
        self.num_domains = num_domains
        self.affine_per_domain = affine_per_domain
        self._make_rows(num_domains, ("running_mean", "running_var", "num_batches_tracked"))
        if affine_per_domain:
            self._make_rows(num_domains, ("weight", "bias"))

    def forward(  # type: ignore[override]  # a domain comes second: no caller passes a mask unasked
        self, input: Tensor, domain: int | Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return y for x of the layer's shape.

        Args:
            input: x, `[N, C, *S]`.
            domain: The domain of all samples, or int64 `[N]`; None: the domain of `use_domain`.
            mask: Which positions count, as in `batchnorm.functional.batch_norm`.
        """
        domain = self._current_domain() if domain is None else domain
        return self._normalize_by_rows(
            input, domain, self.num_domains, self.weight, self.bias, mask, own_statistics=True, choice_name="domain"
        )

    def _current_domain(self) -> int | Tensor:
        domain = self._replica_domain if _current.domain is None else _current.domain
        if _backward_pass() not in (-1, _current.backward):
            raise RuntimeError(
                f"{self.layer_name} expects the domain of its first pass where activation checkpointing runs it again, "
                "got none that is certain: `use_domain` of the forward pass has ended, or another is active. Pass "
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
        if isinstance(_current.domain, int):  # replicas run in other threads
            replica._replica_domain = _current.domain
        return replica

    def select(self, domain: int) -> PlainBatchNorm:
        """Return plain batch normalization with copies of one domain's parameters and buffers.

        Raises:
            ValueError: domain is not in `[0, num_domains)`.
        """
        check_row(self.layer_name, "domain", domain, self.num_domains)
        return self._plain(domain)

    def extra_repr(self) -> str:
        """Describe the batch normalization, then the domains."""
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
