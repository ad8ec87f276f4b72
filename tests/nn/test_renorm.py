"""Batch renormalization: the paper's algorithm, its limits and schedules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from batchnorm import nn, reference
from batchnorm.nn.renorm import BatchRenorm, BatchRenorm1d, BatchRenorm2d, PaperSchedule
from tests.cases import CASES, Case, ids
from tests.tolerance import Terms, assert_within, bound

# torch loads its forward-mode formulas through its own deprecated compiler.
pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def wide(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().numpy().copy()


def constant(value: float) -> Callable[[Tensor], Tensor]:
    """Return a constant schedule, which takes the general path to a limit that is a number."""
    return lambda batches: torch.full_like(batches, value, dtype=torch.float64)


def copy_case_into(layer: torch.nn.Module, case: Case) -> None:
    """Copy the running statistics and parameters of the case to the layer."""
    weight, bias = case.parameters()
    running_mean, running_var = case.running()
    with torch.no_grad():
        layer.running_mean.copy_(running_mean)
        layer.running_var.copy_(running_var)
        for own, given in ((layer.weight, weight), (layer.bias, bias)):
            if given is not None:
                own.copy_(given)


@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.1, 0.2), (torch.inf, torch.inf)], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.m > 1 and c.affine == "both"], ids=ids)
def test_agrees_with_the_reference(case: Case, limits: tuple[float, float]) -> None:
    dtype = case.dtype if case.half_parameters else case.statistics_dtype
    layer = BatchRenorm(case.shape[1], momentum=0.3, dtype=dtype, rmax=limits[0], dmax=limits[1])
    copy_case_into(layer, case)
    old = {name: wide(t) for name, t in layer.state_dict().items() if t.dim()}
    x, dy = case.x().requires_grad_(), case.random(4)
    y = layer(x)
    y.backward(dy)

    options = {"running_mean": old["running_mean"], "running_var": old["running_var"]}
    expected = reference.forward_renorm(
        wide(x), old["weight"], old["bias"], **options, rmax=limits[0], dmax=limits[1], eps=layer.eps
    )
    backward = reference.backward_renorm(wide(dy), expected)
    inner = expected.forward
    # The errors of r and d in deviations: rounding of the running statistics' scale, and of the distance of means.
    distance = 1.0 + np.abs(expected.d) + np.abs(old["weight"] * expected.d) + np.abs(expected.r)
    terms = Terms(inner, None, old["bias"])
    assert y.dtype == x.dtype and y.stride() == torch.empty_like(x).stride()
    z_terms = terms.z + np.abs(inner.layout.spread(old["weight"] * distance))
    assert_within(y, expected.y, bound(z_terms, case.dtype, expected.y), "y")
    dz = np.abs(wide(dy))
    sum_dz, sum_dz_xhat = terms.sums(dz, like=inner.weight)
    weight_terms = expected.r * sum_dz_xhat + np.abs(expected.d) * sum_dz
    assert_within(x.grad, backward.dx, bound(terms.dx(dz), case.dtype, backward.dx), "dx")
    assert_within(layer.weight.grad, backward.dweight, bound(weight_terms, dtype, backward.dweight), "dγ")
    assert_within(layer.bias.grad, backward.dbias, bound(sum_dz, dtype, backward.dbias), "dβ")
    running = reference.update_running(
        old["running_mean"], old["running_var"], inner.batch, momentum=0.3, convention="torch"
    )
    mean_terms = np.abs(old["running_mean"]) + np.abs(running.mean) + terms.deviation()
    assert_within(layer.running_mean, running.mean, bound(mean_terms, dtype, running.mean), "running_mean")
    assert_within(layer.running_var, running.var, bound(running.var, dtype, running.var), "running_var")


def steps(layer: torch.nn.Module, number: int = 3, shape: tuple[int, ...] = (8, 3, 7, 7)) -> list[Tensor]:
    """Return outputs, gradients and state of a few steps on fixed data."""
    generator, outcomes = torch.Generator().manual_seed(5), []
    dtype = layer.running_mean.dtype
    for _ in range(number):
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1).to(dtype).requires_grad_()
        y = layer(x)
        layer.zero_grad()
        y.backward(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        outcomes += [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
    return outcomes + [b.clone() for b in layer.buffers()]


def test_is_batch_normalization_at_one_and_zero_bit_for_bit() -> None:
    for a, b in zip(steps(BatchRenorm2d(3, rmax=1.0, dmax=0.0)), steps(nn.BatchNorm2d(3)), strict=True):
        assert torch.equal(a, b)


def test_the_general_path_is_batch_normalization_at_one_and_zero_too() -> None:
    renormalizing = BatchRenorm2d(3, rmax=constant(1.0), dmax=constant(0.0), dtype=torch.float64)
    assert_close(steps(renormalizing), steps(nn.BatchNorm2d(3, dtype=torch.float64)), rtol=1e-12, atol=1e-12)


def test_without_clipping_training_computes_what_evaluation_does_before_the_update() -> None:
    layer = BatchRenorm2d(3, rmax=torch.inf, dmax=torch.inf, dtype=torch.float64)
    steps(layer)
    evaluation, x = copy.deepcopy(layer).eval(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert_close(layer(x), evaluation(x), rtol=1e-12, atol=1e-12)


def frozen(layer: BatchRenorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute r and d of x by their definition."""
    values = x.detach().transpose(0, 1).flatten(1)
    sigma = (layer.running_var + layer.eps).sqrt()
    r = ((values.var(1, correction=0) + layer.eps).sqrt() / sigma).clamp(1 / layer.rmax, layer.rmax)
    d = ((values.mean(1) - layer.running_mean) / sigma).clamp(-layer.dmax, layer.dmax)
    return r, d


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_first_and_second_derivatives_keep_r_and_d_constant(affine: bool) -> None:
    layer = BatchRenorm(2, rmax=1.5, dmax=0.5, affine=affine, dtype=torch.float64)
    layer.update_running_stats = False
    torch.nn.init.uniform_(layer.running_mean, -1, 1)
    torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    for p in layer.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    r, d = (t.view(2, 1) for t in frozen(layer, x))

    def composed(x: Tensor) -> Tensor:
        x_hat = torch.nn.functional.batch_norm(x, None, None, training=True, eps=layer.eps) * r + d
        return x_hat * layer.weight.view(2, 1) + layer.bias.view(2, 1) if affine else x_hat

    inputs = (x, *layer.parameters())
    v, dy = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    outcomes = []
    for f in (layer, composed):
        y = f(x)
        first = torch.autograd.grad(y, inputs, dy.requires_grad_(), create_graph=True)
        along = sum((g * g.detach().cos()).sum() for g in first) + (first[0] * v).sum()
        outcomes.append([y, *first, *torch.autograd.grad(along, (dy, *inputs), allow_unused=True)])
    for ours, theirs in zip(*outcomes, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_derivatives_if_both_limits_apply() -> None:
    # There r and d are constant, so that finite differences see what autograd does.
    layer = BatchRenorm(2, rmax=1.2, dmax=0.1, dtype=torch.float64)
    layer.update_running_stats = False
    torch.nn.init.constant_(layer.running_mean, 50.0)
    torch.nn.init.constant_(layer.running_var, 100.0)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, *(torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2)))
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_r_and_d_are_constant_in_forward_mode_and_under_transforms() -> None:
    layer = BatchRenorm(2, rmax=1.5, dmax=0.5, dtype=torch.float64)
    layer.update_running_stats = False
    x, v = torch.randn(2, 6, 2, dtype=torch.float64)
    backward = torch.autograd.functional.jacobian(layer, x)
    assert_close(torch.func.jacrev(layer)(x), backward)
    assert_close(torch.func.jacfwd(layer)(x), backward)
    assert_close(torch.func.jvp(layer, (x,), (v,))[1], torch.tensordot(backward, v, 2))


