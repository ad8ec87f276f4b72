"""The contenders: ours, and other implementations of batch normalization on a CPU.

A contender takes a case and its data and returns a call that computes the task once, or None if it does not support the
case. `as_torch` converts the result of the call to torch tensors by name, for comparison with the reference.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.ops import eager
from benchmarks.subjects.cases import EPS, STEP, Case, Data

Call = Callable[[], Any]

OURS, EAGER = "batchnorm", "batchnorm eager"
TORCH, TORCH_INPLACE, COMPILED = "torch", "torch inplace", "torch.compile"
JAX, ONNXRUNTIME = "jax", "onnxruntime"


@dataclass(frozen=True)
class Contender:
    name: str
    build: Callable[[Case, Data], Call | None]
    as_torch: Callable[[Case, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Passes:
    """The two passes of a training step; `backward` takes the result of `forward`."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


def compiled() -> bool:
    """Return whether our operators have their compiled implementation."""
    return batchnorm.backends()["cpu"].startswith("compiled")


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(m) is not None for m in modules)


def _is_main(case: Case) -> bool:
    """Return whether to measure slow contenders, too: a compilation takes up to a minute."""
    return (case.dtype, case.layout, case.task_name) == ("float32", "contiguous", STEP)


def _names(case: Case) -> list[str]:
    gradients = ["dx", "dweight", "dbias", "dresidual"][: 4 if case.task.residual else 3]
    return ["y", *gradients] if case.task.backward else ["y"]


def _tensors(case: Case, result: Any) -> dict[str, Tensor]:
    return dict(zip(_names(case), result if isinstance(result, tuple) else (result,), strict=True))


def _loaded(layer: nn.Module, case: Case, data: Data) -> nn.Module:
    state = {name: getattr(data, name) for name in ("weight", "bias", "running_mean", "running_var")}
    layer.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
    return layer.train(case.task.training)


def _torch_call(case: Case, data: Data, layer: nn.Module, forward: Callable[..., Tensor]) -> Call:
    """Return a call that computes the task in torch: forward, and backward by autograd."""
    if not case.task.training:
        x, residual = data.x, data.residual

        def infer() -> Tensor:
            with torch.inference_mode():
                return forward(x, residual)

        return infer
    passes = _torch_passes(data, layer, forward)
    if not case.task.backward:
        return passes.forward

    def step() -> tuple[Tensor, ...]:
        y = passes.forward()
        return (y, *passes.backward(y))

    return step


def _torch_passes(data: Data, layer: nn.Module, forward: Callable[..., Tensor]) -> Passes:
    """Return forward and, by autograd, backward of a layer in training."""
    x, residual = data.x.detach().requires_grad_(), data.residual
    wanted = [x, layer.weight, layer.bias]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        wanted.append(residual)
    return Passes(lambda: forward(x, residual), lambda y: torch.autograd.grad(y, wanted, data.dy))


def _layer_of(case: Case, classes: dict[int, type[nn.Module]], data: Data, **options: Any) -> nn.Module:
    return _loaded(classes[len(case.shape)](case.shape[1], eps=EPS, **options), case, data)


_OURS_PLAIN = {2: batchnorm.BatchNorm1d, 4: batchnorm.BatchNorm2d, 5: batchnorm.BatchNorm3d}
_OURS_FUSED = {2: batchnorm.BatchNormAct1d, 4: batchnorm.BatchNormAct2d, 5: batchnorm.BatchNormAct3d}
_TORCH = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _ours(case: Case, data: Data) -> Call:
    if not case.task.activation:
        layer = _layer_of(case, _OURS_PLAIN, data)
        return _torch_call(case, data, layer, lambda x, residual: layer(x))
    layer = _layer_of(case, _OURS_FUSED, data, activation="relu")
    return _torch_call(case, data, layer, layer)


def _eager(case: Case, data: Data) -> Call | None:
    """Return a call of our operators' eager implementation, which runs if the compiled library is missing."""
    if not _is_main(case) or not compiled():
        return None
    attributes = (EPS, "relu", 0.0)

    def step() -> tuple[Tensor, ...]:
        y, *statistics = eager.train_forward(data.x, data.weight, data.bias, None, *attributes)
        vectors = (*statistics, data.weight, data.bias)
        return (y, *eager.train_backward(data.dy, data.x, None, None, *vectors, *attributes, False)[:3])

    return step


def _torch_forward(case: Case, layer: nn.Module) -> Callable[..., Tensor]:
    if not case.task.activation:
        return lambda x, residual: layer(x)
    if case.task.residual:
        return lambda x, residual: F.relu(layer(x) + residual)
    return lambda x, residual: F.relu(layer(x))


def _torch(case: Case, data: Data) -> Call:
    layer = _layer_of(case, _TORCH, data)
    return _torch_call(case, data, layer, _torch_forward(case, layer))


def _torch_inplace(case: Case, data: Data) -> Call | None:
    if not case.task.activation:
        return None
    layer = _layer_of(case, _TORCH, data)
    if case.task.residual:
        return _torch_call(case, data, layer, lambda x, residual: F.relu_(layer(x).add_(residual)))
    return _torch_call(case, data, layer, lambda x, residual: F.relu_(layer(x)))


def step_passes(case: Case, data: Data) -> dict[str, Passes]:
    """Return the passes of a training step of BN + ReLU: ours, torch's, and torch's with in-place ReLU."""
    ours = _layer_of(case, _OURS_FUSED, data, activation="relu")
    torchs, inplace = (_layer_of(case, _TORCH, data) for _ in range(2))
    return {
        OURS: _torch_passes(data, ours, ours),
        TORCH: _torch_passes(data, torchs, _torch_forward(case, torchs)),
        TORCH_INPLACE: _torch_passes(data, inplace, lambda x, residual: F.relu_(inplace(x))),
    }


