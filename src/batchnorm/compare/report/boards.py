"""The records of each run as TensorBoard shows them; needs the package tensorboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchnorm.compare.directory import BOARDS
from batchnorm.compare.records import Evaluation, Histogram, Run, Step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """Hands each record of one run on to TensorBoard."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def step(self, record: Step) -> None:
        """Shows one step of training."""
        self._scalars("train", record)

    def evaluation(self, record: Evaluation) -> None:
        """Shows one look at the test set."""
        self._scalars("evaluation", record)

    def histogram(self, record: Histogram) -> None:
        """Shows one distribution."""
        if record.percentiles is None:
            return
        edges = np.linspace(record.low, record.high, len(record.counts) + 1)
        centres = (edges[:-1] + edges[1:]) / 2
        counts = np.array(record.counts)
        self._writer.add_histogram_raw(
            f"activations/{record.where}",
            min=record.low,
            max=record.high,
            num=int(counts.sum()),
            sum=float(counts @ centres),
            sum_squares=float(counts @ centres**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=record.counts,
            global_step=record.step,
        )

    def _scalars(self, group: str, record: Any) -> None:
        for field in fields(record):
            value = getattr(record, field.name)
            if field.name != "step" and value is not None:
                self._writer.add_scalar(f"{group}/{field.name}", value, record.step)


@contextmanager
def board(run: Run, directory: Path) -> Iterator[Board]:
    """Gives what shows a run, in a log of its own that begins anew."""
    from torch.utils.tensorboard import SummaryWriter

    log = _log(run, directory)
    shutil.rmtree(log, ignore_errors=True)
    with SummaryWriter(str(log)) as writer:
        yield Board(writer)


def replay(run: Run, directory: Path) -> None:
    """Shows a run that was trained before, unless it is shown already."""
    if _log(run, directory).exists():
        return
    with board(run, directory) as shown:
        for step in run.steps:
            shown.step(step)
        for evaluation in run.evaluations:
            shown.evaluation(evaluation)
        for histogram in run.histograms:
            shown.histogram(histogram)


def _log(run: Run, directory: Path) -> Path:
    return directory / BOARDS / Path(run.file_name).stem
