"""`channel_dim=-1`: x of shape `[N, *S, C]` gives the same results as with its channels moved to dimension 1."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, ReLU, Sequential
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

import batchnorm
from batchnorm import functional, nn
from batchnorm.nn.layer import NormLayer
from tests.nn.test_family_contract import FAMILY, MEMBERS, data, layer_of, step

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def last(t: Tensor) -> Tensor:
    """Return the same values with channels in the last dimension, contiguous."""
    return t.movedim(1, -1).contiguous()


def outcome(name: str, layer: NormLayer, dtype: torch.dtype = torch.float64, **kwargs: Any) -> list[Tensor]:
    """Return y and dx as `[N, C, *S]`, the other gradients, and the buffers."""
    moved = layer.channel_dim == -1
    x, dy = data(dtype), data(dtype, seed=6)
    if moved:
        x, dy, kwargs = last(x), last(dy), {k: last(v) if k == "residual" else v for k, v in kwargs.items()}

    y, dx, *others = step(name, layer, lambda x, *extra: layer(x, *extra, **kwargs), x, dy)
    assert y.stride() == dx.stride() == x.stride()
    return [y.movedim(-1, 1), dx.movedim(-1, 1), *others] if moved else [y, dx, *others]


def pair(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[NormLayer, NormLayer]:
    return layer_of(name, dtype, channel_dim=-1, **options), layer_of(name, dtype, **options)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        units = 64 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
        assert_close(ours, theirs, rtol=units, atol=units)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@MEMBERS
def test_it_is_the_layer_on_moved_channels(name: str, dtype: torch.dtype, training: bool) -> None:
    layers = pair(name, torch.float64 if dtype == torch.float64 else torch.float32)
    ours, theirs = (outcome(name, layer.train(training), dtype) for layer in layers)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", [name for name, member in FAMILY.items() if member.mask or name == "BatchNormAct2d"])
def test_masks_residuals_and_single_values_are_those_of_moved_channels(name: str) -> None:
    mask = torch.rand(5, 6, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    layers = pair(name, on_single="running")
    kwargs = {"residual": data(seed=9)} if name == "BatchNormAct2d" else {}
    assert_same(*(outcome(name, layer, mask=mask, **kwargs) for layer in layers))
    single = torch.zeros(5, 6, 3, dtype=torch.bool)
    single[2, 1, 1] = True
    assert_same(*(outcome(name, layer, mask=single) for layer in layers))
    ours, theirs = layers
    extra, one = FAMILY[name].extra(1), data(shape=(1, 4, 1, 1))
    assert_close(ours(last(one), *extra).movedim(-1, 1), theirs(one, *extra))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm, (5, 4)), (nn.BatchNorm, (5, 4, 6)), (nn.BatchNorm, (5, 4, 2, 3, 2, 2)),
        (nn.BatchNorm1d, (5, 4)), (nn.BatchNorm1d, (5, 4, 6)), (nn.BatchNorm3d, (5, 4, 2, 3, 2)),
        (nn.LazyBatchNorm1d, (5, 4, 6)), (nn.LazyBatchNorm2d, (5, 4, 6, 3)), (nn.BatchNormAct1d, (5, 4, 6)),
        (nn.BatchRenorm1d, (5, 4, 6)), (nn.GhostBatchNorm1d, (5, 4, 6)), (nn.DecorrelatedBatchNorm1d, (5, 4, 6)),
    ],
)  # fmt: skip
def test_every_rank_and_lazy_layers_take_it(kind: Any, shape: tuple[int, ...]) -> None:
    arguments = () if "Lazy" in kind.__name__ else (4,)
    ours, theirs, x = kind(*arguments, channel_dim=-1), kind(*arguments), torch.randn(shape)
    assert_close(ours(last(x)).movedim(-1, 1), theirs(x))
    assert_close(ours.running_mean, theirs.running_mean)
    assert ours.num_features == 4
    assert repr(ours) == repr(theirs).replace(
        ", track_running_stats=True", ", track_running_stats=True, channel_dim=-1"
    )


def test_the_rows_of_a_label_are_those_of_the_channels() -> None:
    x, weight, bias = torch.randn(5, 4, 6), torch.randn(5, 4), torch.randn(5, 4)
    ours, theirs = nn.ConditionalBatchNorm1d(4, channel_dim=-1), nn.ConditionalBatchNorm1d(4)
    y = ours(last(x), weight=weight, bias=bias)
    assert_close(y.movedim(-1, 1), theirs(x, weight=weight, bias=bias))
    with pytest.raises(ValueError, match=r"expects weight of shape \[N, C\] = \[5, 4\] for x of shape \[5, 6, 4\]"):
        ours(last(x), weight=torch.randn(5, 6), bias=bias)
    domains = nn.DomainBatchNorm1d(4, num_domains=2, channel_dim=-1)
    assert domains.select(0).channel_dim == -1


def test_nothing_is_copied() -> None:
    """Check that there are the same allocations as for the same values `[N·L, C]`: the result, dx and vectors."""
    x, dy, residual = torch.randn(3, 8, 128, 64).unbind()
    mean, var, weight = torch.zeros(64), torch.ones(64), torch.ones(64, requires_grad=True)

    def allocated(*shape: int) -> list[int]:
        leaf = x.reshape(shape).requires_grad_()

        def run() -> None:
            y = functional.batch_norm(
                leaf, mean, var, weight, None, True, residual=residual.reshape(shape), activation="relu",
                channel_dim=-1,
            )  # fmt: skip
            (dx,) = torch.autograd.grad(y, leaf, dy.reshape(shape))
            assert y.is_contiguous() and dx.is_contiguous()

        run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            run()
        return sorted(n for event in found.events() if (n := event.self_cpu_memory_usage) > x.nbytes / 2)

    assert allocated(8, 128, 64) == allocated(8, 16, 8, 64) == allocated(1024, 64)
    assert len(allocated(8, 128, 64)) == 2


def test_the_function_takes_it() -> None:
    x = torch.randn(3, 5, 4)
    expected = torch.nn.functional.batch_norm(x.movedim(-1, 1), None, None, training=True).movedim(1, -1)
    assert_close(functional.batch_norm(x, None, None, training=True, channel_dim=-1), expected)


@pytest.mark.parametrize("value", [0, 2, -2, "last", None])
def test_another_dimension_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="BatchNorm expects channel_dim to be 1 or -1, got"):
        nn.BatchNorm(4, channel_dim=value)
    with pytest.raises(ValueError, match="batch_norm expects channel_dim to be 1 or -1, got"):
        functional.batch_norm(torch.randn(3, 4), None, None, training=True, channel_dim=value)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.BatchNorm1d(4, channel_dim=-1), (3, 2, 2, 4), r"x of shape \[N, C\] or \[N, L, C\], got \[3, 2, 2, 4\] "
                                                          r"\(4 dims\). For \[N, H, W, C\] use BatchNorm2d."),
        (nn.BatchNorm(4, channel_dim=-1), (3,), r"x of shape \[N, \*, C\], got \[3\]"),
        (nn.BatchNorm(4, channel_dim=-1), (3, 4, 5), r"shape \[C\] = \[5\] for x of shape \[3, 4, 5\], got \[4\]. "
                                                     r"With channel_dim=-1, channels must be the last dimension"),
        (nn.BatchNorm(4), (3, 5, 4), r"move them with x.movedim\(-1, 1\), or pass channel_dim=-1."),
        (nn.BatchNorm(4, channel_dim=-1), (1, 1, 4), r"more than one value per channel in training, got x of shape "
                                                     r"\[1, 1, 4\]"),
    ],
)  # fmt: skip
def test_a_wrong_input_raises_an_error(layer: NormLayer, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask of shape \[N, \*S\] = \[3, 5\] .* for x of shape \[3, 5, 4\], got"):
        nn.BatchNorm(4, channel_dim=-1)(torch.randn(3, 5, 4), mask)


# With torch's other features


@MEMBERS
def test_it_compiles_for_every_size(name: str) -> None:
    plain = layer_of(name, channel_dim=-1)
    layer = copy.deepcopy(plain)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for shape in ((5, 6, 3, 4), (3, 2, 7, 4)):
        outcomes = [step(name, m, call, data(shape=shape)) for m, call in ((plain, plain), (layer, compiled))]
        assert_close(outcomes[1], outcomes[0], rtol=1e-10, atol=1e-10)


@MEMBERS
def test_second_derivatives_agree_by_both_routes(name: str) -> None:
    layer, extra, dy = layer_of(name, channel_dim=-1), FAMILY[name].extra(5), last(data(seed=6))
    layer.update_running_stats = False

    def loss(x: Tensor) -> Tensor:
        return (layer(x, *extra) * dy).pow(2).sum()

    x = last(data()).requires_grad_()
    composed = torch.func.grad(lambda x: torch.func.grad(loss)(x).pow(2).sum())(x.detach())
    (dx,) = torch.autograd.grad(loss(x), x, create_graph=True)
    assert_close(torch.autograd.grad(dx.pow(2).sum(), x)[0], composed, rtol=1e-9, atol=1e-9)


def test_it_exports_as_torchs_operators() -> None:
    layer = nn.BatchNorm1d(4, channel_dim=-1).eval()
    layer.running_mean += 1.0
    x = torch.randn(3, 5, 4)
    sizes = {0: torch.export.Dim("n", min=2), 1: torch.export.Dim("l", min=2)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=False)
    assert not any("batchnorm" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(7, 2, 4)
    assert_close(program.module()(x), layer(x))
    assert_close(torch.jit.trace(layer, x)(x[:2]), layer(x[:2]))
    assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_copies_keep_it() -> None:
    layer = nn.BatchNorm(4, channel_dim=-1)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.channel_dim == -1
    assert layer.state_dict().keys() == torch.nn.BatchNorm1d(4).state_dict().keys()


# With the functions that change or read a model


def trained(model: torch.nn.Module, *shape: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(shape, generator=generator) * 2 + 1)
    return model.eval()


@pytest.mark.parametrize("kind", [nn.BatchNorm, nn.BatchRenorm, nn.FrozenBatchNorm, nn.SyncBatchNorm])
def test_fold_folds_into_the_linear_layers_around_it(kind: Any) -> None:
    network = Sequential(Linear(4, 6), kind(6, channel_dim=-1), ReLU(), kind(6, channel_dim=-1), Linear(6, 4))
    model = trained(network, 8, 5, 4)
    folded, report = batchnorm.fold(model, torch.randn(2, 5, 4))
    assert not report.left, str(report)
    for x in (torch.randn(3, 7, 4), torch.randn(1, 5, 4)):
        assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_fold_follows_movedim() -> None:
    class Moved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = Linear(4, 6), torch.nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x).movedim(-1, 1)).moveaxis(1, -1)

    model = trained(Moved(), 8, 5, 4)
    folded, report = batchnorm.fold(model, torch.randn(2, 5, 4))
    assert not report.left, str(report)
    x = torch.randn(3, 5, 4)
    assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_convert_and_freeze_keep_it_and_skip_layers_that_would_lose_it() -> None:
    model = trained(Sequential(Linear(4, 6), nn.BatchNorm(6, channel_dim=-1)), 8, 5, 4)
    x = torch.randn(2, 5, 4)
    for to in ("BatchRenorm", "GhostBatchNorm", "SyncBatchNorm", "FrozenBatchNorm"):
        changed = batchnorm.convert(model, to).model
        assert changed[1].channel_dim == -1
        assert_close(changed(x), model(x))
    frozen = batchnorm.freeze(model).model
    assert_close(frozen.train()(x), model(x))
    assert batchnorm.unfreeze(frozen).model[1].channel_dim == -1
    for to in (torch.nn.BatchNorm1d, torch.nn.GroupNorm, torch.nn.SyncBatchNorm):
        same, report = batchnorm.convert(model, to)
        assert isinstance(same[1], nn.BatchNorm)
        assert "its channels are in the last dimension" in report.left[0].reason
    plain = Sequential(Linear(4, 6), torch.nn.BatchNorm1d(6))
    there, _ = batchnorm.convert(plain, batchnorm.nn, channel_dim=-1)
    there(x)
    _, report = batchnorm.convert(there, torch.nn)
    assert "its channels are in the last dimension" in report.left[0].reason


def test_accelerate_fuses_it() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = Linear(4, 4), nn.BatchNorm(4, channel_dim=-1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(self.linear(x)) + x).relu()

    model, x = Block(), torch.randn(8, 5, 4)
    fast, report = batchnorm.accelerate(model, x)
    assert str(report.fused["norm"]) == "residual + relu"
    assert_close(fast(x), model(x))
    assert_close(fast.norm.running_mean, model.norm.running_mean)


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_recalibrate_measures_the_last_dimension(passes: str) -> None:
    model = Sequential(
        Linear(4, 6), nn.BatchNorm(6, channel_dim=-1), ReLU(), Linear(6, 5), nn.BatchNorm(5, channel_dim=-1)
    )
    batches = list(torch.randn(6, 8, 5, 4))
    found, _ = batchnorm.recalibrate(model, batches, passes=passes)
    z = model[0](torch.cat(batches)).flatten(0, 1).detach()
    assert_close(found[1].running_mean, z.mean(0))
    assert_close(found[1].running_var, z.var(0))
    masks = [torch.rand(8, 5) < 0.6 for _ in batches]
    pairs = list(zip(batches, masks, strict=True))
    found, _ = batchnorm.recalibrate(
        model, pairs, passes=passes, forward=lambda m, batch: m(batch[0]), mask=lambda batch: batch[1]
    )
    assert_close(found[1].running_mean, z[torch.cat(masks).flatten()].mean(0))


def test_drop_redundant_bias_takes_the_bias_of_a_linear_layer() -> None:
    model = Sequential(Linear(4, 6), nn.BatchNorm(6, channel_dim=-1))
    dropped, report = batchnorm.drop_redundant_bias(model)
    assert dropped[0].bias is None, str(report)
    x = torch.randn(8, 5, 4)
    assert_close(dropped(x), model(x))
    model = Sequential(torch.nn.Conv1d(4, 6, 1), nn.BatchNorm(6, channel_dim=-1))
    _, report = batchnorm.drop_redundant_bias(model)
    assert "in the last dimension" in report.left[0].reason


class Moved(torch.nn.Module):
    """The code that a user needs without `channel_dim`."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def test_the_doctor_and_the_watch_measure_the_last_dimension() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(32, 5, 4) for _ in range(4)]
    models = [
        Sequential(Linear(4, 6), nn.BatchNorm(6, channel_dim=-1), ReLU(), Linear(6, 3)),
        Sequential(Linear(4, 6), Moved(6), ReLU(), Linear(6, 3)),
    ]
    models[1].load_state_dict({k.replace("1.", "1.norm."): v for k, v in models[0].state_dict().items()})
    ours = batchnorm.diagnose(models[0], batches)
    theirs = batchnorm.diagnose(models[1], batches)

    (bias,) = [finding for finding in ours.findings if finding.code == "BN110"]
    assert bias.paths == ("0",)
    assert [f.code for f in ours.findings if f is not bias] == [f.code for f in theirs.findings]
    texts = [next(f for f in each.findings if f.code == "BN102").evidence[-1] for each in (ours, theirs)]
    assert texts[0] == texts[1].replace("1.norm", "1")  # running mean off by .. σ, running σ by a factor of ..
    with batchnorm.watch(models[0], every=1) as w:
        for x in batches:
            models[0](x).square().mean().backward()
            w.step()
    assert w.history
