"""Claims about the tests of maps: curves, areas, correlations, and the pointing game, by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from lightning_modules.attribution_tests import (
    areas,
    cascading_correlations,
    peaks,
    pointing_game,
    random_maps,
    rank_correlations,
    replacement_curves,
)

ONES, ZEROS = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)


def mean_of(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def first_pixel_of(images: Tensor) -> Tensor:
    return images[:, 0, 0, 0]


def highest_at(row: int, column: int) -> Tensor:
    """A map that falls with the distance from one pixel; no two pixels are equal."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return -((rows - row) ** 2 + (columns - column) ** 2 + 0.01 * rows + 0.001 * columns)[None]


# Deletion and insertion


def test_a_score_that_all_pixels_share_falls_along_a_line() -> None:
    curves = replacement_curves(mean_of, ONES, ZEROS, highest_at(1, 2), num_steps=4)
    assert curves.tolist() == [[1.0, 0.75, 0.5, 0.25, 0.0]]
    assert areas(curves).tolist() == [0.5]


def test_a_map_that_knows_the_one_pixel_that_counts_deletes_it_at_once() -> None:
    curves = replacement_curves(first_pixel_of, ONES, ZEROS, highest_at(0, 0), num_steps=4)
    assert curves.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert areas(curves).tolist() == [0.125]  # half of the first of four steps


def test_a_map_that_puts_it_last_deletes_it_last() -> None:
    curves = replacement_curves(first_pixel_of, ONES, ZEROS, -highest_at(0, 0), num_steps=4)
    assert curves.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0]]
    assert areas(curves).tolist() == [0.875]


def test_insertion_is_deletion_from_the_other_end() -> None:
    curves = replacement_curves(first_pixel_of, ZEROS, ONES, highest_at(0, 0), num_steps=4)
    assert curves.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]]


def test_each_image_follows_its_own_map() -> None:
    maps = torch.cat([highest_at(0, 0), -highest_at(0, 0)])
    curves = replacement_curves(
        first_pixel_of, ONES.expand(2, -1, -1, -1), ZEROS.expand(2, -1, -1, -1), maps, num_steps=2
    )
    assert curves.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def test_equal_pixels_are_not_taken_in_raster_order() -> None:
    def upper_half_of(images: Tensor) -> Tensor:
        return images[:, 0, :16].mean(dim=(1, 2))

    images = torch.ones(1, 1, 32, 32)
    flat = torch.zeros(1, 32, 32)
    curve = replacement_curves(upper_half_of, images, 0 * images, flat, num_steps=2)[0]
    # In raster order half of the pixels would be the whole upper half: 0 instead of one half.
    # 512 of 1024 drawn: the upper half has 256 with a standard deviation of 8, that is 0.016.
    assert curve[1] == pytest.approx(0.5, abs=5 * 0.016)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 10), st.integers(2, 7))
def test_curves_start_at_one_image_and_end_at_the_other(
    num_steps: int, seed: int, side_px: int
) -> None:
    maps = random_maps((2, side_px, side_px), seed=seed)
    start, end = torch.full((2, 1, side_px, side_px), 0.25), torch.full((2, 1, side_px, side_px), 1)
    curves = replacement_curves(mean_of, start, end.float(), maps, num_steps=num_steps)
    assert curves.shape == (2, num_steps + 1)
    assert curves[:, 0].tolist() == [0.25, 0.25]
    assert curves[:, -1].tolist() == [1.0, 1.0]


def test_random_maps_depend_on_the_seed_alone() -> None:
    first = random_maps((3, 2, 2), seed=1)
    torch.rand(5)
    assert torch.equal(first, random_maps((3, 2, 2), seed=1))
    assert not torch.equal(first, random_maps((3, 2, 2), seed=2))


# Forgotten weights