def test_an_image_at_a_time_trains() -> None:
    layer = BatchRenorm2d(4)
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    layer(x).pow(2).sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="BatchRenorm2d expects more than one value per channel in training"):
        layer(torch.randn(1, 4, 1, 1))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("shape", [(6, 3, 5), (4, 3, 4, 5)], ids=str)
def test_a_mask_counts_as_the_values_packed(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    padded, packed = BatchRenorm(3, dtype=torch.float64), BatchRenorm1d(3, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64)
        assert_close(padded(x, mask).movedim(1, -1)[mask], packed(x.movedim(1, -1)[mask]), rtol=1e-11, atol=1e-11)
        assert_close(padded.state_dict(), packed.state_dict(), rtol=1e-12, atol=1e-12)
    before = copy.deepcopy(padded.state_dict())
    assert padded(x, torch.zeros_like(mask)).isfinite().all()
    assert_close(dict(padded.state_dict()), dict(before), rtol=0, atol=0)


# Limits and schedules


def test_the_papers_schedule_is_that_of_the_paper() -> None:
    paper = PaperSchedule()
    batches = torch.tensor([0, 4_999, 5_000, 15_000, 25_000, 40_000, 10**9])
    assert paper.rmax(batches).tolist() == pytest.approx([1, 1, 1, 1 + 2 / 3.5, 1 + 4 / 3.5, 3, 3])
    assert paper.dmax(batches).tolist() == pytest.approx([0, 0, 0, 2.5, 5, 5, 5])


def test_a_schedule_starts_as_batch_normalization_and_then_differs() -> None:
    short = PaperSchedule(start=2, rmax_end=4, dmax_end=3)
    layer = BatchRenorm2d(3, rmax=short.rmax, dmax=short.dmax, dtype=torch.float64)
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    for number in range(5):
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64) + 1
        same = torch.allclose(layer(x), plain(x), rtol=1e-10, atol=1e-10)
        assert same == (number <= 2)


