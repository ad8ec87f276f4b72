"""Checks of tensors and modules. Each error states the requirement, the value received, and the fix."""

from __future__ import annotations

import math
import re
import warnings

import torch
from torch import Tensor
from torch.fx import Proxy

from batchnorm._frameworks import keras_hint
from batchnorm._options import check_weights, nonfinite_batch, undecidable_error

CHANNEL_DIMS = (1, -1)

CAPTURED_STATISTICS = (
    "Under torch.func, running statistics can be updated only if they are arguments of the transformed function; "
    "here they are captured, or several vmapped batches share one buffer. Pass the buffers as arguments "
    "(torch.func.functional_call), or use track_running_stats=False, update_running_stats=False or .eval()."
)

_NO_VARIANCE = (
    "One value has no variance: use a larger batch, on_single='running' (normalizes by the running statistics), or "
    "evaluation mode."
)

_HALF = (torch.float16, torch.bfloat16)
LAYOUTS = {
    "1d": ((2, 3), "[N, C] or [N, C, L]"),
    "2d": ((4,), "[N, C, H, W]"),
    "3d": ((5,), "[N, C, D, H, W]"),
}
_LAYER_FOR_DIMS = {
    2: ("[N, C]", "1d"),
    3: ("[N, C, L]", "1d"),
    4: ("[N, C, H, W]", "2d"),
    5: ("[N, C, D, H, W]", "3d"),
}


def check_module(caller: str, model: object) -> None:
    """Refuse anything but a module of PyTorch.

    On Keras's torch backend, a Keras model is one. It is refused by functions that `batchnorm.keras` also has.
    """
    of_keras = any(kind.__module__.partition(".")[0] == "keras" for kind in type(model).__mro__)
    hint = keras_hint(caller) if of_keras else ""
    if hint or not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{caller} expects a torch.nn.Module, got {type(model).__name__}.{hint or ' Pass the network itself.'}"
        )


def check_channel_dim(caller: str, channel_dim: int) -> None:
    if channel_dim not in CHANNEL_DIMS:
        raise ValueError(
            f"{caller} expects channel_dim to be 1 or -1, got {channel_dim!r}. Use 1 for channels in the second "
            "dimension ([N, C, *]), and -1 for channels in the last ([N, *, C])."
        )


def positions_of(x: Tensor, channel_dim: int = 1) -> tuple[int, ...]:
    """Return `[N, *S]`: the sizes of all dimensions of x except that of the channels."""
    return tuple(x.shape[:-1]) if channel_dim == -1 else (x.shape[0], *x.shape[2:])


def missing_counter(caller: str) -> str:
    """Return the error for a cumulative average without a number of batches."""
    return (
        f"{caller} expects num_batches_tracked if momentum is None, got None for both. The cumulative average divides "
        "by the number of batches: pass the counter, or a momentum in [0, 1]."
    )


def check_update(
    caller: str, momentum: float | None, num_batches_tracked: Tensor | None, **running: Tensor | None
) -> None:
    """Check that all running statistics can be updated, before any of them is."""
    if momentum is None and num_batches_tracked is None:
        raise ValueError(missing_counter(caller))
    running["num_batches_tracked"] = num_batches_tracked
    # A compiler cannot trace is_inference(). The operator checks this when it runs.
    compiling = torch.compiler.is_compiling()
    for name, t in running.items():
        if t is None:
            continue
        check_dense(caller, name, t)
        if t.requires_grad or not t.is_contiguous() or (not compiling and t.is_inference()):
            _check_writable(caller, name, t)


def _check_writable(caller: str, name: str, t: Tensor) -> None:
    if torch._C._are_functorch_transforms_active():
        return
    if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        kind = "an expanded tensor, whose values share memory"
    elif not torch.compiler.is_compiling() and t.is_inference() and not torch.is_inference_mode_enabled():
        kind = "a tensor made under torch.inference_mode"
    elif t.requires_grad and t.is_leaf and torch.is_grad_enabled():
        kind = "a leaf that requires a gradient"
    else:
        return
    raise RuntimeError(
        f"{caller} expects {name} to be a buffer that training can write, got {kind}. Replace it by a copy, made "
        f"outside inference_mode by {name}.detach().clone()."
    )


