"""The traversal: every layer once with all its paths, replaced everywhere, and the model put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.walk import Found, copied, is_batch_norm, norm_layers, replace, restored


class Twice(nn.Module):
    """One layer in two places, within a block that is itself in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.block = nn.Sequential(self.bn, nn.Linear(3, 3), bn.BatchNorm1d(3))
        self.again = self.block
        self.head = nn.ModuleDict({"norm": bn.BatchNormAct1d(3), "other": nn.InstanceNorm1d(3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head["norm"](self.again(self.block(self.bn(x))))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm1d(2), True), (nn.BatchNorm2d(2), True), (nn.LazyBatchNorm3d(), True), (nn.SyncBatchNorm(2), True),
        (bn.BatchNorm(2), True), (bn.LazyBatchNorm2d(), True), (bn.BatchNormAct3d(2), True),
        (nn.InstanceNorm2d(2, affine=True, track_running_stats=True), False), (nn.LazyInstanceNorm1d(), False),
        (nn.GroupNorm(1, 2), False), (nn.Identity(), False),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_what_batch_normalization_is(module: nn.Module, expected: bool) -> None:
    assert is_batch_norm(module) is expected


def test_a_shared_layer_is_found_once_with_every_path() -> None:
    model = Twice()
    first, second, third = norm_layers(model)
    assert first.module is model.bn
    assert first.paths == ("bn", "block.0", "again.0")
    assert first.path == "bn"
    assert first.slots == ((model, "bn"), (model.block, "0"))
    assert second.paths == ("block.2", "again.2")
    assert third.paths == ("head.norm",)


def test_other_kinds_by_class_and_predicate() -> None:
    model = Twice()
    assert [f.path for f in norm_layers(model, nn.Linear)] == ["block.1"]
    assert [f.path for f in norm_layers(model, (nn.Linear, nn.InstanceNorm1d))] == ["block.1", "head.other"]
    assert [f.path for f in norm_layers(model, lambda m: type(m) is nn.BatchNorm1d)] == ["bn"]


def test_a_model_that_is_the_layer() -> None:
    layer, new = nn.BatchNorm1d(3), nn.Identity()
    (found,) = norm_layers(layer)
    assert (found.path, found.slots) == ("", ())
    assert replace(layer, found, new) is new
    assert replace(layer, "", new) is new


@pytest.mark.parametrize("where", ["bn", "again.0", "module", "found"])
def test_a_shared_layer_is_replaced_everywhere(where: str) -> None:
    model, new = Twice(), nn.BatchNorm1d(3)
    old = model.bn
    target: str | nn.Module | Found = {"module": old, "found": norm_layers(model)[0]}.get(where, where)
    assert replace(model, target, new) is model
    assert model.bn is model.block[0] is model.again[0] is new
    assert old not in set(model.modules())
    assert list(model._modules) == ["bn", "block", "again", "head"]


def test_what_is_not_there_is_not_replaced() -> None:
    model = Twice()
    with pytest.raises(ValueError, match=r"replace expects a module of the Twice, got 'bm', which is not in it"):
        replace(model, "bm", nn.Identity())
    with pytest.raises(ValueError, match=r"got Linear, which is not in it"):
        replace(model, nn.Linear(3, 3), nn.Identity())


def everything(model: nn.Module) -> Iterator[tuple[str, object]]:
    for path, module in model.named_modules():
        for name, value in sorted(vars(module).items()):
            if isinstance(value, dict):
                value = sorted(map(str, value))
            yield f"{path}.{name}", value
    for name, p in model.named_parameters():
        yield name, (p.requires_grad, None if p.grad is None else p.grad.tolist(), id(p.grad))
    for name, b in model.named_buffers():
        yield name, (id(b), b.tolist())


def random_states() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def disturb(model: Twice) -> None:
    model.eval()
    model.bn.train()
    model.bn.momentum = None
    model.block[2].update_running_stats = False
    model.bn.track_running_stats = False
    model.block.forward = lambda x: x
    model.bn.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    model.block.register_full_backward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    for p in model.block.parameters():
        p.requires_grad_(False)
    model.head.train()
    drawn = np.random.rand() + random.random()  # noqa: NPY002  (the global generators are what is put back)
    model.head["norm"](torch.randn(4, 3) + drawn).sum().backward()


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
def test_the_model_is_put_back(fails: bool) -> None:
    model = Twice()
    model.block.eval()
    model(torch.randn(4, 3)).sum().backward()
    model.bn.weight.requires_grad_(False)
    model.block[1].register_forward_hook(lambda *_: None)
    model.block[2].bias.grad = None
    before, generators = list(everything(model)), random_states()
    try:
        with restored(model, buffers=True, gradients=True):
            disturb(model)
            assert list(everything(model)) != before
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert list(everything(model)) == before
    assert random_states() == generators


def test_only_what_is_asked_for_is_put_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    drawn = torch.get_rng_state()
    with restored(model, random_state=False):
        model.eval()
        model.train()(torch.randn(4, 3)).sum().backward()
    assert model[0].num_batches_tracked == 1
    assert model[0].bias.grad is not None
    assert not torch.equal(torch.get_rng_state(), drawn)


def test_a_buffer_that_was_replaced_or_added_goes() -> None:
    layer = nn.BatchNorm1d(3)
    buffer = layer.running_mean
    with restored(layer, buffers=True):
        layer.running_mean = torch.ones(3)
        buffer.fill_(7)
        layer.register_buffer("extra", torch.ones(1))
    assert layer.running_mean is buffer
    assert (buffer == 0).all()
    assert "extra" not in dict(layer.named_buffers())


def test_a_lazy_layer_that_was_initialized_within_stays_initialized() -> None:
    model = nn.Sequential(bn.LazyBatchNorm1d()).eval()
    with restored(model, buffers=True):
        model.train()(torch.randn(4, 3))
    assert type(model[0]) is bn.BatchNorm1d
    assert not model[0].training
    assert model(torch.randn(4, 3)).shape == (4, 3)


def test_a_copy_has_what_is_kept_from_a_forward_pass_and_shares_what_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(3, 3), bn.LazyBatchNorm1d())
    model.kept = model[0](torch.randn(2, 3))  # which copy.deepcopy refuses
    other = copied("mine", model, share=[model[0].weight])
    assert other[0].weight is model[0].weight
    assert other[0].bias is not model[0].bias
    assert torch.equal(other.kept, model.kept) and not other.kept.requires_grad and model.kept.requires_grad
    model.kept = [model.kept]
    model.kept.append(model.kept)  # a list that contains itself
    other = copied("mine", model)
    assert torch.equal(other.kept[0], model.kept[0]) and other.kept[1] is other.kept
    model.kept = (i for i in range(3))
    with pytest.raises(
        ValueError, match="mine expects a model that can be copied, got Sequential with TypeError: .*It is"
    ):
        copied("mine", model, instead="It is not.")


def buffers_of_every_kind() -> dict[str, torch.Tensor]:
    """Constants that a model may hold, most of which cannot be written, copied or compared like ordinary tensors."""
    ones = torch.ones(3)
    with torch.inference_mode():
        inference = torch.ones(3)
    np.save("table.npy", np.ones(3, np.float32))
    return {
        "plain": torch.tensor([float("nan"), -0.0, 1.0]),
        "scalar": torch.tensor(3),
        "expanded": torch.ones(1).expand(3),
        "overlapping": torch.arange(10.0).as_strided((4, 4), (1, 1)),
        "sparse": torch.eye(4).to_sparse(),
        "sparse rows": torch.eye(4).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(ones, 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), ones]),
        "meta": torch.empty(3, device="meta"),
        "leaf": torch.ones(3, requires_grad=True),
        "not a leaf": torch.ones(3, requires_grad=True) * 2,
        "float8": ones.to(torch.float8_e4m3fn),
        "complex": torch.ones(3, dtype=torch.complex64),
        "bool": ones > 0,
        "uint16": ones.to(torch.uint16),
        "mkldnn": torch.ones(3, 3).to_mkldnn(),
        "subclass": ones.clone().as_subclass(type("T", (torch.Tensor,), {})),
        "empty": torch.empty(0),
        "inference": inference,
        "zero": torch._efficientzerotensor((3,)),
        "masked": torch.masked.masked_tensor(ones, torch.tensor([True, False, True])),
        "memory map": torch.from_numpy(np.load("table.npy", mmap_mode="r")),  # writing ends the process
    }