def test_a_resumed_run_continues_its_schedule() -> None:
    short = PaperSchedule(start=1, rmax_end=9, dmax_end=6)

    def new() -> BatchRenorm2d:
        return BatchRenorm2d(3, rmax=short.rmax, dmax=short.dmax, dtype=torch.float64)

    run = new()
    steps(run, 4)
    resumed = new()
    resumed.load_state_dict(run.state_dict())
    for a, b in zip(steps(run, 2), steps(resumed, 2), strict=True):
        assert torch.equal(a, b)


def test_a_layer_with_a_schedule_is_copied_and_pickled() -> None:
    paper = PaperSchedule(start=0, rmax_end=10, dmax_end=10)
    layer = BatchRenorm2d(3, rmax=paper.rmax, dmax=paper.dmax)
    steps(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(4, 3, 5, 5)
        assert torch.equal(copy.deepcopy(layer)(x), other(x))
    assert repr(layer).endswith("rmax=PaperSchedule.rmax, dmax=PaperSchedule.dmax)")
    assert repr(BatchRenorm2d(3, sync=True)).endswith("rmax=3.0, dmax=5.0, sync=True)")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rmax": 0.5}, ValueError, r"BatchRenorm2d expects rmax >= 1, got 0.5. rmax = 1 with dmax = 0 is batch norm"),
        ({"dmax": -1.0}, ValueError, r"BatchRenorm2d expects dmax >= 0, got -1.0"),
        ({"dmax": torch.nan}, ValueError, r"expects dmax >= 0, got nan"),
        (
            {"rmax": "3"},
            TypeError,
            r"expects rmax to be a number >= 1, or a function of the number of batches, got '3'",
        ),
        ({"rmax": lambda batches: 0.0}, ValueError, r"expects rmax >= 1, got 0.0"),
        ({"dmax": lambda batches: None}, TypeError, r"expects dmax to be a number .*got None"),
        ({"track_running_stats": False}, ValueError, r"expects track_running_stats=True, got False"),
    ],
)
def test_a_wrong_argument_raises_an_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchRenorm2d(3, **options)


def test_a_wrong_schedule_raises_an_error() -> None:
    with pytest.raises(ValueError, match=r"PaperSchedule expects 0 <= start < rmax_end and dmax_end, got start=9"):
        PaperSchedule(start=9, rmax_end=20, dmax_end=9)
    with pytest.raises(ValueError, match=r"PaperSchedule expects rmax_limit >= 1, got 0"):
        PaperSchedule(rmax_limit=0)


def test_removed_running_statistics_raise_an_error() -> None:
    layer = BatchRenorm2d(3)
    layer.running_mean = layer.running_var = None
    with pytest.raises(ValueError, match="BatchRenorm2d expects running_mean, running_var and num_batches_tracked"):
        layer(torch.randn(4, 3, 5, 5))


def test_a_compiled_schedule_needs_one_graph() -> None:
    short = PaperSchedule(start=1, rmax_end=4, dmax_end=3)
    layer = BatchRenorm2d(3, rmax=short.rmax, dmax=short.dmax, dtype=torch.float64)
    compiled = copy.deepcopy(layer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.compile(backend="aot_eager", fullgraph=True)
        assert_close(steps(compiled, 5), steps(layer, 5), rtol=1e-11, atol=1e-11)
