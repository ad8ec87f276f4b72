"""`python -m benchmarks gpu`: layers and a training step on a GPU, against torch and the floor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import torch

import batchnorm
from batchnorm.files import write_whole
from benchmarks.gpu import checks, layers, tune
from benchmarks.gpu.layers import BATCHES, COMPILED, NATIVE, OURS, TORCH, Case, all_cases, measure
from benchmarks.gpu.network import measure_network
from benchmarks.gpu.report import summary
from benchmarks.gpu.timing import Clock, Deadline, DeviceClock, HostClock, Watchdog, bandwidth
from benchmarks.measuring import records

RESULTS = Path(__file__).parents[1] / "results"
KEY = ("device", "shape", "layout", "dtype", "task", "contender")
NETWORK_BATCHES = (32, 128)
# Seconds after which the remaining cases are skipped, and after which the process ends even if a call hangs.
LIMIT, LAST = 420.0, 460.0
# The share of the time after which only the slowest peer is timed.
TIMED = 0.8


class Run:
    """One run: its results, its failures, and the cases that it skipped.

    Args:
        clock: Measures time on the device.
        table: Receives each row when it is measured.
        dry: Whether only to test that everything runs.
    """

    def __init__(self, clock: Clock, table: records.Table, dry: bool) -> None:
        self.clock, self.table, self.dry = clock, table, dry
        self.repeats = 2 if dry else 20
        self.deadline = Deadline(LIMIT)
        self.rows: list[records.Row] = []
        self.failures: list[str] = []
        self.right: list[Case] = []
        self.left_out: list[str] = []
        self.complete = False

    def everything(self) -> None:
        """Check and time all cases, those first that matter most; the slowest peer last, because it compiles each."""
        speed = bandwidth(self.clock, 1 << (12 if self.dry else 30), self.repeats)
        print(f"copy: {speed / 1e9:.0f} GB/s", flush=True)
        small, large = [], []
        for case in all_cases(self.dry):
            (small if case.shape[0] == BATCHES[0] or self.dry else large).append(case)
        small.sort(key=lambda case: case.residual)
        plain = sum(not case.residual for case in small)
        self.checked(small[:plain], speed)
        for batch in (1, 2) if self.dry else NETWORK_BATCHES:
            self.attempt(f"ResNet-50, batch {batch}", lambda batch=batch: self.network(batch))
        self.checked([*small[plain:], *large], speed)
        print(f"{len(self.right)} cases checked and timed after {self.deadline.elapsed:.0f} s", flush=True)
        self.time(((case, NATIVE) for case in self.right), speed, TIMED)
        if not self.dry:
            self.time(((case, COMPILED) for case in self.right), speed, 1.0)
        self.complete = True

    def checked(self, wanted: list[Case], speed: float) -> None:
        """Compare each case with float64, and time it and torch at once if it is right."""
        for case in wanted:
            if self.deadline.passed(TIMED):
                self.left_out.append(f"{case}: not checked")
            elif self.attempt(str(case), lambda case=case: layers.check(case, self.clock.device)):
                self.right.append(case)
                self.time(((case, name) for name in (OURS, TORCH)), speed, TIMED)

    def time(self, wanted: Iterable[tuple[Case, str]], speed: float, share: float) -> None:
        """Measure each of these cases until this share of the time is over."""
        for case, contender in wanted:
            what = f"{case}, {contender}"
            if self.deadline.passed(share):
                self.left_out.append(what)
            else:
                self.attempt(
                    what,
                    lambda case=case, contender=contender: self.add(
                        [measure(case, self.clock, contender, speed, self.repeats)]
                    ),
                )

    def network(self, batch: int) -> None:
        """Measure a whole network."""
        self.add(measure_network(self.clock, batch, self.dry, self.repeats))

    def add(self, found: list[records.Row]) -> None:
        """Keep rows; the network's rows have empty columns for values that only layers have."""
        columns = dict.fromkeys((self.rows or found)[0], "")
        self.rows += found
        implementation = batchnorm.backends()["cuda"]
        self.table.append([{**columns, **row, "implementation": implementation} for row in found])

    def attempt(self, what: str, call: Callable[[], object]) -> bool:
        """Return whether a call succeeded; report a failure, and raise if the device is lost."""
        try:
            call()
        except torch.AcceleratorError:
            self.failures.append(f"{what}: the device is lost")
            raise
        except torch.OutOfMemoryError:
            self.left_out.append(f"{what}: the device's memory does not hold it")
        except Exception as error:  # of one contender; the others continue
            last = (str(error).strip().splitlines() or ["no message"])[-1]
            self.failures.append(f"{what}: {type(error).__name__}: {last}")
            print(f"FAILED {self.failures[-1]}", flush=True)
        else:
            return True
        return False

    def print_report(self) -> None:
        """Print the results, without waiting for the device."""
        for text in self.failures:
            print(f"FAILED {text}")
        if self.left_out:
            print(f"skipped for lack of time or memory: {len(self.left_out)}, the first: {self.left_out[0]}")
        print(summary(self.rows))
        where = self.table.path if self.complete else self.table.partial
        print(f"results: {where}; {self.deadline.elapsed:.0f} s", flush=True)


