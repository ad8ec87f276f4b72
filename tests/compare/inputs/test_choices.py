from __future__ import annotations

import pytest

from batchnorm.compare import Choice, ComparisonError, Grid
from batchnorm.compare.report.headline import percent
from batchnorm.compare.report.heatmap import panels
from tests.compare.report.test_summary import ending


def grid(**values) -> Grid:
    plain = {
        "norm": ("none", "batch"),
        "placement": ("before",),
        "lr": (0.1,),
        "batch_size": (64,),
        "sampling": ("iid",),
        "dropout": (None,),
        "model": ("mlp",),
    }
    return Grid(**{**plain, **values})


def test_every_combination_is_a_choice_and_the_first_norm_comes_first():
    found = grid(lr=(0.1, 1.0), batch_size=(8, 64)).choices
    assert len(found) == 8 == len(set(found))
    assert [choice.norm for choice in found] == ["none"] * 4 + ["batch"] * 4
    assert found[1] == Choice("none", "before", 0.1, 64, "iid")


def test_nothing_is_placed_where_there_is_no_normalization():
    found = grid(placement=("after", "before")).choices
    assert [(choice.norm, choice.placement) for choice in found] == [
        ("none", "after"), ("batch", "after"), ("batch", "before"),
    ]  # fmt: skip


def test_labels_name_only_what_varies():
    choice = Choice("batch", "after", 0.5, 8, "classes:2")
    assert grid().label(Choice("batch")) == "batch"
    assert grid(norm=("batch",)).label(Choice("batch")) == "batch"
    assert grid(norm=("batch",), lr=(0.1, 0.5)).label(choice) == "lr 0.5"
    whole = grid(placement=("before", "after"), lr=(0.1, 0.5), batch_size=(8, 64), sampling=("iid", "classes:2"))
    assert whole.label(choice) == "batch, after activation, lr 0.5, batches of 8, classes:2"
    assert whole.label(Choice("none", "before", 0.5, 8, "iid")) == "none, lr 0.5, batches of 8, iid"
    assert whole.title(choice, "batch normalization") == (
        "batch normalization after the activation at learning rate 0.5 with batches of 8 under classes:2 sampling"
    )
    assert len({whole.label(choice) for choice in whole.choices}) == len(whole.choices)


def test_files_are_named_after_the_whole_choice():
    assert Choice("renorm:rmax=3,dmax=5", lr=1e-3).file_stem == "mlp-renorm-rmax=3-dmax=5-before-lr0.001-batch64-iid"
    many = grid(
        placement=("before", "after"), lr=(0.1, 0.12), batch_size=(8, 64), sampling=("iid", "classes:2")
    ).choices
    assert len({choice.file_stem for choice in many}) == len(many)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"placement": ("over",)}, r"placement must be among before, after, got 'over'"),
        ({"norm": ("batch:x", "batch x")}, "choices must differ in letters and digits"),
        ({"lr": (0.1, 0.1 + 1e-12)}, "choices must differ in letters and digits"),
    ],
)
def test_choices_with_the_same_file_name_are_refused(values, message):
    with pytest.raises(ComparisonError, match=message):
        grid(**values)


def test_a_grid_of_rates_has_one_panel_of_norms_by_rates():
    whole = grid(lr=(0.1, 1.0))
    found = [ending(norm, 0.5, lr=lr, grid=whole) for norm in whole.norm for lr in whole.lr]
    found[1] = ending("none", 0.5, lr=1.0, grid=whole, diverged=(0,))
    (panel,) = panels(found, whole)
    assert (panel.x, panel.rows, panel.columns) == ("learning rate", ["none", "batch"], ["0.1", "1"])
    lost = next(square for square in panel.squares if square.label == "none, lr 1")
    assert (lost.row, lost.column, lost.accuracy, lost.diverged) == ("none", "1", None, 1)
    assert panels(found, grid()) == []


def test_accuracies_are_rounded_as_in_the_table():
    whole = grid(lr=(0.1, 1.0))
    (panel,) = panels([ending("batch", value, lr=0.1, grid=whole) for value in (0.8725, 0.8735)], whole)
    assert [f"{square.text} %" for square in panel.squares] == [percent(0.8725), percent(0.8735)]


def test_a_grid_of_rates_and_sizes_has_a_panel_for_each_norm():
    whole = grid(lr=(0.1, 1.0), batch_size=(32, 64))
    found = [ending(norm, 0.5, lr=lr, grid=whole) for norm in whole.norm for lr in whole.lr]
    first, second = panels(found, whole)
    assert (first.title, second.title) == ("none", "batch")
    assert (first.x, first.y, first.rows) == ("learning rate", "batch size", ["64"])
