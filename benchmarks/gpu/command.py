"""`python -m benchmarks gpu`: layers and a training step on a GPU, against torch and the floor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import torch

import batchnorm
from batchnorm.files import write_whole
from benchmarks import records
from benchmarks.gpu import layers, tune
from benchmarks.gpu.layers import BATCHES, COMPILED, NATIVE, OURS, TORCH, Case, all_cases, measure
from benchmarks.gpu.network import measure_network
from benchmarks.gpu.report import summary
from benchmarks.gpu.timing import Clock, Deadline, DeviceClock, HostClock, Watchdog, bandwidth

RESULTS = Path(__file__).parents[1] / "results"
KEY = ("device", "shape", "layout", "dtype", "task", "contender")
# Seconds after which the remaining cases are skipped, and after which the process ends even if a call hangs.
LIMIT, LAST = 420.0, 460.0
# Shares of the time after which no more cases are checked, and after which only the slowest peer is timed.
CHECKED, TIMED = 0.4, 0.7


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
        self.left_out: list[str] = []
        self.complete = False

    def everything(self) -> None:
        """Check all cases, then time them, the slowest peer last, because it compiles for each case."""
        speed = bandwidth(self.clock, 1 << (12 if self.dry else 30), self.repeats)
        print(f"copy: {speed / 1e9:.0f} GB/s", flush=True)
        right = self.check(all_cases(self.dry))
        print(f"{len(right)} cases checked against float64 after {self.deadline.elapsed:.0f} s", flush=True)
        peers = (OURS, TORCH, NATIVE)
        small = [case for case in right if case.shape[0] == BATCHES[0] or self.dry]
        self.time(((case, name) for case in small for name in peers), speed, TIMED)
        self.attempt("ResNet-50", self.network)
        self.time(((case, name) for case in right if case not in small for name in peers), speed, TIMED)
        if not self.dry:
            self.time(((case, COMPILED) for case in right), speed, 1.0)
        self.complete = True

    def check(self, wanted: list[Case]) -> list[Case]:
        """Return the cases with correct results; the others are reported."""
        right = []
        for case in wanted:
            if self.deadline.passed(CHECKED):
                self.left_out.append(f"{case}: not checked")
            elif self.attempt(str(case), lambda case=case: layers.check(case, self.clock.device)):
                right.append(case)
        return right

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

    def network(self) -> None:
        """Measure a whole network."""
        self.add(measure_network(self.clock, self.dry, self.repeats))

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
        raise click.UsageError("torch must find a CUDA device, but there is none. To run without one, use --dry.")
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
    """Measure batch normalization on this machine's GPU; write gpu.csv and print a short table in under 8 minutes."""
    clock = _clock(dry)
    print(f"{clock.name()}; torch {torch.__version__}; {batchnorm.backends()['cuda']}", flush=True)
    if tuning:
        _tune(clock, table, dry)
        return
    run = Run(clock, records.Table(out / "gpu.csv", KEY), dry)
    run.table.clear()
    watchdog = Watchdog(LAST, run.print_report)
    try:
        run.everything()
        run.table.finish()
    except torch.AcceleratorError as error:
        print(f"the device is lost: {error}")
    finally:
        watchdog.cancel()
        run.print_report()
    if run.failures or not run.complete:
        sys.exit(1)


if __name__ == "__main__":
    main()
