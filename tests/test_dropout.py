"""What the head's dropout keeps: the right share, at random, and a function of its seed alone."""

import numpy as np
import pytest
import torch

from lightning_modules.dropout import dropout_factors

CPU = torch.zeros(1)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_right_share_is_kept_and_the_mean_stays(p: float) -> None:
    kept = dropout_factors(400, 1280, p=p, seed=3, like=CPU)
    assert kept.shape == (400, 1280)
    assert kept.dtype == torch.float32
    # Half a 65,536th off at most, which is what p is rounded to.
    expected = [1 / (1 - p)] if p == 0 else [0.0, 1 / (1 - p)]
    assert kept.unique().tolist() == pytest.approx(expected, rel=1e-3)
    standard_error = np.sqrt(p * (1 - p) / kept.numel())
    assert float((kept == 0).float().mean()) == pytest.approx(p, abs=5 * standard_error + 1e-5)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)


def test_it_is_drawn_from_the_seed_alone() -> None:
    first = dropout_factors(32, 1280, p=0.3, seed=7, like=CPU)
    torch.rand(5)
    assert torch.equal(dropout_factors(32, 1280, p=0.3, seed=7, like=CPU), first)
    state = torch.get_rng_state()
    assert not torch.equal(dropout_factors(32, 1280, p=0.3, seed=8, like=CPU), first)
    assert torch.equal(torch.get_rng_state(), state), "nobody else draws something else for it"


def test_features_and_images_are_kept_independently_of_each_other() -> None:
    kept = (dropout_factors(2000, 64, p=0.5, seed=1, like=CPU) != 0).double()
    correlations = torch.corrcoef(kept.T).fill_diagonal_(0.0).abs()
    # 2,016 pairs of 2,000 fair coins: the largest of so many is 3.6 standard errors off or so.
    assert float(correlations.max()) < 5 / np.sqrt(2000)
    between_images = torch.corrcoef(kept[:64]).fill_diagonal_(0.0).abs()
    assert float(between_images.max()) < 5 / np.sqrt(64)


def test_a_probability_is_rounded_to_what_sixteen_bits_can_tell() -> None:
    kept = dropout_factors(8, 8, p=1 / 3, seed=0, like=CPU)
    # round(65536 / 3) = 21845 values are dropped, and 43691 kept.
    assert float(kept.max()) == pytest.approx(65536 / 43691, rel=1e-7)
    assert float(dropout_factors(8, 8, p=1e-9, seed=0, like=CPU).min()) == 1.0


def test_half_precision_is_kept_as_it_is() -> None:
    assert dropout_factors(2, 2, p=0.5, seed=0, like=CPU.bfloat16()).dtype == torch.bfloat16