def _clock(dry: bool) -> Clock:
    if dry:
        return HostClock()
    if not torch.cuda.is_available():
        raise click.ClickException(
            "torch must find a CUDA device, but there is none. Run this on a machine with a GPU, or use --dry."
        )
    return DeviceClock(torch.device("cuda", torch.cuda.current_device()))


def _tune(clock: Clock, path: Path | None, dry: bool) -> None:
    shapes = ((4, 8, 6, 6),) if dry else tune.SHAPES
    origin = f"Measured on {clock.name()} with torch {torch.__version__}."
    watchdog = Watchdog(LAST, lambda: print(tune.text(tune.TABLE, origin + "\nA call hung.")))
    if not tune.tune(clock, Deadline(LIMIT), shapes):
        origin += "\nNot all candidates were tried for lack of time."
    watchdog.cancel()
    text = tune.text(tune.TABLE, origin)
    print(text)
    if path is None and not dry:
        path = tune.PATH
    if path is not None:
        write_whole(path, text)
        print(f"written to {path}: run the tests, and this command without --tune")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Directory of gpu.csv.")
@click.option(
    "--tune", "tuning", is_flag=True, help="Find the kernels' fastest settings and write their table instead."
)
@click.option("--table", type=click.Path(path_type=Path), help="File for --tune instead of the kernels' own table.")
@click.option("--dry", is_flag=True, help="Without a GPU, only test that everything runs; the results mean nothing.")
def main(out: Path, tuning: bool, table: Path | None, dry: bool) -> None:
    """Check the kernels on this machine's GPU, then measure them; in under 8 minutes.

    gpu-checks.csv and gpu.csv receive each result at once. Until they are complete, their names end in .partial.
    """
    clock = _clock(dry)
    print(f"{clock.name()}; torch {torch.__version__}; {batchnorm.backends()['cuda']}", flush=True)
    if tuning:
        _tune(clock, table, dry)
        return
    run = Run(clock, records.Table(out / "gpu.csv", KEY), dry)
    outcomes = records.Table(out / "gpu-checks.csv", checks.KEY)
    run.table.clear()
    outcomes.clear()
    watchdog = Watchdog(LAST, run.print_report)
    try:
        run.failures += checks.run(() if dry else checks.CHECKS, clock.name(), outcomes, run.deadline)
        outcomes.finish()
        run.everything()
        run.table.finish()
    except checks.UnusedError as error:
        run.failures.append(str(error))
    except torch.AcceleratorError as error:
        print(f"the device is lost: {error}")
    finally:
        watchdog.cancel()
        run.print_report()
    if run.failures or not run.complete:
        sys.exit(1)


if __name__ == "__main__":
    main()
