"""TensorBoard logs of the runs. They need the package tensorboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.compare.directory import BOARDS
from batchnorm.compare.records import Evaluation, Histogram, Record, Run, Step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """Write each record of one run to TensorBoard, except the layers."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def __call__(self, record: Record) -> None:
        """Log one record."""
        if isinstance(record, Histogram):
            self._histogram(record)
        elif isinstance(record, (Step, Evaluation)):
            group = "train" if isinstance(record, Step) else "evaluation"
            for field in fields(record):
                value = getattr(record, field.name)
                if field.name != "step" and value is not None:
                    self._writer.add_scalar(f"{group}/{field.name}", value, record.step)

    def _histogram(self, record: Histogram) -> None:
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


@contextmanager
def board(run: Run, directory: Path) -> Iterator[Board]:
    """Yield the board of a run; its log starts empty."""
    from torch.utils.tensorboard import SummaryWriter

    log = _log(run, directory)
    shutil.rmtree(log, ignore_errors=True)
    with SummaryWriter(str(log)) as writer:
        yield Board(writer)


def replay(run: Run, directory: Path) -> None:
    """Log a finished run, unless it already has a log."""
    if _log(run, directory).exists():
        return
    with board(run, directory) as log:
        records: list[Record] = [*run.steps, *run.evaluations, *run.histograms]
        for record in records:
            log(record)


def _log(run: Run, directory: Path) -> Path:
    return directory / BOARDS / Path(run.file_name).stem
