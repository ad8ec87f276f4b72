"""Properties of every layer: torch's interface, better errors, and correct updates of the statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import batchnorm
from batchnorm import nn
from batchnorm.functional import batch_norm
from batchnorm.nn.layer import NormLayer
from tests.cases import torch_activation

SHAPES = {
    "BatchNorm": (4, 3, 2, 3, 2, 2),
    "BatchNorm1d": (4, 3, 5),
    "BatchNorm2d": (4, 3, 5, 6),
    "BatchNorm3d": (4, 3, 2, 5, 6),
}
ACT_SHAPES = {f"BatchNormAct{d}d": SHAPES[f"BatchNorm{d}d"] for d in (1, 2, 3)}
TORCH = {name: getattr(torch.nn, name) for name in SHAPES if hasattr(torch.nn, name)}
TORCH["BatchNorm"] = torch.nn.modules.batchnorm._BatchNorm
LAYERS = SHAPES | ACT_SHAPES

OPTIONS = [
    {},
    {"momentum": 0.3, "eps": 1e-3},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"dtype": torch.float64},
]


def option_id(options: dict[str, object]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


def make(name: str, **options: object) -> NormLayer:
    return getattr(nn, name)(3, **options)


def theirs_for(ours: NormLayer, name: str, **options: object) -> torch.nn.Module:
    class AnyRank(torch.nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, input: Tensor) -> None:
            pass

    layer = TORCH.get(name, AnyRank)
    theirs = (AnyRank if name == "BatchNorm" else layer)(3, **options)
    theirs.load_state_dict(ours.state_dict())
    return theirs


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@pytest.mark.parametrize("name", SHAPES)
def test_trains_and_evaluates_like_torchs_layer(name: str, options: dict[str, object]) -> None:
    ours = make(name, **options)
    for p in ours.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5)
    theirs = theirs_for(ours, name, **options)
    assert isinstance(ours, TORCH[name])
    dtype = options.get("dtype", torch.float32)
    for step in range(4):
        for layer in (ours, theirs):
            layer.train(step != 3)
        x = torch.randn(SHAPES[name], dtype=dtype) + 1
        outcomes = []
        for layer in (ours, theirs):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.pow(2).mul(torch.arange(y.numel(), dtype=dtype).view_as(y) / y.numel()).sum().backward()
            outcomes.append([y, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("activation", sorted(batchnorm.ops.ACTIVATIONS))
@pytest.mark.parametrize("name", ACT_SHAPES)
def test_the_fused_layer_is_its_three_parts(name: str, activation: str) -> None:
    fused = getattr(nn, name)(3, activation=activation, negative_slope=0.3, alpha=0.3)
    plain = getattr(nn, name.replace("Act", ""))(3)
    plain.load_state_dict(fused.state_dict())
    f = torch_activation(activation, 0.3)
    for training in (True, False):
        fused.train(training), plain.train(training)
        x, residual = torch.randn(2, *ACT_SHAPES[name]) * 3
        torch.testing.assert_close(fused(x), f(plain(x)))
        torch.testing.assert_close(fused(x, residual), f(plain(x) + residual))
        torch.testing.assert_close(fused(x, residual=residual), f(plain(x) + residual))
    assert fused.num_batches_tracked == 3
    assert not isinstance(fused, torch.nn.modules.batchnorm._BatchNorm)
    assert isinstance(fused, torch.nn.modules.batchnorm._NormBase)


def test_elu_keeps_its_alpha() -> None:
    layer = nn.BatchNormAct2d(3, activation="elu", alpha=0.5)
    assert repr(layer).endswith("activation='elu', alpha=0.5)")
    assert (nn.BatchNormAct2d(3, activation="relu").alpha, nn.BatchNorm2d(3).alpha) == (1.0, 1.0)
    frozen = batchnorm.freeze(torch.nn.Sequential(layer)).model
    assert isinstance(frozen[0], nn.FrozenBatchNormAct2d)
    x = torch.randn(2, 3, 4, 4) * 3
    for kept in (frozen[0], copy.deepcopy(layer), batchnorm.unfreeze(frozen).model[0]):
        assert kept.alpha == 0.5
        assert_close(kept.eval()(x), torch.nn.functional.elu(nn.BatchNorm2d(3).eval()(x), 0.5))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="BatchNormAct2d expects alpha to be a finite number, got .* usual value"):
            nn.BatchNormAct2d(3, activation="elu", alpha=wrong)


@pytest.mark.parametrize("name", LAYERS)
def test_arguments_have_torchs_order_and_the_rest_is_keyword_only(name: str) -> None:
    layer = getattr(nn, name)(3, 1e-3, 0.2, False, False, "cpu", torch.float64)
    assert (layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats) == (
        3, 1e-3, 0.2, False, False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="positional"):
        getattr(nn, name)(3, 1e-3, 0.2, False, False, "cpu", torch.float64, True)


def test_description_names_what_differs_from_torch() -> None:
    assert repr(nn.BatchNorm2d(3)) == repr(torch.nn.BatchNorm2d(3))
    layer = nn.BatchNormAct2d(3, activation="leaky_relu", on_nonfinite="skip")
    layer.update_running_stats = False
    assert repr(layer).endswith(
        "on_nonfinite='skip', update_running_stats=False, activation='leaky_relu', negative_slope=0.01)"
    )


@pytest.mark.parametrize("digit", "123")
def test_lazy_takes_the_channels_of_the_first_batch(digit: str) -> None:
    shape = SHAPES[f"BatchNorm{digit}d"]
    lazy = getattr(nn, f"LazyBatchNorm{digit}d")(momentum=0.3, bias=False, on_nonfinite="skip")
    plain = getattr(nn, f"BatchNorm{digit}d")(3, momentum=0.3, bias=False, on_nonfinite="skip")
    x = torch.randn(shape)
    assert torch.equal(lazy(x), plain(x))
    assert type(lazy) is type(plain)
    assert repr(lazy) == repr(plain)
    for key, value in plain.state_dict().items():
        assert torch.equal(lazy.state_dict()[key], value)


def test_lazy_refuses_a_wrong_rank_before_it_makes_anything() -> None:
    lazy = nn.LazyBatchNorm2d()
    with pytest.raises(ValueError, match=r"LazyBatchNorm2d expects x of shape \[N, C, H, W\], got \[4, 7\]"):
        lazy(torch.randn(4, 7))
    assert lazy.has_uninitialized_params()
    assert lazy(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    lazy.reset_parameters()
    assert (lazy.running_mean == 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["residual", "mask", "weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize(
    "change", [Tensor.to_sparse, lambda x: torch.nested.nested_tensor(list(x))], ids=["sparse", "nested"]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_every_tensor_must_be_dense(change: Callable[[Tensor], Tensor], name: str, training: bool) -> None:
    x, given = torch.randn(8, 4), {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    given |= {name: change({**given, "residual": x, "mask": torch.ones(8)}.get(name, torch.ones(4)))}
    with pytest.raises(ValueError, match=rf"batch_norm expects a dense {name}, got .*{name}\.to_"):
        batch_norm(x, **given, training=training)


@pytest.mark.parametrize("change", [Tensor.to_sparse_csr, Tensor.to_mkldnn], ids=["csr", "mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_tensor_with_channels_last_must_be_dense(change: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="expects a dense x, got one of layout"):
        nn.BatchNorm1d(4, channel_dim=-1)(change(x))
    with pytest.raises(ValueError, match="expects a dense residual, got one of layout"):
        nn.BatchNormAct1d(4, channel_dim=-1)(x, change(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_sparse_input_is_refused(training: bool) -> None:
    layer = nn.BatchNormAct1d(4).train(training)
    with pytest.raises(ValueError, match=r"expects a dense x, got one of layout torch.sparse_coo\. Use x.to_dense"):
        layer(torch.randn(8, 4).to_sparse())
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("BatchNorm2d", (8, 16), r"BatchNorm2d expects x of shape \[N, C, H, W\], got \[8, 16\] \(2 dims\). "
                                 r"For \[N, C\] use BatchNorm1d."),
        ("BatchNorm1d", (8, 3, 4, 4), r"BatchNorm1d expects x of shape \[N, C\] or \[N, C, L\], got \[8, 3, 4, 4\] "
                                      r"\(4 dims\). For \[N, C, H, W\] use BatchNorm2d."),
        ("BatchNormAct3d", (8, 3, 4), r"BatchNormAct3d expects .* For \[N, C, L\] use BatchNormAct1d."),
        ("BatchNorm2d", (2, 3, 4, 4, 4, 4), r"\(6 dims\). For more than three .* without 1d, 2d or 3d in its name."),
        ("BatchNorm", (8,), r"BatchNorm expects x of shape \[N, C, \*\], got \[8\]"),
        ("BatchNorm2d", (8, 4, 5, 5), r"BatchNorm2d expects .* of shape \[C\] = \[4\] for x of shape \[8, 4, 5, 5\], "
                                      r"got \[3\]. Give the layer num_features=4"),
        ("BatchNorm2d", (8, 5, 5, 3), r"Channels must be the second dimension: move them with x.movedim\(-1, 1\)"),
        ("BatchNorm1d", (1, 3), r"BatchNorm1d expects more than one value per channel in training, got x of shape "
                                r"\[1, 3\]. One value has no variance: use a larger batch, on_single='running' "
                                r"\(normalizes by the running statistics\), or evaluation mode."),
    ],
)  # fmt: skip
def test_a_wrong_input_raises_an_error_and_changes_nothing(name: str, shape: tuple[int, ...], message: str) -> None:
    layer = make(name)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()


@pytest.mark.parametrize("name", [*LAYERS, "LazyBatchNorm2d"])
def test_a_wrong_argument_raises_an_error(name: str) -> None:
    size = () if name.startswith("Lazy") else (3,)
    for options, message in (
        ({"eps": 0.0}, rf"{name} expects eps > 0, got 0.0. .*the usual value is 1e-5"),
        ({"eps": -1.0}, rf"{name} expects eps > 0, got -1.0"),
        ({"momentum": 1.5}, rf"{name} expects momentum in \[0, 1\] or None, got 1.5. .*Keras and Flax"),
        ({"momentum": -0.1}, rf"{name} expects momentum in \[0, 1\]"),
        ({"on_nonfinite": "raise"}, rf"{name} expects on_nonfinite to be one of .*'skip', 'error', got 'raise'"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(nn, name)(*size, **options)
    if size:
        with pytest.raises(TypeError, match=rf"{name} expects num_features to be an int, got 3.0 \(float\)"):
            getattr(nn, name)(3.0)
        with pytest.raises(ValueError, match=rf"{name} expects num_features >= 0, got -1"):
            getattr(nn, name)(-1)


def test_an_unknown_activation_raises_an_error_in_the_constructor() -> None:
    with pytest.raises(ValueError, match=r"BatchNormAct2d expects activation to be one of .* got 'swish'"):
        nn.BatchNormAct2d(3, activation="swish")


@pytest.mark.parametrize("name", LAYERS)
def test_skip_leaves_running_statistics_after_an_overflow(name: str) -> None:
    layer = getattr(nn, name)(3, on_nonfinite="skip")
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(LAYERS[name], dtype=torch.float16)
    x[0, 1] = torch.inf
    layer(x)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    layer(torch.randn(LAYERS[name], dtype=torch.float16))
    assert layer.num_batches_tracked == 1
    assert layer.running_mean.isfinite().all()


def test_batch_statistics_are_used_in_evaluation_if_none_are_tracked() -> None:
    layer = nn.BatchNorm1d(3, track_running_stats=False).eval()
    y = layer(torch.randn(64, 3) * 5 + 2)
    torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-6, rtol=0)


def test_a_layer_without_attributes_of_its_own_takes_the_defaults() -> None:
    # As one that was pickled before they existed, or given this class later.
    layer = torch.nn.BatchNorm2d(3)
    layer.__class__ = nn.BatchNorm2d
    assert layer(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    assert layer.num_batches_tracked == 1


def test_no_channels_are_no_error() -> None:
    layer = nn.BatchNorm2d(0)
    assert layer(torch.randn(2, 0, 4, 4)).shape == (2, 0, 4, 4)


def test_a_subclass_of_any_name_keeps_the_rank_of_its_layer() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match=r"BatchNorm2d expects x of shape \[N, C, H, W\]"):
        Mine(3)(torch.randn(2, 3))
