from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from torch import nn

from batchnorm import compare, page
from batchnorm.compare import Choice, Evaluation, Grid, Histogram, Run, Settings, Step
from batchnorm.compare.inputs import norms
from batchnorm.compare.report import curves, figures
from batchnorm.compare.report.facets import Facets
from batchnorm.compare.report.summary import outcomes

OUTSIDE = re.compile(r"""(?:src|href)\s*=\s*["']?|url\(|@import""")


class Page(HTMLParser):
    """Collects the page's tags, its text by tag, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = [("", {})]
        self.data: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.data.setdefault(self.tags[-1][0], []).append(data)


@pytest.fixture(scope="module")
def html(result) -> str:
    return result.report_path.read_text(encoding="utf-8")


def chart_data(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', html, re.S).group(1))


def test_the_page_needs_nothing_else(html):
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base"}
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert not OUTSIDE.search("".join(page.data["style"]))
    assert len(html) < 1_500_000


def test_the_page_has_headline_tables_and_a_chart_of_each_kind(result, html):
    page = Page(html)
    assert all(sentence in html for sentence in result.headline)
    places = [attributes for tag, attributes in page.tags if tag == "figure"]
    drawn = [a["data-name"] for a in places if a["data-chart"] == "curves"]
    assert drawn == ["accuracy", "test_loss", "train_loss", "gap", "gradient_norm"]
    assert [a["data-name"] for a in places if a["data-chart"] == "percentiles"] == ["first", "last"]
    assert [(a["data-site"], a["data-stage"]) for a in places if a["data-chart"] == "site"] == [
        (str(site), str(stage)) for site in range(2) for stage in range(3)
    ]
    assert [a["data-label"] for a in places if a["data-chart"] == "activations"] == ["none", "batch"]
    assert not [a for a in places if a["data-chart"] == "grid"]
    cells = "".join(page.data["th"])
    for word in ("γ", "β", "running mean", "running variance", "hidden1.norm", "hidden2.norm"):
        assert word in cells


def test_the_table_of_outcomes_sorts_by_numbers(html):
    """Each column has a button and each cell a number, or nothing where there is none."""
    table = re.search(r'<table class="ranges sortable">(.*?)</table>', html, re.S).group(1)
    head, body = table.split("</thead>")
    heads = re.findall(r'<th scope="col" aria-sort="none"><button type="button" data-first="(\w+)">', head)
    rows = [re.findall(r'data-value="([^"]*)"', row) for row in body.split("</tr>")[:-1]]
    assert set(heads) == {"ascending", "descending"}
    assert [len(row) for row in rows] == [len(heads)] * 2
    assert all(float(value or 0) == float(value or 0) for row in rows for value in row)


def test_the_charts_show_what_was_recorded(result, html):
    charts = chart_data(html)
    assert charts["labels"] == ["none", "batch"]
    step, epochs, _, mid, low, high, seeds = charts["curves"]["accuracy"]["facets"][0][1][-1]
    finals = [100 * run.evaluations[-1].test_accuracy for run in result.runs if run.norm == "batch"]
    assert (step, epochs, seeds) == (12, 2, 2)  # 6 steps of 16 in an epoch of 96 samples
    assert (low, high) == pytest.approx((min(finals), max(finals)), rel=1e-3)
    assert mid == pytest.approx(np.mean(finals), rel=1e-3)
    gaps = [100 * (e.train_accuracy - e.test_accuracy) for e in (run.evaluations[-1] for run in result.runs[1::2])]
    assert charts["curves"]["gap"]["facets"][0][1][-1][3] == pytest.approx(np.mean(gaps), abs=1e-2)
    for panel in charts["activations"]["panels"].values():
        assert [column["step"] for column in panel["columns"]] == [1, 5, 10, 12]
        assert all(0.9 < sum(column["shares"]) <= 1.002 for column in panel["columns"])
    for where in ("first", "last"):
        found = [h for r in result.runs if r.norm == "batch" for h in r.histograms if (h.step, h.where) == (12, where)]
        expected = np.mean([h.percentiles for h in found], axis=0)
        step, _, _, *percentiles = charts["percentiles"][where]["facets"][0][1][-1]
        assert [step, *percentiles] == pytest.approx([12, *expected], rel=1e-3)


def test_a_grid_has_heat_maps_and_draws_the_best_of_each_norm(data, tmp_path):
    found = compare.run(
        ["none", "batch", "layer"], data=data, lr=[0.01, 0.3, 1e30], steps=12, batch_size=[16, 32], seeds=1,
        out=tmp_path, progress=False,
    )  # fmt: skip
    text = found.report_path.read_text(encoding="utf-8")
    charts = chart_data(text)
    assert [panel["title"] for panel in charts["grid"]] == ["none", "batch", "layer"]
    assert charts["grid"][0]["columns"] == ["0.01", "0.3", "1e+30"]
    assert charts["grid"][0]["rows"] == ["16", "32"]
    lost = [square for square in charts["grid"][0]["squares"] if square["column"] == "1e+30"]
    assert [(square["accuracy"], square["diverged"]) for square in lost] == [(None, 1), (None, 1)]
    assert 3 <= charts["drawn"] <= 6  # the best rate of each norm for either batch size
    assert len(charts["labels"]) == 9
    assert {label.split(",")[0] for label in charts["labels"][: charts["drawn"]]} == {"none", "batch", "layer"}
    assert charts["facets"] == ["batches of 16", "batches of 32"]
    assert [[len(facet) for facet in each["facets"]] for each in charts["curves"].values()] == [[9, 9]] * 5
    assert len(charts["activations"]["panels"]) == 3
    assert [path.name for path in found.figure_paths] == [
        "accuracy.png", "loss.png", "activations.png", "layers.png", "grid.png"
    ]  # fmt: skip
    assert len(found.headline) <= 5


def test_many_runs_make_a_short_page(data, tmp_path, no_pictures):
    """60 runs: at most eight are drawn at first, and the layers of these are shown."""
    specs = [f"batch:momentum=0.{k:02}" for k in range(1, 31)]
    found = compare.run(specs, data=data, steps=4, batch_size=48, seeds=2, out=tmp_path, progress=False)
    assert len(found.runs) == 60
    text = found.report_path.read_text(encoding="utf-8")
    assert chart_data(text)["drawn"] == 8
    assert text.count("Every channel of") == 16
    assert "<summary>All 16 layers</summary>" in text
    assert len(found.headline) <= 5
    assert len(text) < 2_000_000


def test_what_the_user_wrote_is_escaped(data, tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(norms, "_REGISTRY", {})
    compare.register("<b>'\"&", lambda c, dims: nn.Identity(), title="<i>nothing</i>", replaces_bias=False)
    evil = "</script><script>alert(1)</script>"

    def build(norm, in_shape, num_classes):
        return nn.Sequential(nn.Linear(8, num_classes), norm(num_classes))

    build.__qualname__ = evil
    named = compare.Data(evil, data.x_train, data.y_train, data.x_test, data.y_test, 3, evil)
    found = compare.run(
        "<b>'\"&", data=named, model=build, batch_size=8, steps=2, seeds=1, out=tmp_path, threads=1, progress=False
    )
    text = found.report_path.read_text(encoding="utf-8")
    assert "alert(1)" in text
    assert evil not in text
    assert "<b>'" not in text
    assert "<i>nothing" not in text
    assert chart_data(text)["labels"] == ["<b>'\"&"]


def test_a_comparison_without_layers_and_activations_has_a_page(data, tmp_path):
    found = compare.run(
        "none", data=data, model=lambda norm, shape, classes: nn.Linear(8, classes),
        steps=2, seeds=1, out=tmp_path, threads=1, progress=False,
    )  # fmt: skip
    text = found.report_path.read_text(encoding="utf-8")
    assert "No network here has a normalization layer" in text
    assert chart_data(text)["activations"] is None
    assert [path.name for path in found.figure_paths] == ["accuracy.png", "loss.png"]


def test_the_licences_of_the_libraries_are_next_to_them():
    vendor = resources.files("batchnorm") / "web" / "vendor"
    notice = (vendor / "README.md").read_text(encoding="utf-8")
    libraries = [name.removeprefix("vendor/") for name in page.SCRIPTS if name.startswith("vendor/")]
    assert len(libraries) == 2
    for file in (vendor / name for name in libraries):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in notice
        assert "</script" not in file.read_text(encoding="utf-8")
    assert {path.name for path in vendor.iterdir() if path.name.endswith("LICENSE")} == {"d3.LICENSE", "plot.LICENSE"}


def test_pictures_are_png(result):
    for path in result.figure_paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def _run(norm: str, seed: int, losses: list[float | None]) -> Run:
    run = Run(Choice(norm), seed)
    run.steps = [Step(k + 1, k + 1.0 + seed, loss) for k, loss in enumerate(losses)]
    run.evaluations = [Evaluation(k, k + float(seed), 0.5, 0.1 * k) for k in range(0, len(losses) + 1, 2)]
    return run


def _of_sizes(norm_names: tuple[str, ...], sizes: tuple[int, ...], lr: tuple[float, ...] = (0.1,)) -> Facets:
    grid = Grid(norm_names, ("before",), lr, sizes, ("iid",), (None,), ("mlp",))
    runs = [replace(_run(choice.norm, 0, [4, 2]), choice=choice) for choice in grid.choices]
    settings = Settings(grid, False, "d", None, None, 2, "constant", "sgd", 1, 0.9, None, 1, "cpu")
    return Facets.of(runs, outcomes(runs, settings, dict.fromkeys(norm_names, "norm"), 512), grid)


def test_batch_sizes_have_charts_of_their_own_if_other_settings_vary():
    facets = _of_sizes(("none", "batch"), (4, 256))
    assert (facets.titles, facets.labels, facets.drawn) == (["batches of 4", "batches of 256"], ["none", "batch"], 2)
    for size, of_series in zip((4, 256), facets.runs, strict=True):
        choices = [run.choice for runs in of_series for run in runs]
        assert [(choice.norm, choice.batch_size) for choice in choices] == [("none", size), ("batch", size)]
        assert [facets.index(choice) for choice in choices] == [0, 1]


def test_batch_sizes_alone_share_one_chart():
    facets = _of_sizes(("batch",), (4, 256))
    assert (facets.titles, facets.labels) == ([""], ["batches of 4", "batches of 256"])
    (small,), (large,) = facets.runs[0]
    ends = [curves.curve([run], curves.test_loss, 512)[-1] for run in (small, large)]
    assert [(end.step, end.epochs) for end in ends] == [(2, 2 / 128), (2, 1)]


def test_each_chart_shows_at_most_eight_series_at_first():
    facets = _of_sizes(tuple(f"batch:momentum=0.{k}" for k in range(1, 10)), (4, 256), lr=(0.1, 0.2))
    assert (len(facets.labels), facets.drawn) == (18, 8)


def test_curves_have_bands_over_the_seeds():
    runs = [_run("a", 0, [4, 2, 1, 1]), _run("a", 1, [6, 4, 3, 1])]
    first, second = curves.curve(runs, curves.train_loss, 128)
    assert (first.epochs, second.epochs) == (1, 2)  # of two steps of 64
    assert (first.step, first.mid, first.low, first.high, first.seeds) == (2, 4, 3, 5, 2)
    assert (second.step, second.seconds, second.mid) == (4, 4.5, 1.5)


def test_a_diverged_seed_leaves_the_others_curve():
    runs = [_run("a", 0, [4, 2, 1, 1]), _run("a", 1, [6, None])]
    points = curves.curve(runs, curves.train_loss, 64)
    assert [(point.step, point.mid, point.seeds) for point in points] == [(2, 4.5, 2), (4, 1, 1)]


def test_distributions_keep_their_mass_on_a_common_grid():
    runs = [_run("a", 0, [1, 1]), _run("b", 0, [1, 1])]
    runs[0].histograms = [Histogram(1, 0.0, 4.0, [10, 20, 20, 10], 0, [1, 2, 3])]
    runs[1].histograms = [Histogram(k, -1.0, 1.0, [5, 5], 0, [-0.5, 0, 0.5]) for k in (1, 3, 9)]
    found = curves.distributions({run.norm: [run] for run in runs})
    assert (found.edges[0], found.edges[-1]) == pytest.approx((-0.99, 3.97), abs=0.02)
    a, b = found.columns["a"], found.columns["b"]
    assert a[0].shares.sum() == pytest.approx(0.995, abs=0.005)
    centres = (found.edges[:-1] + found.edges[1:]) / 2
    assert (a[0].shares * centres).sum() == pytest.approx(2.0, abs=0.05)
    assert [(column.begin, column.end) for column in b] == [(1, 2), (2, 6), (6, 9)]


def test_exploding_activations_do_not_hide_the_others():
    runs = [_run("a", 0, [1, 1]), _run("b", 0, [1, 1])]
    runs[0].histograms = [Histogram(1, -1e25, 1e25, [50, 50], 0, [-1e24, 0, 1e24])]
    runs[1].histograms = [Histogram(1, -1.0, 1.0, [50, 50], 0, [-0.5, 0, 0.5])]
    found = curves.distributions({run.norm: [run] for run in runs})
    assert -12 < found.edges[0] < found.edges[-1] < 12
    assert found.columns["b"][0].shares.sum() == pytest.approx(1)


def test_only_the_first_activation_is_drawn_as_a_distribution():
    run = _run("a", 0, [1, 1])
    run.histograms = [Histogram(1, 0.0, 4.0, [10, 20], 0, [1, 2, 3], where) for where in ("first", "last")]
    run.histograms[1] = Histogram(1, 50.0, 60.0, [10, 20], 0, [51, 52, 53], "last")
    assert curves.distributions({"a": [run]}).edges[-1] < 10
    assert curves.curve([run], curves.percentile("last", 1), 64)[0].mid == 52
    assert curves.distributions({"a": [_run("a", 0, [1])]}) is None


@pytest.mark.parametrize(
    ("values", "ends"),
    [([], (0.0, 1.0)), ([2.0] * 5, (1.8, 2.2)), ([0.0] * 5, (-1.0, 1.0)), ([0.0, 1.0] * 50, (-0.1, 1.1))],
)
def test_a_linear_axis_has_a_height(values, ends):
    points = [curves.Point(step, step, step, value, value, value, 1) for step, value in enumerate(values)]
    assert figures.linear_range(points) == pytest.approx(ends)


def test_the_accuracy_axis_has_a_height_where_all_is_right():
    perfect = [curves.Point(step, step, step, 1.0, 1.0, 1.0, 2) for step in range(10)]
    assert figures.accuracy_floor(perfect) == 0.9