def _compiled(case: Case, data: Data) -> Call | None:
    if not _is_main(case):
        return None
    torch._dynamo.reset()
    layer = _layer_of(case, _TORCH, data)
    return _torch_call(case, data, layer, torch.compile(_torch_forward(case, layer), dynamic=False))


def _jax(case: Case, data: Data) -> Call | None:
    """Return Flax's computation (variance by E[x²] − E[x]²), with moving statistics, jitted; axes in memory order."""
    if case.dtype != "float32" or torch.get_num_threads() != os.cpu_count() or not installed("jax"):
        return None
    import jax
    from jax import numpy as jnp

    def array(t: Tensor) -> Any:
        return jnp.asarray(_memory_order(case, t).numpy())

    task, axis = case.task, (1 if case.layout == "contiguous" else len(case.shape) - 1)
    dims = tuple(d for d in range(len(case.shape)) if d != axis)
    vector = tuple(1 if d in dims else case.shape[1] for d in range(len(case.shape)))

    def normalize(x, residual, weight, bias, mean, var):  # type: ignore[no-untyped-def]
        scale = weight * jax.lax.rsqrt(var + EPS)
        z = (x - mean.reshape(vector)) * scale.reshape(vector) + bias.reshape(vector)
        if task.residual:
            z = z + residual
        return jax.nn.relu(z) if task.activation else z

    def train(x, residual, weight, bias, running_mean, running_var):  # type: ignore[no-untyped-def]
        mean = jnp.mean(x, dims)
        var = jnp.maximum(0.0, jnp.mean(x * x, dims) - mean * mean)
        moved = 0.9 * running_mean + 0.1 * mean, 0.9 * running_var + 0.1 * var
        return normalize(x, residual, weight, bias, mean, var), moved

    residual = data.residual if data.residual is not None else torch.zeros(())
    arguments = [array(data.x), array(residual) if task.residual else jnp.zeros(())]
    arguments += [jnp.asarray(getattr(data, n).numpy()) for n in ("weight", "bias", "running_mean", "running_var")]
    dy = array(data.dy)
    if not task.training:
        compute = jax.jit(normalize)
        return lambda: jax.block_until_ready(compute(*arguments))
    if not task.backward:
        compute = jax.jit(train)
        return lambda: jax.block_until_ready(compute(*arguments))[0]

    @jax.jit
    def step(x, residual, weight, bias, running_mean, running_var, dy):  # type: ignore[no-untyped-def]
        def forward(x, weight, bias, residual):  # type: ignore[no-untyped-def]
            return train(x, residual, weight, bias, running_mean, running_var)

        y, pull, moved = jax.vjp(forward, x, weight, bias, residual, has_aux=True)
        return (y, *pull(dy)[: 4 if task.residual else 3]), moved

    return lambda: jax.block_until_ready(step(*arguments, dy))[0]


def _memory_order(case: Case, t: Tensor) -> Tensor:
    return t.movedim(1, -1) if case.layout == "channels-last" else t


def _jax_as_torch(case: Case, result: Any) -> dict[str, Tensor]:
    import numpy as np

    named = {n: torch.from_numpy(np.array(v)) for n, v in _tensors(case, result).items()}
    if case.layout == "channels-last":
        named = {n: t.movedim(-1, 1) if t.dim() > 1 else t for n, t in named.items()}
    return named


def _onnxruntime(case: Case, data: Data) -> Call | None:
    if case.task.training or case.layout != "contiguous" or case.dtype != "float32":
        return None
    if not installed("onnx", "onnxruntime"):
        return None
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    task, kind, shape = case.task, onnx.TensorProto.FLOAT, list(case.shape)
    vectors = {n: getattr(data, n) for n in ("weight", "bias", "running_mean", "running_var")}
    inputs = {"x": data.x, **({"residual": data.residual} if data.residual is not None else {})}
    nodes, value = [helper.make_node("BatchNormalization", ["x", *vectors], ["normalized"], epsilon=EPS)], "normalized"
    if task.residual:
        nodes.append(helper.make_node("Add", [value, "residual"], ["sum"]))
        value = "sum"
    if task.activation:
        nodes.append(helper.make_node("Relu", [value], ["activated"]))
        value = "activated"
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info(n, kind, shape) for n in inputs],
        [helper.make_tensor_value_info(value, kind, shape)],
        [numpy_helper.from_array(v.numpy(), n) for n, v in vectors.items()],
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads disturb the next contender
    # An older IR and opset, because the runtime may be older than the onnx package.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {n: t.numpy() for n, t in inputs.items()}
    return lambda: session.run(None, arrays)[0]


def _onnxruntime_as_torch(case: Case, result: Any) -> dict[str, Tensor]:
    return {"y": torch.from_numpy(result)}


CONTENDERS = (
    Contender(OURS, _ours, _tensors),
    Contender(EAGER, _eager, _tensors),
    Contender(TORCH, _torch, _tensors),
    Contender(TORCH_INPLACE, _torch_inplace, _tensors),
    Contender(COMPILED, _compiled, _tensors),
    Contender(JAX, _jax, _jax_as_torch),
    Contender(ONNXRUNTIME, _onnxruntime, _onnxruntime_as_torch),
)

# The optional packages of each peer.
NEEDS = {JAX: ("jax",), ONNXRUNTIME: ("onnx", "onnxruntime")}


def missing() -> list[str]:
    """Return a line for each peer that is not installed."""
    return [
        f"{name} is skipped: {' and '.join(needs)} must be installed (pip install '.[bench]')"
        for name, needs in NEEDS.items()
        if not installed(*needs)
    ]
