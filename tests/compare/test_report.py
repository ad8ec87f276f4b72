from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from torch import nn

from batchnorm import compare
from batchnorm.compare import curves, figures, norms, report
from batchnorm.compare.records import Evaluation, Histogram, Run, Step

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
    drawn = {(a.get("data-curve"), a.get("data-x")) for a in places if a["data-chart"] == "curve"}
    assert drawn == {(c, x) for c in ("accuracy", "test_loss", "train_loss") for x in ("step", "seconds")}
    assert [a["data-norm"] for a in places if a["data-chart"] == "activations"] == ["none", "batch"]
    cells = "".join(page.data["th"])
    for word in ("γ", "β", "running mean", "running variance", "norm1", "norm2"):
        assert word in cells


def test_the_charts_show_what_was_recorded(result, html):
    charts = chart_data(html)
    assert charts["norms"] == ["none", "batch"]
    last = charts["curves"]["accuracy"]["series"][1][-1]
    finals = [100 * run.evaluations[-1].test_accuracy for run in result.runs if run.norm == "batch"]
    assert last["step"] == 12
    assert last["seeds"] == 2
    assert (last["low"], last["high"]) == pytest.approx((min(finals), max(finals)), rel=1e-4)
    assert last["mid"] == pytest.approx(np.mean(finals), rel=1e-4)
    for panel in charts["activations"]["panels"].values():
        assert [column["step"] for column in panel] == [1, 5, 10, 12]
        assert all(0.9 < sum(column["shares"]) <= 1.0001 for column in panel)


def test_what_the_user_wrote_is_escaped(data, tmp_path, monkeypatch):
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
    assert chart_data(text)["norms"] == ["<b>'\"&"]


def test_a_comparison_without_layers_and_activations_has_a_page(data, tmp_path):
    found = compare.run(
        "none", data=data, model=lambda norm, shape, classes: nn.Linear(8, classes),
        steps=2, seeds=1, out=tmp_path, threads=1, progress=False,
    )  # fmt: skip
    text = found.report_path.read_text(encoding="utf-8")
    assert "No network here has a normalization layer" in text
    assert chart_data(text)["activations"] is None
    assert [path.name for path in found.figure_paths] == ["accuracy.png", "loss.png"]


def test_the_libraries_are_the_ones_whose_licences_lie_beside():
    vendor = resources.files("batchnorm.compare") / "web" / "vendor"
    notice = (vendor / "README.md").read_text(encoding="utf-8")
    for name in report.LIBRARIES:
        file = vendor / name.removeprefix("vendor/")
        assert hashlib.sha256(file.read_bytes()).hexdigest() in notice
        assert "</script" not in file.read_text(encoding="utf-8")
    assert {path.name for path in vendor.iterdir() if path.name.endswith("LICENSE")} == {"d3.LICENSE", "plot.LICENSE"}


def test_pictures_are_png(result):
    for path in result.figure_paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def _run(norm: str, seed: int, losses: list[float | None]) -> Run:
    run = Run(norm, seed, 1, None, [], [])
    run.steps = [Step(k + 1, k + 1.0 + seed, loss) for k, loss in enumerate(losses)]
    run.evaluations = [Evaluation(k, k + float(seed), 0.5, 0.1 * k) for k in range(0, len(losses) + 1, 2)]
    return run


def test_curves_have_bands_over_the_seeds():
    runs = [_run("a", 0, [4, 2, 1, 1]), _run("a", 1, [6, 4, 3, 1])]
    first, second = curves.curve(runs, curves.train_loss)
    assert (first.step, first.mid, first.low, first.high, first.seeds) == (2, 4, 3, 5, 2)
    assert (second.step, second.seconds, second.mid) == (4, 4.5, 1.5)


def test_a_diverged_seed_leaves_the_others_curve():
    runs = [_run("a", 0, [4, 2, 1, 1]), _run("a", 1, [6, None])]
    points = curves.curve(runs, curves.train_loss)
    assert [(point.step, point.mid, point.seeds) for point in points] == [(2, 4.5, 2), (4, 1, 1)]


def test_distributions_keep_their_mass_on_a_common_grid():
    runs = [_run("a", 0, [1, 1]), _run("b", 0, [1, 1])]
    runs[0].histograms = [Histogram(1, 0.0, 4.0, [10, 20, 20, 10], 0, [1, 2, 3])]
    runs[1].histograms = [Histogram(k, -1.0, 1.0, [5, 5], 0, [-0.5, 0, 0.5]) for k in (1, 3, 9)]
    found = curves.distributions(runs)
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
    found = curves.distributions(runs)
    assert -12 < found.edges[0] < found.edges[-1] < 12
    assert found.columns["b"][0].shares.sum() == pytest.approx(1)


def test_the_accuracy_axis_has_a_height_where_all_is_right():
    perfect = [curves.Point(step, step, 1.0, 1.0, 1.0, 2) for step in range(10)]
    assert figures.accuracy_floor(perfect) == 0.9