def check_allocated(caller: str, **tensors: object) -> None:
    """Check that the memory of tensors is allocated. FSDP, for example, frees the storage of parameters between uses.

    The compiled operators check this themselves. torch's own operations would read address 0.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or type(t) not in (Tensor, torch.nn.Parameter):
            continue  # a subclass may have no memory of its own
        check_dense(caller, name, t)  # the others have no storage
        if not t.untyped_storage().nbytes() and t.numel():
            raise RuntimeError(
                f"{caller} expects {name} with its memory allocated, got a tensor of shape {list(t.shape)} whose "
                "storage was freed. Allocate and fill it first; with FSDP, call the wrapped module, which gathers its "
                "parameters."
            )


def check_input(caller: str, x: Tensor, channel_dim: int = 1) -> None:
    """Check type, dtype and rank of `x`; a caller that ends in 1d, 2d or 3d accepts only those ranks."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{caller} expects x to be a torch.Tensor, got {type(x).__name__}. Convert it first.")
    if x.is_nested:
        raise ValueError(
            f"{caller} expects a dense x, got a nested tensor. Pad it with x.to_padded_tensor(0.0) and pass a mask of "
            "the real positions. BatchNorm with channel_dim=-1 takes jagged tensors [N, j, *S, C]."
        )
    check_dense(caller, "x", x)
    if not x.is_floating_point():
        fix = "Convert it, for example x.float()."
        if x.is_quantized:
            fix = "Call batchnorm.convert(model, torch.nn) before you quantize: torch quantizes its own layers only."
        raise TypeError(f"{caller} expects x of a floating-point dtype, got {x.dtype}. {fix}")
    ranks, layout = LAYOUTS.get(caller[-2:], (None, "[N, C, *]"))
    if x.dim() in ranks if ranks is not None else x.dim() >= 2 or x.shape == (0,):
        return
    hint = "Add the missing batch or channel dimension, for example x.unsqueeze(0)."
    if ranks is not None and x.dim() in _LAYER_FOR_DIMS:
        other, suffix = _LAYER_FOR_DIMS[x.dim()]
        hint = f"For {other} use {caller[:-2]}{suffix}."
    elif ranks is not None and x.dim() > 5:
        hint = "For more than three spatial dimensions use a layer without 1d, 2d or 3d in its name."
    if channel_dim == -1:
        layout, hint = (re.sub(r"N, C, (.+?)\]", r"N, \1, C]", text) for text in (layout, hint))
    raise ValueError(f"{caller} expects x of shape {layout}, got {list(x.shape)} ({x.dim()} dims). {hint}")


