"""`torch.fx`: a layer is one node; graphs run, retrace, copy, pickle, and are cut for features."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.functional import batch_norm


class Network(nn.Module):
    """A small residual network: every kind of layer, one of them used twice, and the function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), bn.BatchNorm2d(4), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = bn.BatchNormAct2d(4)
        self.shared = bn.BatchNormAct2d(4, activation="silu", momentum=None)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.act(self.conv(x), x)
        x = self.shared(self.shared(x))
        x = batch_norm(x, None, None, training=True, activation="relu")
        return self.head(x.mean((2, 3)))


def network(training: bool = False) -> Network:
    model = Network()
    with torch.no_grad():
        for layer in (model.stem[1], model.act, model.shared):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                tensor.uniform_(0.5, 2.0)
    model.train(training)
    return model


def norm_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.target is batch_norm]


TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def assert_same_state(traced: torch.fx.GraphModule, model: nn.Module, training: bool) -> None:
    state, expected = traced.state_dict(), model.state_dict()
    if not training:  # a graph module holds what its graph uses
        expected = {key: value for key, value in expected.items() if not key.endswith("num_batches_tracked")}
    assert_close(dict(state), dict(expected), rtol=0, atol=0)


@TRAINING
def test_a_call_is_one_node_and_the_graph_computes_the_same(training: bool) -> None:
    model = network(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    traced.graph.lint()
    assert len(norm_nodes(traced.graph)) == 5
    assert all(node.op == "call_function" for node in norm_nodes(traced.graph))
    x = torch.randn(4, 3, 6, 6).requires_grad_()
    again = x.detach().clone().requires_grad_()
    y, expected = traced(x), model(again)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, again.grad)
    assert_same_state(traced, model, training)
    if training:
        assert traced.stem.get_submodule("1").num_batches_tracked == 1


@TRAINING
def test_graphs_can_be_retraced_copied_and_pickled(training: bool) -> None:
    model = network(training)
    x = torch.randn(4, 3, 6, 6)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    others = [torch.fx.symbolic_trace(traced), copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))]
    expected = model(x)
    for other in others:
        other = copy.deepcopy(other)
        assert len(norm_nodes(other.graph)) == 5
        assert torch.equal(other(x), expected)
        assert_same_state(other, model, training)


def test_an_error_is_the_functions_own() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(bn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match=r"BatchNorm2d expects x of shape \[N, C, H, W\], got \[3, 4\]"):
        traced(torch.randn(3, 4))


class ModulesAsNodes(torch.fx.Tracer):
    """Keep our layers as module nodes, like torch's own, as in the guide."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        norm = isinstance(m, nn.modules.batchnorm._NormBase)
        return norm or super().is_leaf_module(m, module_qualified_name)


def test_the_mode_is_that_of_tracing_unless_layers_are_leaves() -> None:
    x = torch.randn(4, 3, 6, 6)
    model = network(training=True)
    fixed = torch.fx.symbolic_trace(copy.deepcopy(model)).eval()
    fixed(x)
    assert fixed.act.num_batches_tracked == 1
    follows = torch.fx.GraphModule(model, ModulesAsNodes().trace(model)).eval()
    y = follows(x)
    assert model.act.num_batches_tracked == 0
    assert torch.equal(y, model.eval()(x))
    follows.train()(x)
    assert model.act.num_batches_tracked == 1


class PathTracer(torch.fx.Tracer):
    """Records the module path of every node, as torchvision's feature extraction does."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.paths = "", {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.path = self.path, self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.path = before

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        self.paths[node] = self.path
        return node


def features(model: nn.Module, wanted: list[str]) -> torch.fx.GraphModule:
    """Return `model` with the results of the last calls of the modules at these paths as its outputs."""
    tracer = PathTracer()
    graph = tracer.trace(model)
    last = {path: node for node, path in tracer.paths.items() if node.op != "get_attr"}
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        graph.output({path: last[path] for path in wanted})
    graph.erase_node(output)
    cut = torch.fx.GraphModule(tracer.root, graph)
    cut.graph.eliminate_dead_code()
    cut.recompile()
    cut.delete_all_unused_submodules()
    cut.graph.lint()
    return cut


@TRAINING
def test_features_are_cut_at_our_layers(training: bool) -> None:
    model = network(training)
    hooked: dict[str, Tensor] = {}
    wanted = ["stem.1", "act", "shared"]
    for path in wanted:
        model.get_submodule(path).register_forward_hook(lambda *a, path=path: hooked.__setitem__(path, a[-1]))
    x = torch.randn(4, 3, 6, 6)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_hooks.clear()
    cut = features(plain, wanted)
    found = cut(x)
    model(x)
    assert found.keys() == hooked.keys()
    for path in wanted:
        assert torch.equal(found[path], hooked[path])
    assert not hasattr(cut, "head")


def test_dead_code_elimination_keeps_used_layers() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other = bn.BatchNorm1d(3), bn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.other(x)
            return self.norm(x)

    traced = torch.fx.symbolic_trace(Unused())
    traced.graph.eliminate_dead_code()
    assert len(norm_nodes(traced.graph)) == 1
    traced.recompile()
    traced(torch.randn(4, 3))
    assert traced.norm.num_batches_tracked == 1


def test_fx_fusion_keeps_a_models_results() -> None:
    from torch.fx.experimental.optimization import fuse  # warns when imported

    model = network()
    x = torch.randn(4, 3, 6, 6)
    assert_close(fuse(model)(x), model(x), rtol=0, atol=0)  # it knows torch's exact types alone, and fuses nothing


def test_folding_into_a_convolution_is_right() -> None:
    conv, norm = nn.Conv2d(3, 4, 3).double().eval(), bn.BatchNorm2d(4).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert_close(fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.ao
def test_the_fusion_for_quantization_refuses_unknown_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4)).eval()
    with pytest.raises(AssertionError, match="did not find fuser method for"):
        torch.ao.quantization.fuse_modules(model, ["0", "1"])
    assert type(model[1]) is bn.BatchNorm2d
