from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.graphs.lowering import activation_of, lower, mutated
from batchnorm.models.graphs.model_graph import trace
from batchnorm.models.graphs.neighbours import batch_norm_calls
from batchnorm.models.graphs.tracing import Untraceable

IMAGE = (2, 3, 8, 8)


class Block(nn.Module):
    """Layers, functions, methods, operators and changes in place, as people mix them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(4)
        self.act, self.other = bn.BatchNormAct2d(4, activation="leaky_relu"), nn.BatchNorm2d(4, affine=False)
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(self.conv(x)).relu_()
        z = self.act(y, residual=y)
        z += torch.ones(1, device=x.device)
        z = F.dropout(self.drop(self.other(z)), training=self.training)
        n, c, h, w = z.shape
        if mask is not None:
            z = z * mask
        return self.linear(z.view(n, c, h * w).mean(2))


@pytest.fixture
def block() -> nn.Module:
    return Block().eval()


@pytest.mark.parametrize("way", ["fx", "export"])
def test_both_ways_give_the_same_calls_for_every_size(block: nn.Module, way: str) -> None:
    found = trace(block, Inputs.of(torch.randn(1, *IMAGE[1:])), ways=(way,), prepare=lower)
    assert found.how == way
    assert found.refused == ()
    calls = batch_norm_calls(found)
    assert [call.path for call in calls] == ["norm", "act", "other"]
    assert [call.activation for call in calls] == ["relu", None, None]
    assert [call.follows_linear for call in calls] == [True, False, False]
    assert all(call.fixed_statistics and call.calls == 1 for call in calls)
    functions = [node.target for node in found.graph.nodes if node.op == "call_function"]
    for function in (F.conv2d, F.pad, F.relu, F.leaky_relu, F.linear, torch.reshape, torch.mean, operator.add):
        assert function in functions
    assert not any("dropout" in str(function) for function in functions)
    assert mutated(found.graph) == set()
    for shape in ((3, 3, 8, 8), (2, 3, 11, 9)):
        x = torch.randn(shape)
        assert torch.allclose(found.module(x), block(x), atol=1e-6)


@pytest.mark.parametrize("kind", [bn.BatchNorm1d, bn.BatchNormAct1d, bn.BatchRenorm1d])
def test_channels_in_the_last_dimension_are_moved_in_the_graph_of_torch_fx(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), kind(4, channel_dim=-1), nn.Linear(4, 2)).eval()
    found = trace(model, Inputs.of(torch.randn(2, 5, 3)), ways=("fx",), prepare=lower)
    functions = [node.target for node in found.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    activations = [F.relu] if kind is bn.BatchNormAct1d else []
    assert functions == [F.linear, torch.movedim, F.batch_norm, torch.movedim, *activations, F.linear]


def test_shapes_tell_open_sizes_from_fixed_ones(block: nn.Module) -> None:
    found = trace(block, Inputs.of(torch.randn(IMAGE)), prepare=lower)
    (norm, *_) = batch_norm_calls(found)
    batch, channels, height, _ = found.shapes[norm.node]
    assert len(set(batch)) > 1
    assert set(channels) == {4}
    assert len(set(height)) > 1
    assert found.values[norm.node].shape == (2, 4, 8, 8)


def test_arguments_beside_the_example_keep_their_defaults(block: nn.Module) -> None:
    x, mask = torch.randn(IMAGE), torch.rand(8, 8)
    without = trace(block, Inputs.of(x)).module
    assert [n.target for n in without.graph.nodes if n.op == "placeholder"] == ["x"]
    masked = trace(block, Inputs.of({"x": x, "mask": mask}), prepare=lower).module
    assert torch.allclose(masked(x, mask=mask), block(x, mask), atol=1e-6)


def test_a_call_that_changes_a_view_is_kept() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y[:, 0].fill_(1.0)
            return y.relu_() + y

    x = torch.randn(IMAGE)
    found = trace(Writes(), Inputs.of(x), prepare=lower)
    assert torch.equal(found.module(x), Writes()(x))
    assert any(node.op == "call_method" and node.target == "clone" for node in mutated(found.graph))


def test_shared_layers_and_batch_statistics_are_counted() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, norm, nn.BatchNorm1d(4, track_running_stats=False)).eval()
    calls = batch_norm_calls(trace(model, Inputs.of(torch.randn(3, 4)), prepare=lower))
    assert [call.calls for call in calls] == [2, 2, 1]
    assert [call.fixed_statistics for call in calls] == [True, True, False]
    assert [call.foldable for call in calls] == [True, False, False]


def test_a_layer_that_cannot_be_traced_stays_whole_unless_it_holds_batch_normalization() -> None:
    class Decides(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum().item() != 0 else x

    x = torch.randn(IMAGE)
    found = trace(nn.Sequential(Decides(nn.Identity()), nn.BatchNorm2d(3)).eval(), Inputs.of(x), prepare=lower)
    assert [node.target for node in found.graph.nodes if node.op == "call_module"] == ["0"]
    with pytest.raises(Untraceable, match="fx: TraceError.*; export: "):
        trace(nn.Sequential(Decides(nn.BatchNorm2d(3))).eval(), Inputs.of(x))


def test_a_graph_for_one_size_names_the_sizes_that_it_refuses() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(int(x.shape[0]), -1) * 2

    found = trace(Fixed(), Inputs.of(torch.randn(2, 6)), ways=("export",), prepare=_bake)
    assert [refused.args[0].shape for refused in found.refused] == [(3, 6), (1, 6)]


def _bake(module: fx.GraphModule) -> fx.GraphModule:
    for node in module.graph.nodes:
        if node.op == "output":
            with module.graph.inserting_before(node):
                fixed = module.graph.call_function(torch.reshape, (node.args[0], (2, 6)))
            node.args = (fixed,)
    module.recompile()
    return module


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (F.relu, (), ("relu", 0.0)), (F.leaky_relu, (0.2,), ("leaky_relu", 0.2)),
        (F.leaky_relu, (), ("leaky_relu", 0.01)), (F.hardtanh, (0.0, 6.0), ("relu6", 0.0)), (F.hardtanh, (), None),
        (F.gelu, (), ("gelu", 0.0)), (F.elu, (0.5,), ("elu", 0.5)), (F.selu, (), None),
        (torch.ops.aten.elu.default, (0.5, 1, 1), ("elu", 0.5)), (torch.ops.aten.elu.default, (1.0, 1.5), None),
        (torch.ops.aten.hardtanh.default, (0, 6), ("relu6", 0.0)), (F.hardtanh, (0.0, 6.0, True), ("relu6", 0.0)),
        (torch.clamp, (0, 6), ("relu6", 0.0)), (torch.clamp, (0,), ("relu", 0.0)), (torch.clamp, (-1, 6), None),
    ],
)  # fmt: skip
def test_activations_are_recognized(function, arguments, expected) -> None:
    graph = fx.Graph()
    assert activation_of(graph.call_function(function, (graph.placeholder("x"), *arguments))) == expected


def test_the_approximate_gelu_is_another() -> None:
    graph = fx.Graph()
    assert activation_of(graph.call_function(F.gelu, (graph.placeholder("x"),), {"approximate": "tanh"})) is None


def test_tensors_made_in_forward_follow_the_device(block: nn.Module) -> None:
    for way in ("fx", "export"):
        module = trace(block, Inputs.of(torch.randn(IMAGE)), ways=(way,), prepare=lower).module
        assert module.to("meta")(torch.randn(IMAGE, device="meta")).device.type == "meta"
        block = Block().eval()


def test_results_in_containers_keep_them() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"a": x + 1, "b": (x, [x * 2])}

    x = torch.randn(2, 3)
    for way in ("fx", "export"):
        found = trace(Several(), Inputs.of(x), ways=(way,)).module(x)
        assert torch.equal(found["a"], x + 1)
        assert torch.equal(found["b"][1][0], x * 2)


def test_example_inputs_of_every_kind() -> None:
    x = torch.randn(IMAGE)
    assert Inputs.of(x).args == (x,)
    assert Inputs.of([x, 3]).args == (x, 3)
    assert Inputs.of({"x": x}).kwargs == {"x": x}
    assert [[tuple(i.args[0].shape) for i in choice] for choice in Inputs.of(x).resized()] == [
        [(3, 3, 8, 8), (4, 3, 8, 8)], [(1, 3, 8, 8)], [(2, 3, 40, 40)], [(2, 3, 9, 9)],
    ]  # fmt: skip
    assert Inputs.of(data := object()).args == (data,)
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple of arguments or a dict .* got int"):
        Inputs.of(3)