class Chain(nn.Module):
    """Three layers of which the maps are the product of their weights with the image."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("first", "second", "head"):
            layer = nn.Linear(16, 16, bias=False)
            layer.weight.data = torch.randn(16, 16, generator=generator)
            self.add_module(name, layer)


STEPS = {
    "head": lambda chain: [chain.head],
    "others": lambda chain: [chain.second, chain.first],
}

IMAGES = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))


def maps_of(network: Chain) -> Tensor:
    with torch.no_grad():
        values = IMAGES
        for name in ("first", "second", "head"):
            values = network.get_submodule(name)(values)
    return values.reshape(4, 4, 4)


def test_the_same_weights_give_a_correlation_of_one_at_every_step() -> None:
    found = cascading_correlations(Chain(0), Chain(0), STEPS, maps_of)
    assert list(found) == ["head", "others"]
    for values in found.values():
        assert values == pytest.approx(np.ones(4))


def test_weights_stay_forgotten_and_the_trained_network_as_it_is() -> None:
    trained, untrained = Chain(0), Chain(1)
    found = cascading_correlations(trained, untrained, STEPS, maps_of)
    # At the end nothing trained is left.
    of_untrained = rank_correlations(maps_of(trained).numpy(), maps_of(untrained).numpy())
    assert found["others"] == pytest.approx(of_untrained)
    assert not np.allclose(found["others"], 1)
    assert torch.equal(maps_of(trained), maps_of(Chain(0)))


def test_a_map_that_ignores_weights_is_found_out() -> None:
    found = cascading_correlations(
        Chain(0), Chain(1), STEPS, lambda network: IMAGES.reshape(4, 4, 4)
    )
    assert found["head"] == pytest.approx(np.ones(4))


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_rank_correlations_are_scipys_ties_included(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 4, (2, 3, 4, 5)).astype(float)
    expected = [
        stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)
    ]
    assert rank_correlations(first, second) == pytest.approx(np.array(expected))


def test_a_flat_map_correlates_with_nothing() -> None:
    flat, slope = np.zeros((1, 2, 2)), np.arange(4.0).reshape(1, 2, 2)
    assert np.isnan(rank_correlations(flat, slope)).all()
    assert np.isnan(rank_correlations(flat, flat)).all()
    assert rank_correlations(slope, -slope) == pytest.approx([-1])


# Pointing game


def test_the_peak_is_the_centre_of_the_highest_cell() -> None:
    maps = np.zeros((2, 2, 2))
    maps[0, 0, 1] = maps[1, 1, 0] = 3
    # Cells of 4 px: pixels 0 to 3 with their centre at 1.5, and 4 to 7 with theirs at 5.5.
    assert peaks(maps, 8).tolist() == [[1.5, 5.5], [5.5, 1.5]]


def test_of_several_highest_cells_the_peak_is_the_mean() -> None:
    maps = np.zeros((1, 4, 4))
    maps[0, 1:3, 2:4] = 1
    assert peaks(maps, 4).tolist() == [[1.5, 2.5]]


def test_a_flat_map_points_nowhere_and_misses() -> None:
    points = peaks(np.ones((1, 4, 4)), 4)
    assert np.isnan(points).all()
    game = pointing_game(points, np.ones((1, 4, 4), bool))
    assert (game.num_hits, game.share) == (0, 0)


def test_the_pointing_game_by_hand() -> None:
    masks = np.zeros((3, 4, 4), bool)
    masks[0, :2, :2] = True  # 4 of 16 pixels
    masks[1, 2:, 2:] = True  # 4
    masks[2, 0, :] = True  # 4
    points = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 3.0]])  # hit, miss, hit
    game = pointing_game(points, masks)
    assert (game.num_images, game.num_hits) == (3, 2)
    assert game.share == pytest.approx(2 / 3)
    assert game.random_point == pytest.approx(4 / 16)
    # Elsewhere: (1, 1) lies in no other mask, (0, 0) in the first and the third, (0, 3) in none.
    assert game.other_lesion == pytest.approx(2 / 6)
    # Wilson: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), with z = 1.95996.
    z, n, p = 1.959964, 3, 2 / 3
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert game.interval == pytest.approx((low, high))


def test_one_image_has_no_other_lesion() -> None:
    game = pointing_game(np.array([[0.0, 0.0]]), np.ones((1, 4, 4), bool))
    assert game.share == 1
    assert math.isnan(game.other_lesion)


def test_points_between_pixels_belong_to_the_nearer_one() -> None:
    mask = np.zeros((1, 4, 4), bool)
    mask[0, 2, 2] = True
    for point, is_hit in (([1.5, 1.5], 1), ([2.4, 2.4], 1), ([1.4, 2.0], 0), ([2.5, 2.0], 0)):
        assert pointing_game(np.array([point]), mask).num_hits == is_hit
