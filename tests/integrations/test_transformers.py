"""The callback in Hugging Face's own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import batchnorm as bn  # noqa: E402
from batchnorm.doctor import BatchNormWarning  # noqa: E402
from batchnorm.integrations.transformers import BatchNormWatch  # noqa: E402


class Network(nn.Module):
    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.twice = twice

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = checkpoint(self.net, x, use_reentrant=False) if self.twice else self.net(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=64, logging_steps=2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(256)]
    return transformers.Trainer(model, arguments, train_dataset=rows, **options)


def left_behind() -> list[Any]:
    places = (hooks._global_forward_hooks, hooks._global_forward_pre_hooks, optimizers._global_optimizer_post_hooks)
    return [hook for place in places for hook in place.values()]


class Report(transformers.TrainerCallback):
    """As those for TensorBoard and others, which the Trainer calls before the callbacks of the user."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs))


def test_it_needs_no_arguments(tmp_path: Path) -> None:
    before, report, callback = left_behind(), Report(), BatchNormWatch()
    of = trainer(Network(), tmp_path, callbacks=[report, callback])
    of.train()
    assert callback.watch is not None and callback.watch.closed and callback.watch.looks
    for logged in (report.logged, of.state.log_history):
        assert any("batchnorm/noise" in entry for entry in logged)
        assert sum("loss" in entry for entry in logged) == 2  # what the Trainer logs itself stays
    assert left_behind() == before


def test_a_block_needs_the_trainer() -> None:
    with pytest.raises(ValueError, match="expects a Trainer in a with block, got none"), BatchNormWatch():
        pass


def test_it_watches_and_logs(tmp_path: Path) -> None:
    before, of = left_behind(), trainer(Network(), tmp_path)
    callback = BatchNormWatch(of, every=1)
    with callback:
        of.train()
    assert callback.watch is not None
    assert [(r.step, r.layer, r.updates) for r in callback.watch.history] == [(s, "net.1", 1) for s in (2, 3, 4)]
    logged = {entry["step"]: entry for entry in of.state.log_history if "batchnorm/noise" in entry}
    assert set(logged) == {2, 4}
    assert [entry["step"] for entry in of.state.log_history if "loss" in entry] == [2, 4]
    assert logged[4]["batchnorm/noise"] == callback.watch.history[-1].noise
    assert left_behind() == before


def test_it_warns(tmp_path: Path) -> None:
    of = trainer(Network(twice=True), tmp_path, callbacks=[BatchNormWatch(every=1)])
    with pytest.warns(BatchNormWarning, match="BN106"):
        of.train()
    assert {entry["batchnorm/updates"] for entry in of.state.log_history if "batchnorm/updates" in entry} == {2}


@pytest.mark.parametrize("every", [1, None])
def test_nothing_is_left_behind_after_an_exception(tmp_path: Path, every: int | None) -> None:
    before, model = left_behind(), Network()
    of = trainer(model, tmp_path)
    callbacks = list(of.callback_handler.callbacks)
    calls: list[int] = []

    def fails(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 3:  # while a look is under way, whose hooks are there too
            assert every is None or len(left_behind()) > len(before) + 1
            raise ZeroDivisionError

    model.net[3].register_forward_hook(fails)
    with pytest.raises(ZeroDivisionError), BatchNormWatch(of, every=every) as seen:
        of.train()
    assert seen.watch is not None and seen.watch.closed and seen.watch.steps == 2
    assert left_behind() == before
    assert of.callback_handler.callbacks == callbacks


def test_the_next_training_closes_what_an_exception_left(tmp_path: Path) -> None:
    before, model = left_behind(), Network()
    of = trainer(model, tmp_path)
    callback = BatchNormWatch(of)
    of.add_callback(callback)
    model.net[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        of.train()
    assert callback.watch is not None and not callback.watch.closed
    callback.watch.close()
    assert left_behind() == before


@pytest.fixture(scope="module")
def resnet() -> Any:
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


PAIRS = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 3) for _ in range(3)]
ENCODINGS = [transformers.BatchEncoding({"pixel_values": x, "labels": y}) for x, y in PAIRS]


def test_a_model_is_diagnosed_with_its_own_loss(resnet: Any) -> None:
    own = bn.diagnose(resnet, ENCODINGS, budget=0)
    assert own.summary().endswith("24 samples in 3 batches, loss from the model's output")
    given = bn.diagnose(resnet, ENCODINGS, loss=nn.CrossEntropyLoss(), budget=0)
    assert [(f.code, f.cost) for f in own.findings] == [(f.code, f.cost) for f in given.findings]


def test_calls_and_losses_of_each_kind_of_batch(resnet: Any) -> None:
    from batchnorm.models.execution.calling import DefaultForward, arguments_of_loss, loss_in

    x, y = PAIRS[0]
    call = DefaultForward("diagnose", for_loss=True)
    for batch in (ENCODINGS[0], PAIRS[0], {"pixel_values": x, "labels": y, "path": "file"}):
        result: Any = call(resnet.eval(), batch)
        for loss in (nn.CrossEntropyLoss(), nn.functional.cross_entropy):
            torch.testing.assert_close(loss(*arguments_of_loss(loss, result, batch)), loss_in(result))
    assert loss_in(DefaultForward("recalibrate")(resnet, PAIRS[0])) is None
    own = arguments_of_loss(lambda output, target: 0, result, ENCODINGS[0])
    assert own == (result, ENCODINGS[0])


def test_a_batch_is_an_example_for_every_verb(resnet: Any) -> None:
    report = bn.recalibrate(resnet, ENCODINGS)[1]
    assert len(report.changed) == 8 and report.samples == 24
    assert bn.accelerate(resnet, ENCODINGS[0])[1].difference < 1e-5
    assert bn.fold(resnet.eval(), ENCODINGS[0])[1].remaining == 0
