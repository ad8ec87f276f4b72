"""The deviation of one sample's normalized activation, against theory where theory knows it."""

import noise
import pytest
import torch


def measured(values, size, *, replace=True):
    found = noise.noise(
        values, size, watched=16, draws=400, replace=replace, generator=torch.Generator().manual_seed(1)
    )
    return found.square().mean().sqrt().item()


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [64, 256])
def test_independent_gaussian_values_deviate_as_theory_says(size):
    values = gaussian(4096, 64, 1)
    normal = values[:16].square().mean().item()
    assert measured(values, size) == pytest.approx(((1 + normal / 2) / size) ** 0.5, rel=0.02)


def test_without_replacement_it_falls_by_the_share_that_is_left():
    values = gaussian(1024 + 16, 64, 1)
    ratio = measured(values, 512, replace=False) / measured(values, 512)
    assert ratio == pytest.approx(0.5**0.5, rel=0.03)


def test_equal_pixels_count_as_one_and_independent_ones_each():
    one = gaussian(1024, 32, 1)
    once = measured(one, 64)
    assert measured(one.expand(-1, -1, 50), 64) == pytest.approx(once, rel=1e-6)
    many = gaussian(1024, 32, 50)
    normal = many[:16, :, :: noise.PIXEL_STEP].square().mean().item()
    assert measured(many, 64) == pytest.approx(((1 + normal / 2) / (64 * 50)) ** 0.5, rel=0.03)


def test_a_batch_of_several_is_the_brute_force_one():
    values = gaussian(20, 3, 2)
    generator = torch.Generator().manual_seed(5)
    found = noise.noise(values, 4, watched=2, draws=7, replace=True, generator=generator)
    index = torch.randint(18, (7, 3), generator=torch.Generator().manual_seed(5)) + 2
    for sample in range(2):
        batches = [torch.cat([values[sample : sample + 1], values[row]]) for row in index]
        normal = torch.stack([(b[0, :, 0] - b.mean((0, 2))) / b.var((0, 2), unbiased=False).sqrt() for b in batches])
        torch.testing.assert_close(found[sample, :, 0], normal.std(0))
