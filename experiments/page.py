"""The documentation's page about all experiments, from their results.

    python experiments/page.py
    python experiments/page.py --run --data-dir FOLDER --fashion-dir FOLDER

The first writes `docs/experiments.md` from `experiments/results`. The second does what is missing there before, one
experiment after another. FOLDER holds the four official files; without, they are downloaded once.
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
VERDICTS = ("seen", "not seen", "not decided here", "not run")
DATA = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
INTRODUCTION = """\
Twelve claims about batch normalization, most of them from papers, each tried with real data on small networks, which a
CPU trains in minutes. What did not show is told as plainly as what did.

{count}

How to read it:

- **Effect**: what was measured, with its {percent:.0f} % interval in brackets (Student's t over the seeds; of
  logarithms where it is a ratio, ×). Above 0, or above 1×, is in the direction of the claim. Both sides of a comparison
  start from the same values, where they have the same shapes, and see the same batches. The interval covers what a seed
  changes: initial values, the order of the data, and mostly which part of them; not other networks and other data.
- **Worth**: the smallest effect that would bear the claim out in practice, chosen before the measurements (where some
  had been made, the experiment's file says so).
- **Seen**: the effect is at least its worth, and its interval leaves out no effect at all. **Not seen**: the whole
  interval is below the worth. **Not decided here**: neither. The verdict on a claim is that on the first of its
  effects. "Not seen" speaks of the setting that stands beside it, not of what the authors measured in theirs.

Each experiment is one file, which says at its top why the comparison is fair. `make experiments` does all that has no
results yet and writes this page; the command below each paragraph does one. `--full` takes longer and has more seeds.
"""


def experiment(name: str) -> Experiment:
    """Return the experiment in the file of that name."""
    return importlib.import_module(name).EXPERIMENT


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return what was found, by the name of the experiment, for those that were run."""
    files = {name: folder / f"{name}.json" for name in NAMES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def effects_of(result: dict[str, Any]) -> list[Effect]:
    """Return the effects as `claim` makes them, which knows how to write and judge them."""
    return [Effect(**{key: value for key, value in held.items() if key != "verdict"}) for held in result["effects"]]


def page(found: dict[str, dict[str, Any]], tables: dict[str, str]) -> str:
    """Return the page.

    Args:
        found: What was found, as `claim.summary` has it, by the name of the experiment; others count as not run.
        tables: More figures as Markdown, by the name of the experiment.
    """
    counts = Counter(found[name]["verdict"] if name in found else "not run" for name in NAMES)
    said = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
    count = f"Of the {len(NAMES)}: {', '.join(said)}."
    sections = [_section(number, name, found.get(name), tables.get(name)) for number, name in enumerate(NAMES, 1)]
    return "\n".join(
        [
            "<!-- Made by experiments/page.py: change that. -->\n\n# What batch normalization does, measured\n",
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
            f"![{claim.title}: what the text below says in figures](images/experiments/{name}.png)",
            f"**{effects[0].verdict.capitalize()}.** {result['found']}",
            "| effect | measured | worth | verdict |\n|---|---|---|---|\n" + "\n".join(map(_effect_row, effects)),
            *(
                [f'<details markdown="1"><summary>More figures</summary>\n\n{table.strip()}\n\n</details>']
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
    """Return the further figures of the experiments that have some."""
    files = {name: folder / f"{name}.md" for name in NAMES}
    return {name: file.read_text() for name, file in files.items() if file.exists()}


def run(folders: dict[str, Path | None], jobs: int) -> None:
    """Run each experiment; what has been trained before is not trained again."""
    for name in NAMES:
        # Those with several sources find them by name in the cache, as files of the same names cannot be in one folder.
        sources = experiment(name).data
        folder = folders.get(sources[0]) if len(sources) == 1 else None
        given = ["--data-dir", str(folder)] if folder else []
        subprocess.run([sys.executable, Path(__file__).parent / f"{name}.py", *given, "--jobs", str(jobs)], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, after running the experiments if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run what has no results yet, first")
    parser.add_argument("--data-dir", type=Path, help="folder with the four files of MNIST")
    parser.add_argument("--fashion-dir", type=Path, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    given = parser.parse_args(arguments)
    if given.run:
        run({"mnist": given.data_dir, "fashion-mnist": given.fashion_dir}, given.jobs)
    PAGE.write_text(page(results(), tables()))


if __name__ == "__main__":
    main()
