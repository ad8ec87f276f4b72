"""`python -m benchmarks gpu-static`: compile the kernels without a GPU, and write what their code shows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.gpu.model import page
from benchmarks.gpu.static import space, table
from benchmarks.gpu.static.compiling import launches
from benchmarks.measuring import records

ROOT = Path(__file__).parents[3]
LIMITED = "sm_90"  # the architecture that has limits
_FOLDER = click.Path(exists=True, file_okay=False, resolve_path=True)


@dataclass(frozen=True)
class Compilation:
    """A part of the space, for one architecture: whether only Triton's front end runs, and how many factors combine."""

    architecture: str
    frontend: bool
    strength: int

    def failures(self) -> Iterator[str]:
        """Make the calls, and yield a line for each that fails."""
        for operator, choice in space.calls(self.strength):
            try:
                with launches(self.architecture, frontend=self.frontend):
                    space.call(operator, choice)
            except Exception as error:  # of one variant; the others continue
                yield f"{operator} {choice}: {_cause(error)}"


# All combinations of three factors in the front end, which finds errors of the language; of two in the whole compiler.
COMPILATIONS = (
    Compilation("sm_90", True, 3),
    Compilation("sm_90", False, 2),
    Compilation("gfx942", False, 2),
)


def _cause(error: BaseException) -> str:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}"


def _in_process(number: int, path: str | None) -> tuple[str, list[str]]:
    """Run a compilation with the Triton in a folder; return what it was, and its failures."""
    environment = os.environ.copy()
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([path, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with tempfile.TemporaryDirectory(prefix="triton-cache-") as cache:  # nothing from an earlier run
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, "-m", "benchmarks", "gpu-static", "--compilation", str(number)]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    what, *failures = result.stdout.splitlines() or [f"compilation {number}"]
    if result.returncode:
        failures.append((result.stderr.strip().splitlines() or ["no message"])[-1])
    return what, failures


def _compile_here(number: int) -> None:
    import triton

    print(f"Triton {triton.__version__}, {COMPILATIONS[number]}", flush=True)
    for line in COMPILATIONS[number].failures():
        print(" ".join(line.split()), flush=True)


def compile_space(tritons: list[str | None]) -> list[str]:
    """Compile the whole space with each Triton; return the failures."""
    work = [(number, path) for path in tritons for number in range(len(COMPILATIONS))]
    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for what, failures in pool.map(lambda item: _in_process(*item), work):
            print(f"{what}: {len(failures)} failed", flush=True)
            failed += [f"{what}: {line}" for line in failures]
    return failed


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--triton", "folders", multiple=True, type=_FOLDER, help="A folder with another Triton to compile with.")
@click.option("--table-only", is_flag=True, help="Do not compile the whole space.")
@click.option("--limits", "renew", is_flag=True, help="Only set the limits slightly above what the kernels need now.")
@click.option("--out", type=click.Path(path_type=Path), default=table.RESULTS, help="Directory of the tables.")
@click.option("--compilation", type=int, hidden=True)
def main(folders: tuple[str, ...], table_only: bool, renew: bool, out: Path, compilation: int | None) -> None:
    """Compile every kernel for every combination of arguments, and count registers and instructions of a value.

    This needs no GPU. The status is 1 if a kernel does not compile or exceeds its limits.
    """
    if compilation is not None:
        _compile_here(compilation)
        return
    if renew:
        table.write(out / table.LIMITS, table.limits_of(list(table.rows(LIMITED, table.table_cases()))))
        return
    failed = [] if table_only else compile_space([None, *folders])
    found = [row for architecture in table.ARCHITECTURES for row in table.rows(architecture, table.table_cases())]
    table.write(out / table.TABLE, found)
    limited = [row for row in found if row["architecture"] == LIMITED]
    page.write(out, limited)
    failed += table.exceeded(limited, records.read(out / table.LIMITS))
    for line in failed:
        print(f"FAILED {line}")
    print(f"{len(found)} kernels: {out / table.TABLE}")
    if failed:
        sys.exit(1)
