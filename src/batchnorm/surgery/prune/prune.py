"""Remove the channels that batch normalization scales to (almost) zero."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import _checks, _options, walk
from batchnorm.distributed.owners import check_not_reduced, check_not_sharded
from batchnorm.models import gate
from batchnorm.models.data.inputs import Inputs, evaluate, not_taken
from batchnorm.models.data.outputs import outputs
from batchnorm.models.description import describe
from batchnorm.models.execution.recording import fewer_samples
from batchnorm.models.graphs import lowering
from batchnorm.models.graphs import model_graph as tracing
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.models.report import Change, Result
from batchnorm.models.selection import Selection, select
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.prune.channels import Channels
from batchnorm.surgery.prune.choice import ChannelsByGamma
from batchnorm.surgery.prune.edits import Edits, Owners
from batchnorm.surgery.prune.report import PruneError, PruneReport

_CALLER = "prune_channels"
_SAMPLES = 2  # samples of the example that the network is traced with
_RUNS = 4  # forward passes that are timed; the first one is slower


def prune_channels(
    model: nn.Module,
    example_inputs: Any,
    *,
    share: float | None = None,
    threshold: float | None = None,
    only: Selection | None = None,
    inplace: bool = False,
) -> Result[PruneReport]:
    """Remove channels whose γ is zero or small from the layers around each batch normalization (network slimming).

    A channel whose γ is zero has the constant value β. The layers that compute it lose their filters for it, and the
    layers that read it lose their weights for it. The constant, after the activation, goes into their bias, or into the
    running mean of the batch normalization after them. Channels that are added or multiplied are removed together, and
    so are the channels before and after a depthwise convolution. The model keeps its classes and its forward.

    By default, only channels with γ = 0 are removed, and only if the output stays the same: a channel stays if its
    constant is not zero and a convolution that pads zeros reads it. With `share` or `threshold`, channels with the
    smallest |γ| are removed as if their γ were zero. A convolution that pads zeros then gets a bias that is exact only
    inside its borders. The output changes, so prune in steps, and train the model further.

    Args:
        model: Any module that can be traced, in any mode.
        example_inputs: An example of its inputs, as in `fold`.
        share: Share of the removable channels to remove, above 0 and below 1. Those with the smallest |γ| of all
            layers are removed; channels that can only be removed together count as one.
        threshold: Largest |γ| of the channels to remove.
        only: The layers whose γ may be taken as zero, as in `convert`.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model and the report: channels, parameters, memory, the time of a forward pass, and the difference of the
        output. Each layer keeps at least one channel. Parameters that changed are new `Parameter`s without gradient:
        create the optimizer after pruning.

    Raises:
        TypeError: model is not a module.
        ValueError: the model cannot be called with the inputs, cannot be copied, is on the meta device, in
            `DistributedDataParallel` or sharded; share or threshold is out of range, or both are given; a pattern
            matches no layer.
        PruneError: the pruned network does not run, or its output is not that of the original with γ = 0 in the
            removed channels. After any error the model is unchanged.

    Numerics: constants are computed in float64 and rounded once. The output is compared as in `fold`.

    Source: Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> with torch.no_grad():
        ...     _ = model[1].weight[:3].zero_()
        >>> pruned, report = prune_channels(model, torch.randn(1, 3, 8, 8))
        >>> pruned
        Sequential(
          (0): Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
          (1): BatchNorm2d(5, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
          (2): ReLU()
          (3): Conv2d(5, 4, kernel_size=(3, 3), stride=(1, 1))
        )
        >>> report.parameters_before, report.parameters
        (532, 334)
    """
    _check(model, share, threshold)
    inputs = Inputs.of(example_inputs)
    tried = (inputs, inputs.random())
    layers = walk.norm_layers(model)
    chosen = select(_CALLER, layers, only)
    with walk.restored(model):
        trial = walk.trial_copy(_CALLER, model)
        walk.set_mode(trial, training=False)
        try:
            before = _results(trial, tried)
        except Exception as error:
            raise not_taken(_CALLER, "example_inputs", error) from error
        report = PruneReport(_CALLER, **_measured(trial, inputs, "_before"))
        pruned = walk.copied(_CALLER, model)
        try:
            few, _ = fewer_samples(trial, inputs, _SAMPLES)
            trace = tracing.trace(trial, few, prepare=lowering.lower)
        except Untraceable as error:
            why = f"the model cannot be traced: {error}"
            left = [Change.unchanged(found.path, describe(found.module), why) for found in chosen]
            return Result(model if inplace else pruned, replace(report, left=tuple(left), **_measured(trial, inputs)))
        network = TorchNetwork(trace)
        owners = Owners(trial, network)
        channels = Channels(network, owners.why_fixed)
        norms = {
            path: call for call in network.norms if call in channels.held and (path := owners.path(call)) is not None
        }
        by_gamma = ChannelsByGamma(channels, norms, chosen)
        exactly = share is None and threshold is None
        removal = by_gamma.up_to(threshold or 0.0, exactly=exactly) if share is None else by_gamma.share(share)
        edits = Edits(channels, owners, removal)
        edits.apply(pruned)
        zeroed = {path: removal.zeroed[call] for path, call in norms.items() if call in removal.zeroed}
        others = (*trace.sizes, *trace.refused)  # the model may call other layers for other sizes
        after = _checked(pruned, model, (*tried, *others), zeroed if removal.exact else None)
        changed, left = by_gamma.rows(removal, layers)
        difference = max((gate.relative(*pair) for pair in zip(after, before, strict=False)), default=0.0)
        report = replace(
            report, changed=tuple(changed), left=tuple(left), difference=difference, notes=edits.notes(),
            **_measured(pruned, inputs),
        )  # fmt: skip
    result = Result(model if inplace else pruned, report)
    if inplace:
        edits.apply(model)
    return result


def _check(model: nn.Module, share: float | None, threshold: float | None) -> None:
    _checks.check_module(_CALLER, model)
    check_not_sharded(_CALLER, model)
    walk.check_has_values(_CALLER, model)
    check_not_reduced(_CALLER, model, "holds the parameters that are replaced: prune the model first, then wrap it")
    if share is not None and threshold is not None:
        raise ValueError(f"{_CALLER} expects share or threshold, got both ({share} and {threshold}). Pass one of them.")
    if share is not None and not 0.0 < share < 1.0:
        raise ValueError(
            f"{_CALLER} expects share above 0 and below 1, got {share}. It is the share of the channels to remove."
        )
    if threshold is not None and not 0.0 <= threshold < float("inf"):
        raise ValueError(f"{_CALLER} expects threshold >= 0, got {threshold}. It is the largest |γ| to remove.")


def _results(model: nn.Module, tried: Sequence[Inputs], *, training: bool = False) -> list[Tensor]:
    """Return the results for these inputs, and restore the model."""
    with walk.restored(model, buffers=True):
        walk.set_mode(model, training)
        return [tensor for each in tried for tensor in outputs(evaluate(model, each))]


def _measured(model: nn.Module, inputs: Inputs, suffix: str = "") -> dict[str, Any]:
    """Return the sizes of the model, and the time of a forward pass."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    times = []
    with walk.restored(model, buffers=True):
        walk.set_mode(model, training=False)
        for _ in range(_RUNS):
            start = time.perf_counter()
            evaluate(model, inputs)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    found = {
        "channels": sum(walk.num_channels(layer.module) or 0 for layer in walk.norm_layers(model)),
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(t.numel() * t.element_size() for t in (*parameters, *buffers)),
        "seconds": min(times),
    }
    return {name + suffix: value for name, value in found.items()}


def _checked(
    pruned: nn.Module, model: nn.Module, tried: Sequence[Inputs], zeroed: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """Return the results of the pruned network for these inputs, after a run in training with the first of them.

    The results are compared, as in folding, with those of the model with γ = 0 in the channels `zeroed`, by the layer's
    path.
    """
    masked = walk.copied(_CALLER, model)
    try:
        _results(masked, tried[:1], training=True)
        trains = True
    except Exception:  # it needs targets
        trains = False
    try:
        after = _results(pruned, tried)
        if trains:
            _results(pruned, tried[:1], training=True)
    except Exception as error:
        raise PruneError(
            f"{_CALLER} expects a model that runs with fewer channels, but the pruned one raised "
            f"{_options.in_one_line(error)}. Its forward may contain numbers of channels, or call other layers in "
            "training or for other sizes: leave out the layers concerned with only=. Nothing was changed."
        ) from error
    if zeroed is None:
        return after
    with torch.no_grad():
        for path, which in zeroed.items():
            if which.any():
                masked.get_submodule(path).weight[which] = 0.0  # type: ignore[operator]
    own = _results(masked, tried)
    try:
        exact = _results(masked.double(), [each.to(torch.float64) for each in tried])
    except Exception:  # it casts by itself, or has no float64 kernels
        exact = own
    errors = gate.Error.of(gate.Results(own, after, exact))
    limit = gate.tolerance_for(None, [t.dtype for t in own if t.is_floating_point()])
    if not errors.allowed(limit, gate.AMPLIFICATION):
        raise PruneError(
            f"{_CALLER} expects the results of the original with γ = 0 in the removed channels, but the error is "
            f"{errors.after:.1e}, and the original's own error is {errors.before:.1e}. Nothing was changed; please "
            "report the network."
        )
    return after
