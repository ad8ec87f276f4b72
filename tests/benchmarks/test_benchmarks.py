"""The counts, checks and verdicts of the benchmarks, on tiny cases. No test measures time."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from benchmarks.measuring import records
from benchmarks.measuring.options import Options
from benchmarks.measuring.timing import alternate, shortest
from benchmarks.reports import report, targets
from benchmarks.reports.markdown import markdown
from benchmarks.sections import flax_layer, frameworks, layers, memory
from benchmarks.subjects import cases
from benchmarks.subjects.cases import STEP, TASKS, Case, make_data
from benchmarks.subjects.peers import CONTENDERS, OURS, TORCH, Contender

SHAPES = ((4, 3, 5, 5), (16, 3), (2, 3, 4, 3, 2))


@pytest.fixture
def options(tmp_path):
    return Options(tmp_path, quick=True, seconds=0.001, threads=1, only="", allocator="default")


def test_floor_of_a_training_step_is_two_and_a_half_copies():
    assert TASKS[STEP].traffic == 5
    assert TASKS["BN+ReLU forward"].traffic == 2
    assert TASKS["BN+add+ReLU inference"].traffic == 3


@pytest.mark.parametrize("shape", SHAPES, ids=cases.shape_text)
@pytest.mark.parametrize("task", TASKS)
def test_ours_and_torch_agree_with_the_reference(shape, task):
    contenders = [c for c in CONTENDERS if c.name in (OURS, TORCH)]
    for layout in cases.layouts_of(shape):
        case = Case(shape, layout, "float32", task)
        data = make_data(case)
        for contender in contenders:
            call = contender.build(case, data)
            found = cases.errors(case, data, contender.as_torch(case, call()))
            assert max(found.values()) < 1e-5, (contender.name, found)


def test_reference_is_torchs_in_float64():
    data = make_data(Case((6, 3, 4, 4), "contiguous", "float32", STEP))
    x = data.x.double().requires_grad_()
    y = torch.relu(torch.nn.functional.batch_norm(x, None, None, data.weight.double(), data.bias.double(), True))
    (dx,) = torch.autograd.grad(y, x, data.dy.double())
    torch.testing.assert_close(data.reference["y"], y.detach())
    torch.testing.assert_close(data.reference["dx"], dx)


def test_a_contender_that_is_wrong_is_not_reported(monkeypatch, capsys, options):
    def shifted(case, data):
        call = CONTENDERS[0].build(case, data)
        return lambda: tuple(t + 1e-3 for t in call())

    wrong = Contender("wrong", shifted, CONTENDERS[0].as_torch)
    monkeypatch.setattr(layers, "CONTENDERS", (CONTENDERS[0], wrong))
    rows = layers.measure(Case((16, 3), "contiguous", "float32", STEP), options)
    assert {"wrong"}.isdisjoint(r["contender"] for r in rows)
    assert OURS in {r["contender"] for r in rows}
    assert "not reported: wrong is wrong in" in capsys.readouterr().out


def test_alternate_times_everyone_equally_often():
    calls = []
    times = alternate({n: lambda n=n: calls.append(n) for n in "abc"}, 0.0, least=3)
    assert {len(t.seconds) for t in times.values()} == {9}
    assert set(calls) == set("abc")


def test_table_is_partial_until_finished_and_resumes(tmp_path):
    table = records.Table(tmp_path / "t.csv", ("what",))
    table.append([{"what": "a", "ms": 1.5}])
    assert not table.path.exists()
    assert records.Table(tmp_path / "t.csv", ("what",)).measured() == {("a",)}
    table.append([{"what": "b", "ms": 2.5}])
    table.finish()
    assert [r["ms"] for r in records.read(table.path)] == ["1.5", "2.5"]
    assert not table.partial.exists()


def test_a_new_table_replaces_the_former_one_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text("before\n\n| 1 |\n\nafter\n")
    table = tmp_path / "summary.md"
    table.write_text("| 1 |\n")
    report._quote_in_readme(table, "| 2 |\n")
    report._quote_in_readme(tmp_path / "absent.md", "| 3 |\n")
    assert report.README.read_text() == "before\n\n| 2 |\n\nafter\n"


def test_autograd_keeps_x_and_vectors():
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    ours = memory._contenders("BN+ReLU", 4)
    nbytes = x.numel() * 4
    assert memory.kept(lambda: ours["batchnorm"](x, x)) < 1.1 * nbytes
    assert memory.kept(lambda: ours["torch"](x, x)) > 1.9 * nbytes


def step_rows(ours_ms: float, torch_ms: float, floor_ms: float) -> list[records.Row]:
    common = {"allocator": "kept", "dtype": "float32", "layout": "contiguous", "task": STEP, "bytes": str(1 << 30)}
    common |= {"cache_bytes": str(1 << 25), "floor_ms": str(floor_ms)}
    return [
        {**common, "shape": shape, "contender": name, "p50_ms": str(ms), "share_of_floor": str(floor_ms / ms)}
        for shape in targets.LARGE
        for name, ms in ((OURS, ours_ms), (TORCH, torch_ms))
    ]


@pytest.mark.parametrize(
    ("ours", "torchs", "met"), [(10, 50, True), (10, 40, False), (10, 44.9, False), (10, 45.1, True)]
)
def test_target_against_torch_is_judged_by_its_number(ours, torchs, met):
    verdicts = targets.layer_verdicts(step_rows(ours, torchs, 8), "kept")
    (verdict,) = [v for v in verdicts if v.what == "training step of BN + ReLU, contiguous float32, against torch"]
    assert verdict.met is met
    assert dataclasses.asdict(verdict)["measured"].startswith(f"geometric mean {torchs / ours:.2f}×")


def test_what_was_not_measured_is_not_judged():
    verdicts = targets.layer_verdicts(step_rows(10, 50, 8), "default")
    assert {v.met for v in verdicts} == {None}


def test_markdown_is_a_table():
    assert markdown(("a", "b"), [("x|y", "1")]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"


def test_shortest_times_are_of_calls_in_turns():
    calls = []
    times = shortest({name: partial(calls.append, name) for name in "ab"}, seconds=0.0)
    assert calls == ["a", "b"] * 4  # the first untimed
    assert all(0.0 <= ms < float("inf") for name in "ab" for ms in times[name].values())


def test_flax_is_compared_by_both_times():
    rows = [
        {"shape": "2×3", "axis": "1", "contender": contender, "cpu_ms": cpu, "elapsed_ms": elapsed}
        for contender, cpu, elapsed in ((OURS, 2.0, 1.0), (flax_layer.FLAX, 8.0, 3.0))
    ]
    assert report.flax_markdown(rows).splitlines()[-1] == "| 2×3 | 1 | 2 | 8 | 4.0× | 1 | 3 | 3.0× |"


def test_frameworks_are_compared_row_by_row():
    places = [("Flax", "1000000"), ("Flax", "0"), ("Keras on jax", "0")]
    rows = [
        {"framework": framework, "offset": offset, "contender": contender, "error_y": error, "error_dx": 2 * error}
        for framework, offset in places
        for contender, error in ((frameworks.STOCK, 0.5), (OURS, 1e-7))
    ]
    _, _, *body = report.frameworks_markdown(rows).splitlines()
    assert [line.split(" | ")[:2] for line in body] == [
        ["| Flax", "0 σ"],
        ["| Flax", "1e+06 σ"],
        ["| Keras on jax", "0 σ"],
    ]
    assert all(line.endswith("| 1.0e-07 | 5.0e-01 | 2.0e-07 | 1.0e+00 |") for line in body)
