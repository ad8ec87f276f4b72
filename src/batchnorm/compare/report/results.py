"""The result of a comparison: outcomes, headline, summary, page and pictures from its finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchnorm.compare.directory import (
    REPORT,
    SUMMARY,
    finished_runs,
    read_facts,
    write_json,
)
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.settings import Settings
from batchnorm.compare.records import Run
from batchnorm.compare.report import tables
from batchnorm.compare.report.formats import check_formats
from batchnorm.compare.report.headline import headline
from batchnorm.compare.report.summary import Outcome, outcomes
from batchnorm.compare.training import boards
from batchnorm.files import write_whole


@dataclass(frozen=True)
class Result:
    """The result of a comparison, and the paths of its files.

    Attributes:
        settings: The settings, with every default filled in.
        runs: Every run with all its records, by seed, then in the order of the choices.
        outcomes: The outcome of each choice over all seeds, in the grid's order.
        headline: The main results as sentences.
        summary: The content of `summary.json`.
        out: The output directory.
        report_path: Path of the page, `report.html`.
        figure_paths: Paths of the pictures.
    """

    settings: Settings
    runs: list[Run]
    outcomes: list[Outcome]
    headline: list[str]
    summary: dict[str, Any]
    out: Path
    report_path: Path
    figure_paths: list[Path]

    def __str__(self) -> str:
        """Return the headline and the path of the page."""
        return "\n".join([*self.headline, "", f"Report: {self.report_path}"])


def rebuild(
    directory: str | Path,
    *,
    target_accuracy: float | None = None,
    records: str = "jsonl",
    tensorboard: bool = False,
) -> Result:
    """Write page, pictures and `summary.json` again from the runs in a directory, without training.

    This also works for an interrupted comparison; its page then says how many of its runs are finished.

    Args:
        directory: The `out` of a comparison.
        target_accuracy: The test accuracy to reach; by default, the one of the comparison.
        records: `jsonl`, or `parquet` to add tables; see `run`.
        tensorboard: Whether to write TensorBoard logs of runs that have none.

    Raises:
        ComparisonError: If the directory holds no comparison, or no finished run.
        OSError: If it cannot be written to.
        ModuleNotFoundError: If a package that this needs is missing.
    """
    check_formats(records, tensorboard)
    directory = Path(directory)
    facts = read_facts(directory)
    if facts is None:
        raise ComparisonError(
            f"report must name the directory of a comparison, but {directory} has no settings.json. Check the path."
        )
    if target_accuracy is not None:
        facts["settings"]["target_accuracy"] = target_accuracy
    return conclude(directory, facts, finished_runs(directory), records=records, tensorboard=tensorboard)


def conclude(
    directory: Path, facts: dict[str, Any], runs: Sequence[Run], *, records: str, tensorboard: bool, write: bool = True
) -> Result:
    """Return the result of the finished runs, and write it.

    Args:
        directory: The output directory.
        facts: The content of `settings.json`.
        runs: The finished runs. Runs that the settings do not include are left out.
        records: `jsonl`, or `parquet` to add tables.
        tensorboard: Whether to write TensorBoard logs of runs that have none.
        write: Whether to write anything.

    Raises:
        ComparisonError: If there is no run.
    """
    from batchnorm.compare.report import figures
    from batchnorm.compare.report import page as report

    settings = Settings.read(facts["settings"])
    choices = settings.grid.choices
    known = {(run.choice, run.seed): run for run in runs}
    cells = [(choice, seed) for seed in range(settings.seeds) for choice in choices]
    kept = [known[cell] for cell in cells if cell in known]
    if not kept:
        raise ComparisonError(
            f"at least one run must be finished, but {directory} has none of {len(cells)}. Continue it with resume "
            "(--resume)."
        )
    found = outcomes(kept, settings, facts["titles"], facts["data"]["train_samples"])
    sentences = headline(found, settings.grid, settings.target_accuracy)
    if len(kept) < len(cells):
        sentences.insert(0, f"This comparison is incomplete: {len(kept)} of its {len(cells)} runs are finished.")
    summary = {
        **facts,
        "environments": _environments(kept),
        "planned_runs": len(cells),
        "headline": sentences,
        "outcomes": [asdict(outcome) for outcome in found],
        "layers": {outcome.label: _layers(kept, outcome) for outcome in found},
        "runs": {run.file_name: {"seed": run.seed, "shared": run.shared, "own": run.own} for run in kept},
    }
    pictures = figures.draw(kept, found, settings, facts["data"]["train_samples"]) if write else {}
    if write:
        for name, picture in pictures.items():
            write_whole(directory / name, picture)
        if records == "parquet":
            tables.write(kept, directory)
        if tensorboard:
            for run in kept:
                boards.replay(run, directory)
        write_whole(directory / REPORT, report.render(kept, found, summary))
        write_json(directory / SUMMARY, summary)
    return Result(
        settings=settings,
        runs=kept,
        outcomes=found,
        headline=sentences,
        summary=summary,
        out=directory,
        report_path=directory / REPORT,
        figure_paths=[directory / name for name in pictures],
    )


def _environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each environment in which runs were trained, with the number of its runs."""
    found: list[dict[str, Any]] = []
    for run in runs:
        same = next((each for each in found if {**each, "runs": None} == {**run.environment, "runs": None}), None)
        if same is None:
            found.append({**run.environment, "runs": 1})
        else:
            same["runs"] += 1
    return found


def _layers(runs: Sequence[Run], outcome: Outcome) -> list[dict[str, Any]]:
    """Return the layers of the choice's first seed."""
    run = next(run for run in runs if run.choice == outcome.choice)
    return [asdict(layer) for layer in run.layers]
