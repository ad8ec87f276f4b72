"""Tensor subclasses, shapes without data, and torch's modes and profilers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import batchnorm as bn
from batchnorm.functional import batch_norm

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Recorded(Tensor):
    """A subclass that records the functions that it is passed to."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped:
    """Not a tensor; it has only the protocol."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.tensor if isinstance(value, cls) else value

        plain = {key: unwrap(value) for key, value in (kwargs or {}).items()}
        return cls(func(*(unwrap(a) for a in args), **plain))


@TRAINING
def test_a_subclass_keeps_its_type_and_sees_one_call(training: bool) -> None:
    layer, x = bn.BatchNormAct2d(3).train(training), torch.randn(4, 3, 5, 5)
    Recorded.seen = []
    subclassed = x.as_subclass(Recorded).requires_grad_()
    y = layer(subclassed, subclassed)
    assert type(y) is Recorded
    assert batch_norm in Recorded.seen
    y.sum().backward()
    assert_close(y.as_subclass(Tensor), layer(x, x))
    assert subclassed.grad is not None


@pytest.mark.parametrize("place", ["input", "residual", "weight", "running_mean"])
def test_the_protocol_works_from_every_argument(place: str) -> None:
    arguments: dict[str, Any] = {
        "input": torch.randn(4, 3, 5),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.rand(3),
        "residual": torch.randn(4, 3, 5),
        "training": True,
        "momentum": 0.3,
        "activation": "leaky_relu",
        "negative_slope": 0.3,
        "on_nonfinite": "skip",
    }
    expected = batch_norm(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    found = batch_norm(**(arguments | {place: Wrapped(arguments[place])}))
    assert isinstance(found, Wrapped)
    assert torch.equal(found.tensor, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace.:DeprecationWarning")
def test_no_error_depends_on_values_in_a_trace_in_vmap_and_without_values() -> None:
    layer = bn.GhostBatchNorm1d(3, ghost_size=2, on_nonfinite="error", track_running_stats=False)
    plain, x = bn.BatchNorm1d(3, on_nonfinite="error", track_running_stats=False), torch.full((4, 3), torch.inf)
    message = "expects on_nonfinite='propagate' or 'skip' in torch.{}, got 'error', which depends on values. Use one"
    with pytest.raises(ValueError, match=message.format("jit.trace")):
        torch.jit.trace(layer, x)
    with pytest.raises(ValueError, match=message.format("vmap")):
        torch.vmap(plain)(torch.randn(2, 4, 3))
    with pytest.raises(FloatingPointError):
        torch.func.grad(lambda x: plain(x).sum())(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert plain(torch.empty(4, 3)).shape == (4, 3)
    assert plain.to("meta")(x.to("meta")).shape == (4, 3)


def test_a_function_mode_sees_one_call() -> None:
    class Mode(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(func)
            return func(*args, **(kwargs or {}))

    layer, x = bn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    with Mode() as mode:
        layer(x)
    assert mode.calls == [batch_norm]
    assert layer.num_batches_tracked == 1


def test_a_dispatch_mode_sees_our_operators_with_shapes_of_their_schema() -> None:
    class Mode(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = bn.BatchNormAct2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
    with Mode() as mode:
        layer(x).sum().backward()
    ours = [call.removesuffix(".default") for call in mode.calls if call.startswith("batchnorm.")]
    assert ours == ["batchnorm.train_forward", "batchnorm.update_running_", "batchnorm.train_backward"]


@TRAINING
@pytest.mark.parametrize("where", ["meta", "fake", "device_context"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (0, 3, 5, 5)])
def test_shapes_are_inferred_without_data(where: str, training: bool, shape: tuple[int, ...]) -> None:
    def run(**options: Any) -> tuple[Tensor, Tensor, nn.Module]:
        layer = bn.BatchNormAct2d(3, activation="silu", **options).train(training)
        x = torch.randn(shape, **options).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = layer(x, x)
        y.sum().backward()
        return x, y, layer

    if where == "fake":
        with FakeTensorMode():
            x, y, layer = run()
    elif where == "meta":
        x, y, layer = run(device="meta")
    else:
        with torch.device("meta"):
            x, y, layer = run()
    real_x, real_y, _ = run()
    assert y.device.type == ("cpu" if where == "fake" else "meta")
    assert (y.shape, y.stride(), y.dtype) == (real_y.shape, real_y.stride(), real_y.dtype)
    assert (x.grad.shape, x.grad.stride()) == (real_x.grad.shape, real_x.grad.stride())
    assert layer.weight.grad.shape == (3,)


def test_make_fx_gives_our_operators() -> None:
    layer, x = bn.BatchNorm2d(3).eval(), torch.randn(4, 3, 5, 5)
    graph = make_fx(lambda x: layer(x))(x)
    assert any("batchnorm.normalize" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(x), layer(x))


def test_flops_count_the_rest_of_the_model() -> None:
    conv, x = nn.Conv2d(3, 3, 3), torch.randn(4, 3, 5, 5)
    with FlopCounterMode(display=False) as alone:
        conv(x).sum().backward()
    with FlopCounterMode(display=False) as both:
        nn.Sequential(conv, bn.BatchNorm2d(3))(x).sum().backward()
    assert both.get_total_flops() == alone.get_total_flops() > 0


def test_the_profiler_names_our_operators() -> None:
    with profile() as record:
        bn.BatchNorm2d(3)(torch.randn(4, 3, 5, 5, requires_grad=True)).sum().backward()
    names = {event.key for event in record.key_averages()}
    assert any(name.startswith("batchnorm::") and "forward" in name for name in names)
    assert any(name.startswith("batchnorm::") and "backward" in name for name in names)


def test_deterministic_algorithms_are_enough() -> None:
    x, index = torch.randn(6, 3, 5, 5, requires_grad=True), torch.tensor([0, 1, 0, 1, 1, 0])
    torch.use_deterministic_algorithms(True)
    try:
        for layer in (bn.BatchNormAct2d(3), bn.BatchNorm2d(3).eval()):
            layer(x).sum().backward()
        _, mean, mean_low, m2 = torch.ops.batchnorm.moments(x.detach(), index, torch.ones(6, 5, 5), 2)
        saved = (x.detach(), x.detach(), None, None, mean, mean_low, m2, None, None, index, 2)
        torch.ops.batchnorm.backward_reduce(*saved, 1e-5, "relu", 0.0)
    finally:
        torch.use_deterministic_algorithms(False)


@TRAINING
def test_anomaly_mode_reports_nothing(training: bool) -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        bn.BatchNormAct2d(3).train(training)(x, x).sum().backward()
    assert x.grad.isfinite().all()


def test_inference_mode_updates_statistics_and_makes_inference_tensors() -> None:
    layer, x = bn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    with torch.inference_mode():
        y = layer(x)
        assert y.is_inference()
        assert layer.num_batches_tracked == 1
        assert layer.eval()(x).is_inference()
    layer.train()(x.requires_grad_()).sum().backward()  # the layer is as before
    assert layer.num_batches_tracked == 2


def test_saved_tensor_hooks_see_the_kept_tensors() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = bn.BatchNormAct2d(3)(x)
    assert sum(t.shape == x.shape for t in kept) == 1  # the mask is not kept
    assert sum(t.numel() for t in kept) == x.numel() + 5 * 3
    y.sum().backward()
    with torch.autograd.graph.save_on_cpu():
        y = bn.BatchNorm2d(3)(x)
    y.sum().backward()


BATCHES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten()]
    model = nn.Sequential(*layers)
    for x in BATCHES:
        model(x)
    model[1].weight.data[0] = 0.0
    return model


def diagnosed(model: nn.Sequential) -> list[str]:
    return [finding.summary for finding in bn.diagnose(model, BATCHES).findings]


def watched(model: nn.Sequential) -> list[Any]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, every=1, warn=False) as w:
        for x in BATCHES:
            model(x).square().mean().backward()
            optimizer.step()
    return [str(record) for record in w.history]


# The result of each function for data on the CPU.
ON_THE_CPU = {
    "fold": lambda model: bn.fold(model, BATCHES[0]).model(BATCHES[0]),
    "prune_channels": lambda model: bn.prune_channels(model, BATCHES[0]).model.eval()(BATCHES[0]),
    "diagnose": diagnosed,
    "watch": watched,
    "Standardizer": lambda _: bn.Standardizer().fit(BATCHES[0].numpy()).transform(BATCHES[1].numpy()),
}


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_the_default_device_does_not_matter_for_a_model_on_the_cpu(name: str) -> None:
    """On the device "meta", tensors have no values, so that nothing can be computed there by mistake."""
    expected, model = ON_THE_CPU[name](small_network()), small_network()
    with torch.device("meta"):
        found = ON_THE_CPU[name](model)
    if isinstance(found, list):
        assert found and found == expected
    else:
        assert_close(found, expected, rtol=0, atol=0)
