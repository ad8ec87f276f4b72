"""Groups in which an image alone says nothing, or just so much; and scores that come back in their order."""

import leakage
import pytest
import torch
from torch import nn

DIGITS = torch.arange(10).repeat(5)
IMAGES = (DIGITS.float() + 1).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) * torch.tensor([[0.0, 0.0], [0.0, 1.0]])


def drawn(count, *, cued=False):
    x, odd = leakage.Groups(IMAGES, DIGITS, cued=cued, seed=0).draw(count)
    return x.amax((1, 2, 3)).view(count, -1), odd.view(count, -1)


def test_half_of_each_group_shows_its_digit_and_the_rest_others():
    brightest, odd = drawn(50)
    digits = brightest.long() - 1
    for group, other in zip(digits, odd, strict=True):
        assert other.sum() == leakage.GROUP // 2
        assert len(group[~other].unique()) == 1
        assert group[~other][0] not in group[other]


def test_a_digit_is_as_often_odd_as_not():
    brightest, odd = drawn(4_000)
    digits = brightest.long() - 1
    for digit in range(10):
        assert odd[digits == digit].double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_best_guess_from_contrast_is_right_in_three_of_four():
    white = torch.full_like(IMAGES, 10.0) * (IMAGES > 0)
    x, odd = leakage.Groups(white, DIGITS, cued=True, seed=0).draw(2_000)
    contrast = x.amax((1, 2, 3)) / 10
    assert contrast[odd].min() >= 0.4 and contrast[odd].max() <= 0.8
    assert contrast[~odd].min() >= 0.6 and contrast[~odd].max() <= 1.0
    right = [((contrast < threshold) == odd).double().mean().item() for threshold in torch.linspace(0.4, 1, 61)]
    assert max(right) == pytest.approx(leakage.ALONE["cued"] / 100, abs=0.01)


def test_shuffled_scores_belong_to_their_images():
    x = torch.arange(12.0).view(-1, 1)
    seen = []

    class Identity(nn.Module):
        def forward(self, x):
            seen.append(x.flatten().tolist())
            return x

    found = leakage.scores(Identity(), "shuffled", x, torch.Generator().manual_seed(0))
    assert torch.equal(found, x.squeeze(1))
    assert seen[0] != found.tolist()
