"""The base of layers that act between statistics and normalization, for example for groups of samples or processes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Proxy

from batchnorm import _checks, _options, distributed, functional, ops
from batchnorm.nn.layer import NormLayer
from batchnorm.ops import BatchStatistics, strict
from batchnorm.ops.eager import values_per_channel


class PartsLayer(NormLayer):
    """A layer with a `forward` in steps that subclasses override: groups of samples, γ and β, running statistics."""

    # Whether training uses the merged statistics of all processes of `process_group`.
    sync: bool = False
    # Whether groups of samples have separate statistics, so that x must have samples.
    _groups_samples: ClassVar[bool] = False
    # The layer's path in its model, shown in errors; `convert` sets it.
    name: str = ""
    # Whether x does not count in the statistics, because this process has run out of batches (see `join`).
    _absent: bool = False
    # The group's name instead of the group, so that layers can be copied, pickled and compiled. None: all processes.
    _group_name: str | None = None

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y for x of the layer's shape; positions where `mask [N, *S]` is 0 do not enter the statistics."""
        if isinstance(input, Proxy):  # a module node of the fx graph, because some arguments are not tensors
            _checks.check_quantization(self.layer_name, self.training, input)
            tracer: Any = input.tracer
            kwargs = {} if mask is None else {"mask": mask}
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), kwargs)
        return self._normalize_by_parts(input, mask)

    @property
    def process_group(self) -> Any:
        """The process group that shares statistics; None: all processes."""
        return None if self._group_name is None else distributed.resolve(self._group_name)

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._group_name = distributed.group_name(group)

    def _peers(self) -> distributed.Peers | None:
        """Return the processes that share statistics in this call; None: this process alone."""
        if not (self.sync and self.training):
            return None
        # Left out while compiling, because every name would need a separate graph.
        name = "" if torch.compiler.is_compiling() else self.name
        return distributed.peers(self._group_name, f"{self.layer_name}({self.num_features})", name)

    @property
    def _uses_batch(self) -> bool:
        """Whether this call normalizes by the batch's statistics."""
        return self.training or (self.running_mean is None and self.running_var is None)

    def _normalize_by_parts(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self._uses_batch:
            return self._normalize(x, mask=mask)
        if isinstance(x, Tensor) and x.is_nested and not self._groups_samples:
            return functional.normalize_jagged(
                lambda x, _, mask: self._normalize_by_parts(x, mask), x, None, mask, self.channel_dim, self.layer_name
            )
        _checks.check_input(self.layer_name, x, self.channel_dim)
        _options.check_eps(self.layer_name, self.eps)
        if x.dim() == 1:  # [0], without samples and channels, which torch accepts
            return x.clone()
        _checks.check_channel_vectors(
            self.layer_name, x, self.channel_dim, weight=self.weight, bias=self.bias,
            running_mean=self.running_mean, running_var=self.running_var,
        )  # fmt: skip
        if self._updates_running:
            _checks.check_update(
                self.layer_name, self.momentum, self.num_batches_tracked,
                running_mean=self.running_mean, running_var=self.running_var,
            )  # fmt: skip
        if self._absent:
            mask = x.new_zeros(1, dtype=torch.bool)
        weights = None if mask is None else _checks.mask_as_weights(self.layer_name, x, mask, self.channel_dim)
        peers = self._peers()
        # With peers, other processes may have more values.
        if peers is None and _checks.uses_running(self.layer_name, x, self.on_single, self.channel_dim):
            return self._normalize(x, mask=mask)
        x = functional.channels_second(x, self.channel_dim)
        index, groups = self._index(x)
        if self._groups_samples and peers is None:
            buffers = self.running_mean, self.running_var, self.num_batches_tracked
            in_one_call = strict.batch_norm_by_parts(
                x, buffers if self._updates_running else (None, None, None), self.weight, self.bias, None, index,
                weights, groups, False, self.eps, "none", 0.0, self.momentum, self.on_nonfinite, self.on_single,
            )  # fmt: skip
            if in_one_call is not None:
                return functional.channels_back(in_one_call, self.channel_dim)
        where_single = None
        if self.on_single == "running":
            assert self.running_mean is not None
            assert self.running_var is not None
            where_single = self.running_mean, self.running_var
        if self._groups_samples and peers is None:
            y, statistics = ops.batch_statistics_norm_and_moments(
                x, self.weight, self.bias, None, self.eps, index=index, weights=weights, groups=groups,
                where_single=where_single,
            )  # fmt: skip
        else:
            y, statistics = self._in_two_halves(x, index, weights, groups, peers, where_single)
        if self.on_nonfinite == "error":  # the statistics, and so the error, are the same on all processes
            count, *found, _ = (t.detach() for t in statistics)
            _checks.check_finite(self.layer_name, *found, count=count)
        if self._updates_running:
            self._update_running(x, statistics)
        return functional.channels_back(y, self.channel_dim)

    def _in_two_halves(
        self,
        x: Tensor,
        index: Tensor | None,
        weights: Tensor | None,
        groups: int,
        peers: distributed.Peers | None,
        where_single: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, BatchStatistics]:
        """Return y and the statistics, between which γ and β are computed and processes exchange moments."""
        statistics = ops.batch_moments(x, index, weights, groups, peers)
        if where_single is not None:
            statistics = ops.running_where_single(statistics, *where_single)
        elif peers is not None and (self._absent or (weights is None and self._has_at_most_one(x))):
            _checks.check_joint_count(self.layer_name, float(statistics.count))  # raises on all processes or on none
        weight, bias = self._affine(statistics)
        y = ops.batch_statistics_norm_by_parts(
            x, statistics, weight, bias, None, self.eps, "none", 0.0, index, weights, groups, peers
        )
        return y, statistics

    def _index(self, x: Tensor) -> tuple[Tensor | None, int]:
        """Return the group of each sample `[N]`, and the number of groups; None: all samples are one group."""
        return None, 1

    def _has_at_most_one(self, x: Tensor) -> bool:
        """Return whether x has at most one value per channel; False while compiling, where this is unknown."""
        return values_per_channel(x) <= 1 and not torch.compiler.is_compiling()

    def _affine(self, statistics: BatchStatistics) -> tuple[Tensor | None, Tensor | None]:
        """Return γ and β for this batch."""
        return self.weight, self.bias

    def _update_running(self, x: Tensor, statistics: BatchStatistics) -> None:
        """Update the running statistics by this batch's, with the unbiased variance."""
        self._update_running_by(statistics.mean, statistics.mean_low, statistics.var, x, statistics.effective_count)

    def _update_running_by(self, mean: Tensor, mean_low: Tensor, var: Tensor, x: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        m = values_per_channel(x)
        ops.update_running_(
            self.running_mean, self.running_var, self.num_batches_tracked, mean.detach(), mean_low.detach(),
            var.detach(), m, count.detach(), self.momentum, self.on_nonfinite != "propagate",
        )  # fmt: skip