def check_dense(caller: str, name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise ValueError(
            f"{caller} expects a dense {name}, got a nested tensor. Pad it with {name}.to_padded_tensor(0.0)."
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{caller} expects a dense {name}, got one of layout {tensor.layout}. Use {name}.to_dense().")


def check_channel_vectors(caller: str, x: Tensor, channel_dim: int = 1, /, **vectors: Tensor | None) -> None:
    """Check that every vector is `[C]`, on x's device, and in x's dtype, or in float32 if x is float16 or bfloat16."""
    # Read once, because this runs in every forward.
    shape, dtype, device = x.shape[1:2] if channel_dim == 1 else x.shape[-1:], x.dtype, x.device
    for name, vector in vectors.items():
        if vector is None:
            continue
        check_dense(caller, name, vector)
        if vector.shape == shape and vector.dtype == dtype and vector.device == device:
            continue
        if vector.shape != shape:
            _raise_channels(caller, x, channel_dim, name, vector)
        if vector.dtype != dtype and not (vector.dtype == torch.float32 and dtype in _HALF):
            wanted = f"{dtype} or torch.float32" if dtype in _HALF else f"{dtype}"
            raise TypeError(
                f"{caller} expects {name} in {wanted} for x in {dtype}, got {vector.dtype}. "
                "Convert the layer or the input so that they agree."
            )
        if vector.device != device:
            raise ValueError(
                f"{caller} expects {name} on x's device, got {name} on {vector.device} and x on {device}. "
                "Move the layer or the input with .to(device)."
            )


def _raise_channels(caller: str, x: Tensor, channel_dim: int, name: str, vector: Tensor) -> None:
    channels = x.shape[channel_dim]
    hint = f"Give the layer num_features={channels}, or check the layer before it."
    if vector.dim() == 1 and x.dim() > 2 and x.shape[-channel_dim] == vector.shape[0]:
        hint = "Channels must be the second dimension: move them with x.movedim(-1, 1), or pass channel_dim=-1."
        if channel_dim == -1:
            hint = "With channel_dim=-1, channels must be the last dimension: move them, or leave out channel_dim."
    raise ValueError(
        f"{caller} expects {name} of shape [C] = [{channels}] for x of shape {list(x.shape)}, "
        f"got {list(vector.shape)}. {hint}"
    )


def check_quantization(caller: str, training: bool, *values: object) -> None:
    """Raise an error if `torch.ao.quantization` traces the caller in training, and warn if it does so in evaluation.

    It fuses and quantizes only torch's own layers. It would keep this layer in floating point. It would also keep it in
    training mode, because `eval()` of the graph does not change the arguments of a function.
    """
    if not any(isinstance(value, Proxy) and _quantizes(type(value.tracer)) for value in values):
        return
    fix = (
        "Convert the model first, with batchnorm.convert(model, torch.nn), or fold it in evaluation; the guide on "
        "quantization shows both."
    )
    if training:
        raise ValueError(
            f"{caller} expects to be converted before quantization-aware training, got a trace of it. {fix}"
        )
    warnings.warn(
        f"{caller} stays in floating point, and is not fused, when torch quantizes this model. {fix}", stacklevel=2
    )


def _quantizes(tracer: type) -> bool:
    return any(kind.__module__.startswith("torch.ao.quantization") for kind in tracer.__mro__)


def check_residual(caller: str, x: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    check_dense(caller, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{caller} expects a residual of x's shape {list(x.shape)}, got {list(residual.shape)}. "
            "It is added without broadcasting: expand it, or project it to x's shape first."
        )
    if residual.dtype != x.dtype or residual.device != x.device:
        raise TypeError(
            f"{caller} expects a residual of x's dtype and device ({x.dtype}, {x.device}), got {residual.dtype}, "
            f"{residual.device}. Convert it with residual.to(x)."
        )


def uses_running(caller: str, x: Tensor, on_single: str, channel_dim: int = 1) -> bool:
    """Return whether training normalizes x by running statistics, because each channel has a single value.

    Raises:
        ValueError: each channel has a single value, which has no variance, and on_single is "error"; on_single is
            "running" in `torch.jit.trace`.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]  # sizes are tensors while tracing
        if on_single == "running":
            raise ValueError(
                f"{caller} expects on_single='error' in a traced training graph, got 'running'. A trace does not "
                "depend on the batch size: set it to 'error', or trace in evaluation mode."
            )
        return False
    # math.prod, not numel() // C: C may be 0, and sizes may be symbolic.
    if math.prod(positions_of(x, channel_dim)) != 1:
        return False
    if on_single == "error":
        raise ValueError(
            f"{caller} expects more than one value per channel in training, got x of shape {list(x.shape)}. "
            f"{_NO_VARIANCE}"
        )
    return True


def check_joint_count(caller: str, count: float) -> None:
    """Check that all processes together have more than one value per channel."""
    if count == 1:
        raise ValueError(
            f"{caller} expects more than one value per channel in training over all processes, got one. {_NO_VARIANCE}"
        )


def check_finite(caller: str, mean: Tensor, *others: Tensor, count: Tensor | None = None) -> None:
    """Check that the statistics of a batch are finite, for on_nonfinite="error".

    Args:
        caller: The name at the start of the error.
        mean: `[C]` or `[K, C]`, without gradient, like the others.
        others: Further statistics of the same shape.
        count: A scalar, or `[K]`. Where it is 0, the statistics are not those of the batch.

    Raises:
        FloatingPointError: a statistic is not finite; in a compiled graph, a RuntimeError without the channels.
        ValueError: in `torch.jit.trace` and under `torch.vmap`, which cannot raise an error that depends on values.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(undecidable_error(caller, "torch.jit.trace"))
    finite = mean.isfinite()
    for statistic in others:
        finite = finite & statistic.isfinite()
    if count is not None:
        finite = finite | (count == 0).unsqueeze(-1)
    if torch.compiler.is_compiling() or type(finite) is not Tensor or finite.is_meta or _is_capturing(finite):
        torch._assert_async(finite.all(), nonfinite_batch(caller))
        return
    try:
        if finite.all():
            return
    except RuntimeError as error:
        raise ValueError(undecidable_error(caller, "torch.vmap")) from error
    channels = finite.reshape(-1, finite.shape[-1]).all(0).tolist()
    overflow = bool((mean.isfinite() | finite).all())
    raise FloatingPointError(nonfinite_batch(caller, channels, overflow=overflow))


def _is_capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def check_running(
    caller: str,
    mean: Tensor | None,
    second: Tensor | None,
    *,
    needed: bool,
    on_single: str = "error",
    second_name: str = "running_var",
) -> None:
    if (mean is None) != (second is None):
        given, missing = (second_name, "running_mean") if mean is None else ("running_mean", second_name)
        raise ValueError(
            f"{caller} expects running_mean and {second_name} both or neither, got {given} without {missing}. "
            "Pass the missing one, or None for both."
        )
    if on_single == "running" and mean is None:
        raise ValueError(
            f"{caller} expects running_mean and {second_name} with on_single='running', got None. They normalize a "
            "batch with one value per channel: keep running statistics, or use on_single='error'."
        )
    if needed and mean is None:
        raise ValueError(
            f"{caller} expects running_mean and {second_name} in evaluation, got None. "
            "Pass them, or training=True for the batch's own statistics."
        )


def mask_as_weights(caller: str, x: Tensor, mask: Tensor, channel_dim: int = 1) -> Tensor:
    """Return the weights `[N, *S]` of a mask: booleans or weights >= 0, broadcastable to `[N, *S]`."""
    positions = positions_of(x, channel_dim)
    if isinstance(mask, Tensor):
        check_dense(caller, "mask", mask)
    check_allocated(caller, mask=mask)
    if not isinstance(mask, Tensor) or mask.is_complex():
        kind = type(mask).__name__ if not isinstance(mask, Tensor) else mask.dtype
        raise TypeError(f"{caller} expects a mask of booleans or of weights, got {kind}. Use mask.bool().")
    if mask.device != x.device:
        raise ValueError(
            f"{caller} expects the mask on x's device, got mask on {mask.device} and x on {x.device}. "
            "Move it with mask.to(x.device)."
        )
    if mask.dim() == 1 and len(positions) > 1 and mask.shape[0] == positions[0] == positions[-1] != 1:
        ones = ", 1" * (len(positions) - 1)
        raise ValueError(
            f"{caller} expects a mask that fits x in one way only, got {list(mask.shape)} for x of shape "
            f"{list(x.shape)}. Use mask.reshape(-1{ones}) for one value per sample, or mask.unsqueeze(0) for one value "
            "per position of the last dimension."
        )
    try:
        weights = mask.to(torch.float64 if x.dtype == torch.float64 else torch.float32).expand(positions)
    except RuntimeError:
        raise ValueError(
            f"{caller} expects a mask of shape [N, *S] = {list(positions)} (or broadcastable to it) for x of shape "
            f"{list(x.shape)}, got {list(mask.shape)}. It has no channel dimension: one value per position."
        ) from None
    if mask.dtype != torch.bool and can_be_read(mask) and mask.numel() > 0:
        check_weights(caller, mask.min().item(), mask.max().item())
    return weights.contiguous()


def can_be_read(t: Tensor) -> bool:
    """Return whether t's values can be read without waiting for a device or breaking a graph."""
    return (
        type(t) is Tensor
        and t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch._C._are_functorch_transforms_active()
    )
