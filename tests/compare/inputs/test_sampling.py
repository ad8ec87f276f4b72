"""How batches are drawn: independently, or from a few classes each."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from batchnorm.compare import ComparisonError
from batchnorm.compare.inputs.sampling import Sampling

LABELS = torch.tensor([0, 1, 2, 3] * 6 + [0] * 36)


def drawn(spec: str, labels: Tensor, batch_size: int, seed: int, count: int) -> list[Tensor]:
    return list(islice(Sampling.parse(spec).batches(labels, batch_size, seed), count))


@pytest.mark.parametrize("spec", ["iid", "classes:2"])
def test_the_seed_alone_decides_the_data_order(spec: str) -> None:
    torch.manual_seed(1)
    first = torch.stack(drawn(spec, LABELS, 4, 3, 20))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(torch.stack(drawn(spec, LABELS, 4, 3, 20)), first)
    assert not torch.equal(torch.stack(drawn(spec, LABELS, 4, 4, 20)), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_independent_batches_take_every_sample_once_in_an_epoch() -> None:
    batches = drawn("iid", torch.zeros(10), 4, 0, 4)
    assert [len(batch) for batch in batches] == [4] * 4
    for epoch in (batches[:2], batches[2:]):
        assert len({int(index) for batch in epoch for index in batch}) == 8


@pytest.mark.parametrize(("classes", "size"), [(1, 5), (2, 2), (2, 5), (3, 8), (4, 8)])
def test_each_batch_comes_from_so_many_classes_in_equal_parts(classes: int, size: int) -> None:
    for batch in drawn(f"classes:{classes}", LABELS, size, 0, 50):
        counts = LABELS[batch].bincount(minlength=4)
        assert len(batch) == size
        assert int((counts > 0).sum()) == classes
        assert int(counts.max() - counts[counts > 0].min()) <= 1


def test_the_classes_of_a_batch_are_mixed() -> None:
    """Ghost batches and several processes take their part of it in order."""
    halves = [LABELS[batch][:8].unique().numel() for batch in drawn("classes:2", LABELS, 16, 0, 50)]
    assert sum(halves) == 100


def test_every_sample_is_taken_before_one_is_taken_again() -> None:
    labels = torch.arange(40) % 4
    taken: dict[int, list[int]] = {label: [] for label in range(4)}
    for batch in drawn("classes:2", labels, 6, 0, 100):
        for index in sorted(batch.tolist(), key=lambda index: int(labels[index])):
            taken[int(labels[index])].append(index)
    for order in taken.values():
        counts = torch.tensor(order).bincount()
        assert int(counts.max() - counts[counts > 0].min()) <= 1
        assert (counts > 0).sum() == 10


def test_classes_are_drawn_in_proportion_to_their_samples() -> None:
    """42 of 60 samples are of class 0: a mean of 0.7 whose standard error over 2,000 draws is 0.010."""
    batches = torch.stack(drawn("classes:1", LABELS, 2, 0, 2000))
    assert (LABELS[batches] == 0).double().mean().item() == pytest.approx(0.7, abs=0.04)


@pytest.mark.parametrize(
    "spec", ["", "iid:2", "classes", "classes:", "classes:0", "classes:-1", "classes:2.0", "class:2"]
)
def test_an_unknown_name_is_refused(spec: str) -> None:
    with pytest.raises(ComparisonError, match="sampling must be iid or classes:K with a positive integer K, got "):
        Sampling.parse(spec)


def test_more_classes_than_there_are_or_fit_are_refused() -> None:
    with pytest.raises(ComparisonError, match=r"classes in the training data, 4, got classes:5\. Choose fewer"):
        Sampling.parse("classes:5").check(LABELS, 8)
    with pytest.raises(ComparisonError, match="samples in a batch, 2, got classes:3"):
        Sampling.parse("classes:3").check(LABELS, 2)
    Sampling.parse("classes:4").check(LABELS, 4)
    Sampling.parse("iid").check(LABELS, 1)
