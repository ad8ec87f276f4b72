"""Write the documentation's page about all experiments from their results.

    python experiments/page.py
    python experiments/page.py --run --data-dir FOLDER --fashion-dir FOLDER

The first command writes `docs/experiments.md` from `experiments/results`. The second first runs all trainings that have
no results yet, one experiment after another. FOLDER contains the four official files; without it, they are downloaded
once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claim import CONFIDENCE, RESULTS, ROOT, Effect, Experiment

from batchnorm.files import write_whole

NAMES = (
    "learning_rate",
    "distributions",
    "covariate_shift",
    "landscape",
    "noise",
    "batch_size",
    "running_averages",
    "domains",
    "fine_tuning",
    "placement",
    "dropout",
    "leakage",
)
PAGE = ROOT / "docs" / "experiments.md"
VERDICTS = ("seen", "smaller than claimed", "not seen", "not decided here", "not run")
DATA = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
INTRODUCTION = """\
This page tests twelve claims about batch normalization, most of them from papers. Each test uses real data and small
networks, which a CPU trains in minutes. Negative results are reported as plainly as positive ones.

{count}

How to read the results:

- **Effect**: the measurement, with its {percent:.0f} % interval in parentheses (Student's t over the seeds; on
  logarithms for a ratio, ×). Values above 0, or above 1×, support the claim. In both networks of a comparison,
  parameters of the same name and shape start from the same values, and both see the same batches. The interval covers
  the variation by seed: initial values, the order of the data, and usually the choice of the data. It does not cover
  other networks and other data sets.
- **Worth**: the smallest effect that would support the claim in practice, chosen before the measurements. If some
  measurements came first, the file of the experiment says so.
- **Seen**: the effect is at least its worth, and its whole interval is above zero effect (above 0, or above 1×).
  **Smaller than claimed**: the whole interval is above zero effect, but below the worth. **Not seen**: the whole
  interval is below the worth, and it includes or is below zero effect. **Not decided here**: anything else; the
  interval includes the worth, so more seeds could decide.
- The verdict on a claim is the verdict on its first effect. It applies to the setting of the test, not to the authors'
  own setting.

Each experiment is one file, which explains at its top why the comparison is fair. `make experiments` runs all trainings
that have no results yet and writes this page. The command at the end of each section runs one experiment. `--full` runs
a longer form with more seeds.
"""


def experiment(name: str) -> Experiment:
    """Return the experiment in the file of that name."""
    return importlib.import_module(name).EXPERIMENT


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the summaries of the experiments that were run, by name."""
    files = {name: folder / f"{name}.json" for name in NAMES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def effects_of(result: dict[str, Any]) -> list[Effect]:
    """Return the effects of a summary."""
    return [Effect(**{key: value for key, value in held.items() if key != "verdict"}) for held in result["effects"]]


def page(found: dict[str, dict[str, Any]], tables: dict[str, str]) -> str:
    """Return the page.

    Args:
        found: The results of `claim.summary` by the name of the experiment; others count as not run.
        tables: More results as Markdown, by the name of the experiment.
    """
    counts = Counter(found[name]["verdict"] if name in found else "not run" for name in NAMES)
    verdicts = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
    count = f"Of the {len(NAMES)}: {', '.join(verdicts)}."
    sections = [_section(number, name, found.get(name), tables.get(name)) for number, name in enumerate(NAMES, 1)]
    return "\n".join(
        [
            "<!-- Written by experiments/page.py; edit that file. -->\n\n# What batch normalization does, measured\n",
            INTRODUCTION.format(count=count, percent=100 * CONFIDENCE),
            "| | claim | verdict | effect |\n|---|---|---|---|",
            *(_row(number, name, found.get(name)) for number, name in enumerate(NAMES, 1)),
            "",
            *sections,
        ]
    )


def _row(number: int, name: str, result: dict[str, Any] | None) -> str:
    claim = experiment(name).claim
    link = f"[{claim.title}](#{name})"
    if result is None:
        return f"| {number} | {link}: {claim.statement} | **not run** | |"
    effect = effects_of(result)[0]
    return f"| {number} | {link}: {claim.statement} | **{effect.verdict}** | {effect.what}: {effect.figures} |"


def _section(number: int, name: str, result: dict[str, Any] | None, table: str | None) -> str:
    tried = experiment(name)
    claim = tried.claim
    data = " and ".join(DATA[source] for source in tried.data)
    parts = [f"## {number}. {claim.title} {{#{name}}}", f"*The claim:* {claim.statement} {claim.source}"]
    if result is None:
        parts.append("**Not run.**")
    else:
        effects = effects_of(result)
        parts += [
            f"![{claim.title}: the results below as a figure](images/experiments/{name}.png)",
            f"**{effects[0].verdict.capitalize()}.** {result['found']}",
            "| effect | measured | worth | verdict |\n|---|---|---|---|\n" + "\n".join(map(_effect_row, effects)),
            *(
                [f'<details markdown="1"><summary>More results</summary>\n\n{table.strip()}\n\n</details>']
                if table
                else []
            ),
        ]
    parts += [
        f"*The setting:* {claim.setting}",
        f"```bash\npython experiments/{name}.py --data-dir FOLDER # with the files of {data}\n```\n",
    ]
    return "\n\n".join(parts)


def _effect_row(effect: Effect) -> str:
    worth = f"{effect.worth:,g}" + ("×" if effect.unit == "×" else f" {effect.unit}")
    return f"| {effect.what} | {effect.figures} | {worth} | {effect.verdict} |"


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return the tables of the experiments that have one."""
    files = {name: folder / f"{name}.md" for name in NAMES}
    return {name: file.read_text() for name, file in files.items() if file.exists()}


def run(folders: dict[str, Path | None], jobs: int) -> None:
    """Run each experiment; trainings that have results are not repeated."""
    for name in NAMES:
        # One folder cannot hold the files of several data sets, whose names are the same; the cache can.
        sources = experiment(name).data
        folder = folders.get(sources[0]) if len(sources) == 1 else None
        given = ["--data-dir", str(folder)] if folder else []
        subprocess.run([sys.executable, Path(__file__).parent / f"{name}.py", *given, "--jobs", str(jobs)], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page; with `--run`, run the experiments first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="first run all trainings that have no results yet")
    parser.add_argument("--data-dir", type=Path, help="folder with the four files of MNIST")
    parser.add_argument("--fashion-dir", type=Path, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    given = parser.parse_args(arguments)
    if given.run:
        run({"mnist": given.data_dir, "fashion-mnist": given.fashion_dir}, given.jobs)
    write_whole(PAGE, page(results(), tables()))


if __name__ == "__main__":
    main()
