"""Batch normalization (Ioffe & Szegedy 2015)."""

from __future__ import annotations

import torch

from batchnorm.nn.layer import LazyNormLayer, NormLayer


class BatchNorm(NormLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization of `[N, C, *S]`, with any number of spatial dimensions.

    `y = (x - μ)/√(σ² + eps)·weight + bias`, per channel. In training, μ and σ² (biased) are those of the batch, and the
    running statistics are updated: `running ← (1 - momentum)·running + momentum·batch`, with the unbiased variance. In
    evaluation, μ and σ² are the running statistics.

    Args:
        num_features: C, the size of x's second dimension, or of its last with `channel_dim=-1`.
        eps: Added to the variance; positive.
        momentum: Weight of the new batch, in [0, 1], as in torch (1 minus the momentum of Keras and Flax). None gives
            the cumulative average of all batches.
        affine: Whether there are weight (γ) and bias (β), each `[C]`.
        track_running_stats: Whether there are running statistics; without them, evaluation also uses the batch's.
        device: The device of parameters and buffers.
        dtype: The dtype of parameters and buffers.
        bias: Whether there is β (keyword only).
        on_nonfinite: What training does if a batch's statistics are not finite: "propagate", "skip" to leave the
            running statistics unchanged, or "error" to raise FloatingPointError (keyword only).
        on_single: How training handles a batch with one value per channel, which has no variance: "error", or "running"
            to normalize it by the running statistics, as in evaluation, and update nothing (keyword only). With a mask,
            "running" also applies if at most one position counts.
        channel_dim: The dimension of x that holds the channels: 1, or -1 for x of shape `[N, *S, C]`, as in
            transformers, and jagged nested x `[N, j, *S, C]`. This costs no copy (keyword only).

    Attributes:
        update_running_stats: Whether training updates the running statistics, independently of train() and eval();
            `batchnorm.update_running_stats` sets it for a whole model.

    Shape:
        x and y: `[N, C, *S]`, or `[N, *S, C]` with `channel_dim=-1`; an empty batch gives an empty y and updates
            nothing. mask: `[N, *S]` in both cases.

    Raises:
        TypeError: num_features is not an int; in forward, x is not a floating-point tensor, or its dtype does not match
            that of the parameters.
        ValueError: eps, momentum, on_nonfinite, on_single or channel_dim out of range; on_single is "running" without
            running statistics; in forward, a wrong rank or number of channels, or one value per channel in training if
            on_single is "error".
        FloatingPointError: in training with on_nonfinite="error", a batch's mean or variance is not finite.

    Numerics: as `batchnorm.functional.batch_norm`.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.

    Examples:
        >>> layer = BatchNorm(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
        >>> layer.running_mean
        tensor([0.2000, 2.0000])
        >>> BatchNorm(64, channel_dim=-1)(torch.rand(8, 100, 64)).shape
        torch.Size([8, 100, 64])
    """

    layer_name = "BatchNorm"


class BatchNorm1d(NormLayer, torch.nn.BatchNorm1d):
    """Batch normalization of `[N, C]` or `[N, C, L]`; a drop-in replacement for `torch.nn.BatchNorm1d`.

    Arguments and equations are those of `BatchNorm`.

    Examples:
        >>> BatchNorm1d(8)(torch.rand(4, 8, 100)).shape
        torch.Size([4, 8, 100])
    """

    layer_name = "BatchNorm1d"


class BatchNorm2d(NormLayer, torch.nn.BatchNorm2d):
    """Batch normalization of `[N, C, H, W]`; a drop-in replacement for `torch.nn.BatchNorm2d`.

    Arguments and equations are those of `BatchNorm`.

    Examples:
        >>> layer = BatchNorm2d(8)
        >>> _ = layer.load_state_dict(torch.nn.BatchNorm2d(8).state_dict())
        >>> layer(torch.rand(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    layer_name = "BatchNorm2d"


class BatchNorm3d(NormLayer, torch.nn.BatchNorm3d):
    """Batch normalization of `[N, C, D, H, W]`; a drop-in replacement for `torch.nn.BatchNorm3d`.

    Arguments and equations are those of `BatchNorm`.

    Examples:
        >>> BatchNorm3d(2)(torch.rand(4, 2, 3, 5, 5)).shape
        torch.Size([4, 2, 3, 5, 5])
    """

    layer_name = "BatchNorm3d"


class LazyBatchNorm1d(LazyNormLayer, torch.nn.LazyBatchNorm1d):
    """A `BatchNorm1d` that takes `num_features` from its first batch; other arguments are those of `BatchNorm`.

    Examples:
        >>> layer = LazyBatchNorm1d()
        >>> _ = layer(torch.rand(4, 8))
        >>> layer
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    layer_name = "LazyBatchNorm1d"
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(LazyNormLayer, torch.nn.LazyBatchNorm2d):
    """A `BatchNorm2d` that takes `num_features` from its first batch; other arguments are those of `BatchNorm`."""

    layer_name = "LazyBatchNorm2d"
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(LazyNormLayer, torch.nn.LazyBatchNorm3d):
    """A `BatchNorm3d` that takes `num_features` from its first batch; other arguments are those of `BatchNorm`."""

    layer_name = "LazyBatchNorm3d"
    cls_to_become = BatchNorm3d
