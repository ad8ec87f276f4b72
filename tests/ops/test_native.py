"""The node for torch's autograd in C++: when it loads, and torch's other features with it and with that in Python."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vmap

import batchnorm
from batchnorm.compiled import FOLDER
from batchnorm.ops import compiled, strict
from batchnorm.ops.compiled import AUTOGRAD, NODE, Native

SCRIPT = Path(__file__).parents[2] / "scripts/torch_interface.py"

needs_native = pytest.mark.skipif(strict._native is None, reason="no node in C++ in this build")
NODES = [pytest.param(strict._native, id="native", marks=needs_native), pytest.param(None, id="python")]

pytestmark = pytest.mark.skipif(not strict.AVAILABLE, reason="no compiled operators in this build")


@pytest.fixture(params=NODES)
def _node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "_native", request.param)


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[Any]:
    """The results of `run` with the node in C++ and with the one in Python."""
    results = [run()]
    with monkeypatch.context() as patch:
        patch.setattr(strict, "_native", None)
        results.append(run())
    return results


def layer(**options: Any) -> nn.Module:
    return batchnorm.BatchNormAct1d(3, dtype=torch.float64, **options)


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# ---- loading ----------------------------------------------------------------------------------------------------


@needs_native
def test_backends_says_that_the_node_is_native() -> None:
    assert batchnorm.backends()["cpu autograd"] == "native"


def test_the_environment_and_missing_operators_turn_the_node_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Native(FOLDER, reason="this build has no kernels").module is None
    monkeypatch.setenv(AUTOGRAD, "python")
    found = Native(FOLDER)
    assert found.module is None
    assert str(found) == "python: BATCHNORM_AUTOGRAD=python"


@pytest.mark.parametrize(
    ("files", "version", "reason"),
    [
        ((), "2.13.0", "this build contains no node in C++"),
        (("2_13", "2_14"), "2.15.1+cpu", "built for torch 2.13, 2.14"),
        (("2_13",), "2.1.3", "built for torch 2.13"),
        (("2_14",), "2.14.0.dev20260101", "torch 2.14.0.dev20260101 is not a release"),
        (("2_14",), "2.14.0a0+git1234567", "torch 2.14.0a0+git1234567 is not a release"),
    ],
)
def test_a_library_for_another_torch_is_never_loaded(
    files: tuple[str, ...], version: str, reason: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / f"lib{NODE}_{name}.so").write_text("not a library")
    found = Native(tmp_path, version)
    assert found.module is None
    assert found.reason == reason


def test_a_library_that_does_not_load_is_reported_and_the_node_in_python_serves(tmp_path: Path) -> None:
    (tmp_path / f"lib{NODE}_2_13.so").write_text("not a library")
    found = Native(tmp_path, "2.13.0")
    assert found.module is None
    assert str(found).startswith("python: it did not load: ")


@needs_native
def test_a_library_built_from_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "INTERFACE", compiled.INTERFACE + 1)
    found = Native(FOLDER)
    assert found.module is None
    assert str(found).startswith("python: it was built from other sources")


@pytest.fixture(scope="module")
def interface() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torch_interface", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_refuses_a_torch_whose_interface_is_unknown(interface: ModuleType, tmp_path: Path) -> None:
    header = tmp_path / "include/torch/csrc/autograd/python_variable.h"
    header.parent.mkdir(parents=True)
    (tmp_path / "Python.h").touch()
    header.write_text("struct THPVariable {\n  PyObject_HEAD\n  // Payload\n  at::Tensor cdata;\n")
    assert interface.problem(tmp_path, "2.13.0+cpu", tmp_path) == ""
    assert "not a release" in interface.problem(tmp_path, "2.14.0a0+git1234567", tmp_path)
    assert "headers of Python" in interface.problem(tmp_path, "2.13.0", tmp_path / "include")
    header.write_text("struct THPVariable {\n  PyObject_HEAD\n  c10::MaybeOwned<at::Tensor> cdata;\n")
    assert "another way" in interface.problem(tmp_path, "2.9.0", tmp_path)


@pytest.mark.usefixtures("_node")
@pytest.mark.parametrize("true", [1, "yes", torch.tensor(True)])
def test_any_true_object_means_training(true: Any) -> None:
    x, found, wanted = inputs(), batchnorm.BatchNorm1d(3).double(), batchnorm.BatchNorm1d(3).double()
    found.training = true
    assert torch.equal(found(x), wanted(x))
    assert torch.equal(found.running_var, wanted.running_var)  # type: ignore[arg-type]
    y = batchnorm.functional.batch_norm(x, None, None, training=true)
    assert torch.equal(y, batchnorm.functional.batch_norm(x, None, None, training=True))


@needs_native
def test_arguments_of_unexpected_types_are_left_to_the_other_routes() -> None:
    x, vector = torch.randn(4, 3), torch.ones(3)
    right = (x, vector, vector, None, None, None, None, False, 1e-5, 0, 0.0, False, 0.1, False, False)
    call = strict._native.batch_norm
    assert isinstance(call(*right), Tensor)
    for place, wrong in ((0, None), (0, [1.0]), (1, 1.0), (8, "1e-5"), (9, -1), (9, 99), (9, None), (12, True)):
        assert call(*right[:place], wrong, *right[place + 1 :]) is None
    for wrong in (x.to_sparse(), torch.empty(4, 3, device="meta"), torch._neg_view(x), x.to(torch.complex64)):
        assert call(wrong, *right[1:]) is None
    with pytest.raises(TypeError, match="expects 15 or 19 arguments"):
        call(x)


# ---- torch's other features -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_node")
@pytest.mark.parametrize("training", [True, False])
def test_a_tensor_that_changes_before_backward_is_an_error(training: bool) -> None:
    norm = layer(activation="relu").train(training)
    for changed in ("x", "weight", "y"):
        x = inputs() * 1.0
        y = norm(x, inputs(1))
        with torch.no_grad():
            {"x": x, "weight": norm.weight, "y": y}[changed].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.usefixtures("_node")
@pytest.mark.parametrize("training", [True, False])
def test_saved_tensors_pass_the_hooks_and_are_freed_after_backward(training: bool) -> None:
    norm, packed = layer(activation="silu").train(training), []

    def pack(t: Tensor) -> int:
        packed.append(t.clone())
        return len(packed) - 1

    x, residual = inputs(), inputs(1)
    with saved_tensors_hooks(pack, packed.__getitem__):
        y = norm(x, residual)
    found = torch.autograd.grad(y.square().sum(), (x, residual))
    assert len(packed) >= 4
    expected = torch.autograd.grad(norm(x, residual).square().sum(), (x, residual))
    assert all(map(torch.equal, found, expected))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.usefixtures("_node")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_under_vmap_are_those_of_each(training: bool) -> None:
    x, dys = inputs(), torch.stack([inputs(seed).detach() for seed in range(3)])
    y = layer(activation="gelu").train(training)(x)

    def gradient(dy: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    torch.testing.assert_close(vmap(gradient)(dys), torch.stack([gradient(dy) for dy in dys]))


@needs_native
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch reads it
def test_compiled_autograd_gives_the_gradients_of_eager_mode() -> None:
    def gradients(compiles: bool) -> list[Tensor | None]:
        norm, x, residual = layer(activation="relu"), inputs(), inputs(1)
        total = norm(x, residual).square().sum() + norm(x, mask=torch.arange(6) < 4).square().sum()
        if compiles:
            with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
                total.backward()
        else:
            total.backward()
        return [x.grad, residual.grad, norm.weight.grad, norm.bias.grad]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("_node")
@pytest.mark.parametrize(
    ("name", "masked"),
    [(name, masked) for masked in (False, True) for name in ("x", "weight", "bias", "residual")] + [("mask", True)],
)
def test_an_inference_tensor_that_autograd_cannot_save_leaves_the_running_statistics(name: str, masked: bool) -> None:
    tensors = {"x": torch.randn(6, 3), "weight": torch.ones(3), "bias": torch.zeros(3), "residual": torch.randn(6, 3)}
    if masked:
        tensors["mask"] = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0, 1.0])
    with torch.inference_mode():
        tensors[name] = tensors[name].clone()
    tensors["bias" if name == "x" else "x"].requires_grad_()
    running = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        batchnorm.functional.batch_norm(
            tensors.pop("x"), *running, tensors.pop("weight"), tensors.pop("bias"), True, activation="silu", **tensors
        )
    assert torch.equal(running[0], torch.zeros(3))
    assert torch.equal(running[1], torch.ones(3))


@pytest.mark.usefixtures("_node")
def test_a_domain_that_autograd_cannot_save_leaves_the_running_statistics() -> None:
    norm = batchnorm.nn.DomainBatchNorm1d(3, num_domains=2)
    with torch.inference_mode():
        domain = torch.arange(6) % 2
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        norm(torch.randn(6, 3), domain)
    assert norm.num_batches_tracked.tolist() == [0, 0]
    assert not norm.running_mean.any()


@needs_native
def test_anomaly_mode_inference_mode_and_autocast_give_the_same_with_both_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> list[Any]:
        norm, found = layer(), []
        with torch.inference_mode():
            found += [norm(inputs().detach()), norm.running_mean.clone(), norm.running_mean._version]
            x = inputs().detach().clone()
        with pytest.raises(RuntimeError) as error:  # autograd cannot save an inference tensor
            norm(x)
        found.append(str(error.value))
        norm = batchnorm.BatchNorm1d(3)
        with torch.autocast("cpu", torch.bfloat16):
            x = (inputs().float() @ torch.eye(3)).detach().requires_grad_()
            y = norm(x)
            found += [y.dtype, y, *torch.autograd.grad(y.float().square().sum(), (x, norm.weight))]
        with (
            torch.autograd.set_detect_anomaly(True),
            pytest.warns(UserWarning, match="Traceback of forward"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            norm(x.float()).backward(torch.full((6, 3), torch.nan))
        return found

    for native, python in zip(*both(monkeypatch, run), strict=True):
        assert torch.equal(native, python) if isinstance(native, Tensor) else native == python


@needs_native
def test_tensors_in_another_layout_and_mixed_arguments_give_the_same_with_both_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> list[Tensor]:
        found: list[Tensor] = []
        wide = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
        for view in (wide[:, ::2], wide.transpose(1, 2), wide.expand(6, 8, 5)[::2], wide[:0]):
            for training in (True, False):
                x = view.detach().requires_grad_()
                norm = batchnorm.BatchNorm1d(x.shape[1]).train(training)
                y = norm(x)
                dy = torch.ones(y.shape[::-1]).permute(2, 1, 0) if len(y) else torch.ones_like(y)
                found += [y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy), norm.running_var]
        return found

    for native, python in zip(*both(monkeypatch, run), strict=True):
        assert native.stride() == python.stride()
        assert torch.equal(native, python)


def test_the_description_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_native", Native(FOLDER, reason="some reason"))
    assert batchnorm.backends()["cpu autograd"] == "python: some reason"
