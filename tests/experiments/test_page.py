"""The page about the experiments says what their records say; and one experiment runs, in short form."""

import json
import subprocess
import sys

import claim
import page
import pytest
from matplotlib import image

RUN = sorted(page.results())


def test_every_experiment_on_the_page_says_its_own_name():
    assert [page.experiment(name).claim.name for name in page.NAMES] == list(page.NAMES)


def test_results_are_of_experiments_on_the_page():
    assert {file.stem for file in claim.RESULTS.glob("*.json")} <= {
        *page.NAMES,
        *(f"{name}-full" for name in page.NAMES),
    }


def test_the_committed_page_is_made_of_the_committed_results():
    assert page.PAGE.read_text() == page.page(page.results(), page.tables()), "run: python experiments/page.py"


@pytest.mark.parametrize("name", RUN)
def test_the_committed_summary_is_made_of_the_committed_records(name):
    tried = page.experiment(name)
    cells = list(tried.cells(claim.Size()))
    records = claim.records_of(cells, claim.RESULTS / f"{name}.jsonl")
    assert len(records) == len(cells)
    computed, committed = claim.summary(tried, records), page.results()[name]
    for summary in (computed, committed):  # other processors and other versions of SciPy may round them otherwise
        summary["effects"] = [(effect.what, effect.figures, effect.verdict) for effect in page.effects_of(summary)]
    assert computed == committed, f"run: python experiments/{name}.py"
    assert (claim.PICTURES / f"{name}.png").exists()


@pytest.mark.parametrize(
    ("unit", "low", "mean", "high", "verdict"),
    [
        ("×", 1.37, 1.55, 1.74, "smaller than claimed"),
        ("×", 1.04, 1.45, 2.02, "not decided here"),  # the effect exists; whether it reaches its worth is open
        ("×", 0.99, 1.12, 1.28, "not seen"),
        ("×", 0.81, 0.85, 0.90, "not seen"),
        ("×", 1.89, 2.12, 2.38, "seen"),
        ("×", 0.90, 2.12, 5.00, "not decided here"),
        ("points", 0.10, 0.20, 0.30, "smaller than claimed"),  # 0 is zero effect, and not 1
        ("points", -0.10, 0.20, 0.30, "not seen"),
        ("points", 0.00, 0.20, 0.40, "not seen"),
        ("points", 1.00, 1.50, 2.00, "not decided here"),
        ("points", 1.00, 2.00, 3.00, "seen"),
    ],
)
def test_the_verdict_compares_the_interval_with_zero_effect_and_with_the_worth(unit, low, mean, high, verdict):
    assert claim.Effect("Errors", unit, 2, [], mean, low, high).verdict == verdict
    assert verdict in page.VERDICTS


def test_misses_stand_on_the_page_as_plainly_as_hits():
    def result(name, values):
        effect = claim.Effect.over("Errors", values, unit="points", worth=1)
        held = {**vars(effect), "verdict": effect.verdict}
        return {
            "claim": vars(page.experiment(name).claim),
            "verdict": effect.verdict,
            "effects": [held],
            "found": "So.",
        }

    values = {"dropout": [2.0, 2.1], "noise": [-2.0, -2.1], "leakage": [-9.0, 9.0], "domains": [0.5, 0.51]}
    text = page.page({name: result(name, found) for name, found in values.items()}, {"noise": "| further |"})
    assert "Of the 12: 1 seen, 1 smaller than claimed, 1 not seen, 1 not decided here, 8 not run." in text
    rows = [line for line in text.splitlines() if line.startswith(tuple(f"| {number} |" for number in range(1, 13)))]
    verdicts = {name: row.split("**")[1] for name, row in zip(page.NAMES, rows, strict=True)}
    expected = {
        "dropout": "seen",
        "noise": "not seen",
        "leakage": "not decided here",
        "domains": "smaller than claimed",
    }
    assert verdicts == {name: expected.get(name, "not run") for name in page.NAMES}
    assert "Errors: −2.05 points (−2.69 to −1.41)" in rows[page.NAMES.index("noise")]
    for name, verdict in expected.items():
        section = text.split(f"{{#{name}}}")[1].split("\n## ")[0]
        assert f"**{verdict.capitalize()}.** So." in section and f"images/experiments/{name}.png" in section
        assert ("| further |" in section) == (name == "noise")


def test_leakage_runs_in_short_form(tmp_path):
    command = [sys.executable, str(claim.ROOT / "experiments" / "leakage.py"), "--quick", "--out", str(tmp_path)]
    command += ["--jobs", "1"]  # importing takes longer than training
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    found = json.loads((tmp_path / "leakage.json").read_text())
    cells = list(page.experiment("leakage").cells(claim.Size(seeds=2, quick=True)))
    assert found["trainings"] == len(claim.records_of(cells, tmp_path / "leakage.jsonl")) == len(cells)
    for effect in page.effects_of(found):
        assert str(effect) in printed
    assert found["found"] in " ".join(printed.split())
    height, width, _ = image.imread(tmp_path / "leakage.png").shape
    assert height > 500 and width > 500
