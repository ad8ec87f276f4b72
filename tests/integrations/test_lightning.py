"""The callback in Lightning's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
lightning = pytest.importorskip("lightning.pytorch")

from torchmetrics.aggregation import MeanMetric  # noqa: E402

import batchnorm as bn  # noqa: E402
from batchnorm.doctor import BatchNormWarning  # noqa: E402
from batchnorm.integrations.lightning import BatchNormWatch  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, twice: bool = False, fails: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 1)
        self.twice, self.fails = twice, fails

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        if self.fails and number == 2:
            raise OSError("disk gone")
        x, y = batch
        x = checkpoint(self.net, x, use_reentrant=False) if self.twice else self.net(x)
        return nn.functional.mse_loss(self.head(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Logger(lightning.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((dict(metrics), step or 0))


def left_behind() -> list[Any]:
    places = (hooks._global_forward_hooks, hooks._global_forward_pre_hooks, optimizers._global_optimizer_post_hooks)
    return [hook for place in places for hook in place.values()]


def fit(module: Module, callback: BatchNormWatch, folder: Path, steps: int = 4) -> Logger:
    logger = Logger()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, callbacks=[callback], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, default_root_dir=folder,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(256, 4), torch.randn(256, 1)), batch_size=64)
    trainer.fit(module, data, data)
    return logger


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
class TestFit:
    def test_it_watches_and_logs(self, tmp_path: Path) -> None:
        before, callback = left_behind(), BatchNormWatch(every=1, per_layer=True)
        logger = fit(Module(), callback, tmp_path)
        assert callback.watch is not None
        assert [(r.step, r.layer, r.updates) for r in callback.watch.history] == [(s, "net.1", 1) for s in (2, 3, 4)]
        logged = [metrics for metrics, _ in logger.logged if "batchnorm/noise/net.1" in metrics]
        assert [m["batchnorm/noise/net.1"] for m in logged] == pytest.approx([r.noise for r in callback.watch.history])
        assert left_behind() == before

    def test_it_needs_no_arguments(self, tmp_path: Path) -> None:
        callback = BatchNormWatch()
        logger = fit(Module(), callback, tmp_path)
        assert callback.watch is not None and callback.watch.closed and callback.watch.looks
        assert any("batchnorm/noise" in metrics for metrics, _ in logger.logged)

    def test_it_warns(self, tmp_path: Path) -> None:
        callback = BatchNormWatch(every=1)
        with pytest.warns(BatchNormWarning, match="BN106"):
            logger = fit(Module(twice=True), callback, tmp_path)
        assert {metrics["batchnorm/updates"] for metrics, _ in logger.logged if "batchnorm/updates" in metrics} == {2}

    def test_an_exception_leaves_nothing_behind(self, tmp_path: Path) -> None:
        before, callback = left_behind(), BatchNormWatch()
        with pytest.raises(OSError, match="disk gone"):
            fit(Module(fails=True), callback, tmp_path)
        assert callback.watch is not None and callback.watch.closed
        assert left_behind() == before


class Measured(Module):
    """A module without `forward`, whose step logs and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        loss = super().training_step(batch, number)
        self.log("mean", self.mean(loss))
        return loss


class Called(Measured):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Attached(Called):
    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        return super().training_step(batch, number) * self.trainer.world_size


class Manual(Measured):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


BATCHES = [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(3)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Measured, ", loss from training_step"),
        (Called, ", loss from training_step"),
        (Attached, ", no loss: training_step needs a trainer (RuntimeError: Attached is not attached to a `Trainer`)"),
        (Manual, "in 3 batches"),
    ],
)
def test_a_module_is_diagnosed_without_forward(kind: type[Measured], said: str) -> None:
    module = kind()
    before = dict(vars(module))
    diagnosis = bn.diagnose(module, BATCHES)
    assert diagnosis.summary().endswith(said)
    assert "output" not in {rule.code for rule in diagnosis.not_checked}
    assert vars(module) == before and not module.mean.update_called
    if diagnosis.conditions.loss:
        given = bn.diagnose(module, BATCHES, forward=lambda m, b: m.head(m.net(b[0])), loss=nn.functional.mse_loss)
        assert [(f.code, f.cost) for f in diagnosis.findings] == [(f.code, f.cost) for f in given.findings]


def test_a_module_is_recalibrated_by_its_step() -> None:
    module = Measured()
    bn.recalibrate(module, BATCHES, inplace=True)
    x = module.net[0](torch.cat([x for x, _ in BATCHES]))
    torch.testing.assert_close(module.net[1].running_mean, x.mean(0))


def test_a_step_that_needs_a_trainer_is_an_error_without_forward() -> None:
    class Alone(Measured):
        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            return self.trainer.lost

    with pytest.raises(TypeError, match=r"Alone has no forward, .* not attached .* Pass forward=lambda model, batch"):
        bn.diagnose(Alone(), BATCHES)


def test_layers_that_a_failing_step_runs_do_not_count_as_called_twice() -> None:
    found = {finding.code for finding in bn.diagnose(Attached(), BATCHES).findings}
    assert not found & {"BN106", "BN109"}