class Constant(nn.Module):
    """Two layers, with a constant between them."""

    def __init__(self, constant: torch.Tensor) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.register_buffer("constant", constant)
        self.tail = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.norm(self.conv(x)))


BATCH = torch.randn(4, 3, 5, 5)
VERBS: dict[str, Callable[[nn.Module], object]] = {
    "diagnose": lambda model: bn.diagnose(model, [BATCH] * 2),
    "recalibrate": lambda model: bn.recalibrate(model, [BATCH]),
    "recalibrate in place": lambda model: bn.recalibrate(model, [BATCH], inplace=True),
    "sequentially": lambda model: bn.recalibrate(model, [BATCH], passes="sequential"),
    "accelerate": lambda model: bn.accelerate(model, BATCH),
    "freeze": lambda model: bn.freeze(model),
    "convert": lambda model: bn.convert(model, to="BatchRenorm"),
    "insert_batchnorm": lambda model: bn.insert_batchnorm(model, nn.Conv2d, [BATCH]),
    "drop_redundant_bias": lambda model: bn.drop_redundant_bias(model, example_inputs=BATCH),
    "fold": lambda model: bn.fold(model.eval(), BATCH),
}


@pytest.mark.filterwarnings("ignore")  # most kinds are prototypes or deprecated
@pytest.mark.parametrize("verb", VERBS)
def test_constants_of_every_kind_are_left_alone(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, constant in buffers_of_every_kind().items():
        if verb in ("fold", "diagnose") and kind not in ("expanded", "inference", "zero", "memory map", "nested"):
            continue  # they take a while
        model = Constant(constant)
        version = None if constant.is_inference() else constant._version
        VERBS[verb](model)
        assert model.constant is constant, kind
        assert version is None or constant._version == version, kind


@pytest.mark.parametrize("write", ["in place", "through .data", "through NumPy", "resized", "in inference mode"])
def test_values_that_changed_are_put_back_however_they_were_written(write: str) -> None:
    model = nn.BatchNorm1d(3)
    if write == "in inference mode":
        with torch.inference_mode():
            model.running_mean = torch.zeros(3)
    held = model.running_mean
    with restored(model, buffers=True):
        if write == "in place":
            held.fill_(-0.0)
        elif write == "through .data":
            held.data.fill_(float("nan"))
        elif write == "through NumPy":
            held.numpy()[:] = 7
        elif write == "resized":
            held.data = torch.ones(5)
        else:
            with torch.inference_mode():
                held.add_(1.0)
    assert model.running_mean is held
    assert held.tolist() == [0.0, 0.0, 0.0]
    assert not held.signbit().any()


def test_state_that_cannot_be_restored_is_reported_and_the_rest_is_restored() -> None:
    model = Twice()
    model.bn.register_buffer("grown", torch.zeros(3))
    before, generators = list(everything(model)), random_states()

    def spoil() -> None:
        disturb(model)
        model.bn.grown.data = torch.ones(1).expand(3)  # nothing can be written into it

    def work(error: type[Exception] | None) -> None:
        with restored(model, buffers=True, gradients=True):
            spoil()
            if error is not None:
                raise error

    with pytest.raises(
        RuntimeError, match=r"got failures for bn\.grown \(RuntimeError: .*\)\. Everything else is restored"
    ):
        work(None)
    model.bn.grown = torch.zeros(3)
    with pytest.raises(KeyError):
        work(KeyError)
    model.bn.grown = torch.zeros(3)
    assert [e for e in everything(model) if "grown" not in e[0]] == [e for e in before if "grown" not in e[0]]
    assert random_states() == generators


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_statistics_that_cannot_be_written(name: str) -> None:
    """They are an error of `recalibrate`, which writes them; functions that only read them work."""
    model = Constant(torch.ones(3))
    model.tail.momentum = None
    value = getattr(model.tail, name)
    zero = torch._efficientzerotensor((), dtype=torch.long)
    setattr(model.tail, name, value.new_ones(1).expand(8) if value.dim() else zero)
    before = [(b, b.clone()) for b in model.buffers()]
    bn.diagnose(model, [BATCH] * 2)
    with pytest.raises(ValueError, match=rf"recalibrate expects running .* got {name} of 'tail' with .*\.clone\(\)"):
        bn.recalibrate(model, [BATCH], inplace=True)
    assert all(b is kept and torch.equal(b, was) for b, (kept, was) in zip(model.buffers(), before, strict=True))


NEEDS_VALUES: dict[str, Callable[[nn.Module], object]] = {
    **{name: run for name, run in VERBS.items() if name not in ("freeze", "convert")},
    "diagnose without data": bn.diagnose,
    "watch": bn.watch,
    "fold on meta": lambda model: bn.fold(model, BATCH.to("meta")),
}


@pytest.mark.parametrize("where", ["everything", "one layer", "running_var"])
@pytest.mark.parametrize("verb", NEEDS_VALUES)
def test_a_model_without_values_is_refused(verb: str, where: str) -> None:
    model = Constant(torch.ones(3))
    if where == "running_var":
        model.tail.running_var = torch.empty(8, device="meta")
    else:
        (model if where == "everything" else model.tail).to("meta")
    name = {"everything": "conv.weight", "one layer": "tail.weight", "running_var": "tail.running_var"}[where]
    before = {path: (module, module.training) for path, module in model.named_modules()}
    expected = rf"expects a model with values, got '{name}' on the meta device\. Call model\.to_empty"
    with pytest.raises(ValueError, match=expected):
        NEEDS_VALUES[verb](model)
    if "fold" not in verb:  # here, its model is first set to evaluation mode
        assert {path: (module, module.training) for path, module in model.named_modules()} == before


@pytest.mark.parametrize("verb", ["freeze", "convert", "accelerate"])
def test_functions_that_need_no_values_take_a_model_on_meta(verb: str) -> None:
    run = bn.accelerate if verb == "accelerate" else VERBS[verb]
    assert run(Constant(torch.ones(3)).to("meta")).report.changed


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("what", ["statistics", "model"])
def test_a_model_made_in_inference_mode_is_taken(verb: str, what: str) -> None:
    with torch.inference_mode():
        torch.manual_seed(0)
        model = Constant(torch.ones(3))
        made = {name: b for name, b in model.named_buffers() if "running" in name or "tracked" in name}
    if what == "statistics":
        torch.manual_seed(0)
        model = Constant(torch.ones(3))
        for name, buffer in made.items():
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, buffer)
    VERBS[verb](model)
    if verb == "recalibrate in place":
        torch.manual_seed(0)
        expected = bn.recalibrate(Constant(torch.ones(3)), [BATCH]).model
        assert torch.equal(model.tail.running_var, expected.tail.running_var)
        assert model.tail.running_var.is_inference()
