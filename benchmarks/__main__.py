"""`python -m benchmarks`: run each section in its own processes, then write tables and pictures."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch

import batchnorm
from benchmarks.gpu import command as gpu_command
from benchmarks.measuring import records
from benchmarks.measuring.options import Options
from benchmarks.reports import report
from benchmarks.sections import (
    exactness,
    family,
    flax_layer,
    fold,
    frameworks,
    keras_layer,
    layers,
    limits,
    memory,
    page_faults,
    small,
    steps,
)
from benchmarks.subjects import peers

HERE = Path(__file__).parent
# Environment variables by the name of an allocator setting; None if this machine does not have the allocator.
Settings = dict[str, dict[str, str] | None]
PICTURES = HERE.parent / "docs" / "images"


@dataclass(frozen=True)
class Section:
    """A CSV file: the key of its rows, the function that measures them, and the allocator settings."""

    key: tuple[str, ...]
    measure: Callable[[Options, records.Table], None]
    settings: Settings

    def table(self, out: Path, name: str) -> records.Table:
        return records.Table(out / f"{name}.csv", self.key)


_BOTH: Settings = dict(records.ALLOCATORS)
_DEFAULT: Settings = {"default": {}}

# The variables of all settings; they are not inherited from the caller.
_SETTINGS: list[Settings] = [
    _BOTH, page_faults.settings(), frameworks.settings(), small.SETTINGS, small.PYTHON_SETTINGS, steps.SETTINGS,
]  # fmt: skip
_SET_HERE = {name for settings in _SETTINGS for setting in settings.values() for name in setting or ()}

SECTIONS = {
    "layers": Section(layers.KEY, layers.measure_layers, _BOTH),
    "limits": Section(limits.KEY, limits.measure_limits, {"kept": records.ALLOCATORS["kept"]}),
    "sizes": Section(layers.KEY, layers.measure_sizes, _BOTH),
    "threads": Section(layers.KEY, layers.measure_threads, {"kept": records.ALLOCATORS["kept"]}),
    "small": Section(small.KEY, small.measure_small, small.SETTINGS),
    "small-python": Section(small.KEY, small.measure_small, small.PYTHON_SETTINGS),
    "exactness": Section(exactness.KEY, exactness.measure_exactness, _DEFAULT),
    "frameworks": Section(frameworks.KEY, frameworks.measure_frameworks, frameworks.settings()),
    "keras": Section(keras_layer.KEY, keras_layer.measure_keras, frameworks.settings()),
    "flax": Section(flax_layer.KEY, flax_layer.measure_flax, _DEFAULT),
    "memory": Section(memory.KEY, memory.measure_memory, _DEFAULT),
    "page-faults": Section(page_faults.KEY, page_faults.measure_page_faults, page_faults.settings()),
    "family": Section(family.KEY, family.measure_family, {"kept": records.ALLOCATORS["kept"]}),
    "networks": Section(steps.KEY, steps.measure_networks, steps.SETTINGS),
    "fold": Section(fold.KEY, fold.measure_fold, _DEFAULT),
    "fold-photographs": Section(fold.PHOTOGRAPHS_KEY, fold.measure_photographs, _DEFAULT),
    "fold-speed": Section(fold.SPEED_KEY, fold.measure_speed, {"kept": records.ALLOCATORS["kept"]}),
}


def _in_processes(name: str, settings: Settings, arguments: list[str], out: Path, resume: bool) -> None:
    """Run a section under each setting in a new process, because allocators read their environment at its start."""
    section = SECTIONS[name]
    table = section.table(out, name)
    if not resume:
        table.clear()
    for setting, environment in settings.items():
        if environment is None:
            print(f"{name}: {setting} is skipped: what it needs is not installed")
            continue
        own = {k: v for k, v in os.environ.items() if k not in _SET_HERE}
        command = [sys.executable, "-m", "benchmarks", name, "--here", setting, *arguments]
        result = subprocess.run(command, env={**own, **environment}, cwd=HERE.parent, check=False)
        if result.returncode:
            print(f"{name} failed under {setting}; the finished measurements are in {table.partial}", file=sys.stderr)
            sys.exit(1)
    table.finish()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("sections", nargs=-1, type=click.Choice([*SECTIONS, "report"]))
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the CSV files and tables.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Directory of the pictures.")
@click.option(
    "--quick", is_flag=True, help="Only test that everything runs: small cases, few repetitions, under a minute."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same commit.")
@click.option("--seconds", type=click.FloatRange(0.01), default=0.3, help="Time for all contenders of one case.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count() or 1, help="Threads of every contender.")
@click.option(
    "--only",
    default="",
    help="Only layers whose description contains this, such as '32×64×56×56, channels-last', or only such networks, "
    "such as 'MobileNetV2', 'ResNet-50, training step' or 'inference, channels-last, float32'.",
)
@click.option("--here", hidden=True)
def main(
    sections: tuple[str, ...],
    out: Path | None,
    pictures: Path | None,
    quick: bool,
    resume: bool,
    seconds: float,
    threads: int,
    only: str,
    here: str | None,
) -> None:
    """Measure batch normalization on this machine's CPU, and write tables and pictures.

    Without SECTIONS, measure all of them. Results go to benchmarks/results and docs/images. For a GPU, run
    `python -m benchmarks gpu`. Without one, `python -m benchmarks gpu-static` compiles its kernels.
    """
    torch.set_num_threads(threads)
    if quick:
        seconds = 0.05
    if quick or only:  # partial results must not replace complete ones
        out = out or Path(tempfile.mkdtemp(prefix="batchnorm-benchmarks-"))
        pictures = pictures or out
    out, pictures = (out or HERE / "results").resolve(), (pictures or PICTURES).resolve()
    if here is not None:
        (name,) = sections
        if here.startswith("kept"):
            print(records.set_allocator(here))
        section = SECTIONS[name]
        section.measure(Options(out, quick, seconds, threads, only, here), section.table(out, name))
        return
    start = time.monotonic()
    for line in peers.missing():
        print(line)
    print(batchnorm.backends())
    arguments = ["--out", str(out), "--seconds", str(seconds), "--threads", str(threads)]
    arguments += ["--only", only, *(["--quick"] if quick else [])]
    for name in sections or SECTIONS:
        if name != "report":
            settings = SECTIONS[name].settings
            if quick:
                settings = {"kept": settings.get("kept", records.ALLOCATORS["kept"])}
            _in_processes(name, settings, arguments, out, resume)
    report.write(out, pictures)
    print(f"results: {out}; pictures: {pictures}; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:
        gpu_command.main(sys.argv[2:], prog_name="python -m benchmarks gpu")
    if sys.argv[1:2] == ["gpu-static"]:
        from benchmarks.gpu.static import command as static_command  # imports Triton, which not every platform has

        static_command.main(sys.argv[2:], prog_name="python -m benchmarks gpu-static")
    main()
