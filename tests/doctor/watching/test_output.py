"""`watch`: its history, table, picture and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from batchnorm.doctor import watch
from batchnorm.doctor.watching.records import QUANTITIES
from tests.doctor.defective import Checkpointed
from tests.doctor.networks import trained
from tests.doctor.watching.training import last, train, watched


class Writer:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))


def test_each_look_is_written_once() -> None:
    model, writer, late = trained("plain"), Writer(), Writer()
    with watch(model, every=2, writer=writer) as w:
        train(model, 5)
    assert len(writer.written) == len(set(writer.written)) == 2 * 6 * len(QUANTITIES)
    assert {step for _, _, step in writer.written} == {2, 4}
    assert ("batchnorm/updates/blocks.0.1", 1, 4) in writer.written
    w.write(late)
    assert late.written == []
    w.write(late, step=70)
    assert {step for _, _, step in late.written} == {70}
    assert {name: value for name, value, _ in late.written} == w.metrics()


def test_tensorboard_takes_it(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(tmp_path) as writer, watch(trained("plain"), every=1, writer=writer) as w:
        train(w._root, 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    (first, second) = events.Scalars("batchnorm/mean_distance/blocks.0.1")
    assert (first.step, second.step) == (2, 3)
    assert second.value == pytest.approx(last(w)["blocks.0.1"].mean_distance)


def test_the_history_is_a_table() -> None:
    import pandas

    w = watched(trained("plain"), 2)
    table = pandas.DataFrame(w.history)
    assert list(table.columns) == ["step", "layer", *[q for q in QUANTITIES if q != "updates"], "updates", "batch_size"]
    assert len(table) == 12
    assert w.metrics(per_layer=False)["batchnorm/noise"] == table[table.step == 3].noise.max()


def test_it_prints_a_short_table() -> None:
    w = watched(Checkpointed(trained("plain")), 2)
    lines = str(w).splitlines()
    assert lines[0] == "watch: 3 steps, 2 looks; 1 finding"
    assert len([line for line in lines if line.startswith("network.blocks")]) == 6
    assert "BN106" in lines[-1]


def test_the_picture_shows_every_layer(tmp_path: Path) -> None:
    w = watched(Checkpointed(trained("plain")), 3)
    figure = w.plot()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == list(QUANTITIES.values())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(w.layers)
    w.save(tmp_path / "watch.png")
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["watch.png"]
    healthy = watched(trained("plain"), 2).plot()
    assert QUANTITIES["updates"] not in [axes.get_title() for axes in healthy.axes]


def test_a_picture_of_nothing_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    with watch(trained("plain")) as w:
        with pytest.raises(ValueError, match="Watch.plot expects at least one look, got none"):
            w.plot()
        with pytest.raises(ValueError, match="ends in .png, .svg or .pdf"):
            w.save(tmp_path / "watch.gif")
        assert w.metrics() == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "expects a torch.nn.Module, got int"),
        ({"model": nn.Linear(2, 2)}, ValueError, "expects a model with batch normalization"),
        ({"model": nn.LazyBatchNorm1d()}, ValueError, "has not seen a batch"),
        ({"every": 0}, ValueError, "expects every >= 1, got 0"),
        ({"every": 1.5}, TypeError, "expects every to be an int"),
        ({"overhead": 0.0}, ValueError, "expects overhead in"),
    ],
)
def test_invalid_arguments_raise_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        watch(**{"model": nn.BatchNorm1d(2), **arguments})
