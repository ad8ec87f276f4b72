"""How the learning rate changes through training."""

from __future__ import annotations

import math

import pytest
import torch

from batchnorm.compare import ComparisonError
from batchnorm.compare.inputs.learning_rate import CONSTANT, LearningRate


def course(spec: str, steps: int, lr: float = 1.0) -> list[float]:
    """The learning rates of the steps of a training."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = LearningRate.parse(spec).scheduler(optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_each_shape_has_its_course() -> None:
    assert course("constant", 3, lr=0.3) == [0.3, 0.3, 0.3]
    assert course("linear", 4) == [1, 0.75, 0.5, 0.25]
    assert course("step", 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert course("cosine", 4) == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_cosine_is_torchs_own() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    expected = []
    for _ in range(20):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert course("cosine", 20, lr=0.5) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_a_warm_up_comes_before_the_course(shape: str) -> None:
    found = course(f"{shape}:warmup=4", 12)
    assert found[:4] == [0.25, 0.5, 0.75, 1]
    assert found[4:] == course(shape, 8)


def test_steps_are_divided_where_they_are_without_a_warm_up() -> None:
    assert course("step:warmup=2", 8)[2:] == course("step", 8)[2:]


def test_what_goes_on_after_the_last_step_is_no_negative_rate() -> None:
    assert LearningRate("linear").scheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0), 2).lr_lambdas[0](5) == 0


@pytest.mark.parametrize(
    "spec",
    ["", "cosin", "cosine:", "cosine:100", "cosine:warmup=0", "cosine:warmup=-1", "cosine:warmup=2.5", "Step", 3],
)
def test_an_unknown_name_is_refused(spec: object) -> None:
    message = (
        "schedule must be constant, cosine, linear, step, or one of them .*, got .* Write for example cosine:warmup="
    )
    with pytest.raises(ComparisonError, match=message):
        LearningRate.parse(spec)  # type: ignore[arg-type]


def test_a_warm_up_ends_before_the_training_does() -> None:
    with pytest.raises(ComparisonError, match="warm-up must be shorter than training, 10 steps, got 10. Shorten it"):
        LearningRate.parse("cosine:warmup=10").check(10)
    LearningRate.parse("cosine:warmup=9").check(10)
    CONSTANT.check(1)


def test_titles_go_into_a_sentence() -> None:
    assert CONSTANT.title == "constant"
    assert LearningRate.parse("linear:warmup=5").title == "linear decay to 0, after 5 steps of warm-up"
    assert LearningRate.parse("cosine:warmup=1").title == "cosine decay to 0, after 1 step of warm-up"
