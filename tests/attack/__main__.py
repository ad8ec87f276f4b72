"""`python -m tests.attack`: attack the library, and print what was tried and what failed."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

import batchnorm
from tests.attack import files, interruptions, operators, ranks, values
from tests.attack.tally import Tally

RESULTS = Path(__file__).with_name("results.md")

# Name, what is tried, and the attack; those that write files take a folder.
ATTACKS: dict[str, tuple[str, Callable[[Tally, Path], None]]] = {
    "values": ("random calls against long double", lambda tally, _: values.attack(tally)),
    "operators": ("hostile calls of operators", lambda tally, _: operators.attack(tally)),
    "interruptions": ("functions interrupted at random moments", lambda tally, _: interruptions.attack(tally)),
    "damaged": ("commands that read damaged files", files.attack_damaged),
    "writing": ("commands killed, or on a full disk", files.attack_writing),
    "ranks": ("two processes, one of which may fail", ranks.attack),
}


def sanitized(library: Path, tally: Tally, folder: Path) -> None:
    """Attack the operators in a build with sanitizers, whose runtime must be loaded first."""
    names = ("libasan.so", "libubsan.so")
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    environment = {
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "OMP_NUM_THREADS": "2",
    }
    operators.attack(tally, library, environment)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("attacks", nargs=-1, type=click.Choice(list(ATTACKS)))
@click.option("--seconds", type=click.FloatRange(0), default=60.0, help="Time for each attack.")
@click.option("--seed", type=int, default=0, help="Seed of all tries.")
@click.option("--only", type=int, help="Repeat one try of one attack by its number.")
@click.option("--library", type=click.Path(path_type=Path), help="Folder of a build of the operators with sanitizers.")
@click.option("--write", is_flag=True, help="Write the table that the documentation shows.")
def main(
    attacks: tuple[str, ...], seconds: float, seed: int, only: int | None, library: Path | None, write: bool
) -> None:
    """Attack the library with random input, and print what was tried and what failed. All attacks by default."""
    chosen = {name: ATTACKS[name] for name in attacks or ATTACKS}
    if library is not None and "operators" in chosen:
        chosen["operators"] = ("hostile calls of operators, under sanitizers", partial(sanitized, library))
    rows, failed = ["| attack | tried | of which | failed | seconds |", "|---|---:|---|---:|---:|"], False
    for name, (what, attack) in chosen.items():
        tally, start = Tally(seconds, seed, only), time.monotonic()
        print(f"{name}: {what}, {seconds:g} s", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            attack(tally, Path(folder))
        figures = ", ".join(f"{number:,} {figure}" for figure, number in sorted(tally.figures.items()))
        rows.append(
            f"| {what} | {tally.tried:,} | {figures} | {len(tally.failures)} | {time.monotonic() - start:.0f} |"
        )
        for failure in tally.failures[:20]:
            print(f"  {name}, {failure}", file=sys.stderr)
        failed |= bool(tally.failures)
    print("\n".join(rows))
    if write:
        machine = (
            f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__.partition('+')[0]}"
        )
        note = f"Seed {seed}; {machine}; {batchnorm.backends()['cpu']}."
        RESULTS.write_text("\n".join([*rows, "", note, ""]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
