"""The folded network: its dtype and its uses, also if the model resists tracing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.models import gate
from batchnorm.surgery.fold import fold
from tests.surgery.fold.pytorch.patterns import IMAGE
from tests.surgery.fold.pytorch.test_fold import assert_equal, trained


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_memory_format_stay(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3))
    model = trained(model).to(dtype=dtype, memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).to(dtype=dtype, memory_format=torch.channels_last)
    folded, report = fold(model, x)
    assert report.remaining == 0
    assert all(p.dtype == dtype for p in folded.parameters())
    weight = folded.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert folded(x).dtype == dtype
    assert report.error <= max(gate.TOLERANCE[str(dtype).removeprefix("torch.")], 2 * report.error_before)


def test_in_place_the_model_becomes_the_folded_one() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3)))
    original, kept, x = copy.deepcopy(model), model[3].weight, torch.randn(IMAGE)
    folded, _ = fold(model, x, inplace=True)
    assert folded is model
    assert model.get_parameter("3.weight") is kept
    assert_equal(model, original, x)


def network() -> nn.Module:
    return trained(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                                 CalledTwiceTail()))  # fmt: skip


class CalledTwiceTail(nn.Module):
    """Leaves a fused operation, a constant made in forward, and sizes read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        n, c, h, w = x.shape
        y = torch.relu(self.norm(x)) + x + torch.ones(1, device=x.device, dtype=x.dtype)
        return {"out": self.linear(y.view(n, c, h * w).mean(2))}


def test_the_result_is_copied_pickled_saved_exported_and_moved(tmp_path) -> None:
    model, x = network(), torch.randn(IMAGE)
    folded, report = fold(model, x)
    assert (report.remaining, report.fused) == (0, 1)
    expected = folded(x)["out"]
    assert torch.equal(copy.deepcopy(folded)(x)["out"], expected)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x)["out"], expected)
    torch.save(folded, tmp_path / "folded.pth")
    assert torch.equal(torch.load(tmp_path / "folded.pth", weights_only=False)(x)["out"], expected)
    program = torch.export.export(folded, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert torch.allclose(program.module()(x)["out"], expected, atol=1e-5)
    again = torch.load(io.BytesIO(_bytes(folded.state_dict())), weights_only=True)
    folded.load_state_dict(again)
    wide = copy.deepcopy(folded).double()
    assert wide(x.double())["out"].dtype == torch.float64
    assert wide(x.double())["out"].sub(expected).abs().max() < 1e-4
    meta = copy.deepcopy(folded).to("meta")
    assert meta(x.to("meta"))["out"].device.type == "meta"


def _bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_gradients_reach_the_input() -> None:
    model, x = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())), torch.randn(IMAGE)
    folded, _ = fold(model, x)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    folded(ours).sum().backward()
    model(theirs).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


def test_a_model_in_training_mode_is_folded_as_it_evaluates() -> None:
    model, x = (
        trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.9))).train(),
        torch.randn(IMAGE),
    )
    folded, report = fold(model, x)
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert not folded.training
    assert report.remaining == 0
    assert_equal(folded, copy.deepcopy(model).eval(), x)


def test_hooks_are_not_carried_over_nor_called() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    calls: list[object] = []
    model[0].register_forward_hook(lambda *a: calls.append(a))
    folded, report = fold(model, torch.randn(IMAGE))
    folded(torch.randn(IMAGE))
    assert calls == []
    assert report.notes == ("1 hook is not carried over",)
    model(torch.randn(IMAGE))
    assert len(calls) == 1


class DataDependent(nn.Module):
    """Cannot be traced as a whole; its blocks can."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if x.sum().item() > 0:
            x = self.block(x)
        return self.norm(x)


class BlockDecides(nn.Module):
    """Sizes decide what is done, in a block whose own parts can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.last(x if x.shape[-1] % 2 else F.interpolate(x, scale_factor=2.0))


def test_parts_of_a_model_that_python_calls_take_every_size() -> None:
    model, x = trained(BlockDecides()), torch.randn(IMAGE)
    folded, report = fold(model, x)
    assert (report.how, report.remaining, report.notes) == ("modules", 0, ())
    assert [(row.path, row.now) for row in report.changed] == [("block.1", "in block.0")]
    for shape in (IMAGE, (1, 4, 8, 8), (3, 4, 11, 6)):
        assert_equal(folded, model, torch.randn(shape))
    again = pickle.loads(pickle.dumps(folded))
    assert torch.equal(again(x), folded(x))


def test_a_model_that_cannot_be_traced_is_folded_by_its_parts() -> None:
    model, x = trained(DataDependent()), torch.randn(IMAGE)
    folded, report = fold(model, x)
    assert report.how == "modules"
    assert [row.path for row in report.changed] == ["block.1"]
    assert report.left[0].path == "norm"
    assert "cannot be traced" in report.left[0].reason
    assert report.remaining == 1
    assert_equal(folded, model, x)
    assert_equal(folded, model, -x)


class PadsBySize(nn.Conv2d):
    """As TensorFlow's: the padding is computed from the image's size."""

    def forward(self, x: Tensor) -> Tensor:
        more = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[-2:]]
        x = F.pad(x, [more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


def test_a_convolution_that_cannot_be_traced_keeps_its_forward() -> None:
    model = trained(nn.Sequential(PadsBySize(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()))
    folded, report = fold(model, torch.randn(2, 4, 8, 8))
    assert report.how == "fx"
    assert report.remaining == 0
    for shape in ((2, 4, 8, 8), (1, 4, 9, 12)):
        assert_equal(folded, model, torch.randn(shape))


class SizeDecides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        if x.shape[-1] > 4:
            x = self.conv(self.norm(x))
        return x * scale if mask is None else x * mask


def test_control_flow_on_sizes_goes_through_export() -> None:
    model, x = trained(SizeDecides()), torch.randn(1, 4, 8, 8)
    folded, report = fold(model, {"x": x, "mask": torch.tensor(1.0)})
    assert report.how == "export"
    assert report.remaining == 0
    with torch.no_grad():
        for shape in ((1, 4, 8, 8), (3, 4, 9, 12)):
            y = torch.randn(shape)
            assert torch.allclose(folded(y, mask=torch.tensor(2.0)), model(y, mask=torch.tensor(2.0)), atol=1e-5)


def test_nothing_to_fold_gives_the_network_back() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
    folded, report = fold(model, torch.randn(IMAGE))
    assert (report.before, report.remaining, report.changed, report.left) == (0, 0, (), ())
    assert_equal(folded, model, torch.randn(IMAGE))
    assert "error" not in str(report)  # nothing was compared


class OnlyFloat32(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x


def test_a_network_that_float64_cannot_run_is_compared_with_the_original() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), OnlyFloat32()))
    _, report = fold(model, torch.randn(IMAGE))
    assert report.remaining == 0 and report.error < 1e-6
    assert str(report).splitlines()[1].startswith("relative error against the original itself")


def test_the_report_prints_the_place_of_each_fold() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    _, report = fold(model, torch.randn(IMAGE))
    lines = str(report).splitlines()
    assert lines[0] == "fold: of 1 batch normalizations in a forward pass, 0 left"
    assert lines[1].startswith("relative error against float64: ")
    assert lines[-1].split() == ["1", "BatchNorm2d(6)", "in", "0"]
