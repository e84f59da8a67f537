"""A view is a pure function of (settings, strength, seed, epoch, sample), and equals Kornia's."""

from typing import Any

import kornia.augmentation as K
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.augmentation import Views, _mix
from lightning_modules.augmentation_settings import AugmentationSettings
from lightning_modules.errors import InputError

SIDE_PX = 40


def make_views(strength: float = 1.0, seed: int = 7, **ranges: float) -> Views:
    return Views(
        AugmentationSettings(**ranges), strength=strength, seed=seed, image_size_px=SIDE_PX
    )


def make_images(num_images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, 1, SIDE_PX, SIDE_PX)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def off(**ranges: float) -> dict[str, float]:
    """Every range 0 but the given ones."""
    names = AugmentationSettings.__dataclass_fields__
    return {name: ranges.get(name, 0.0) for name in names}


def test_mix_is_splitmix64() -> None:
    # The first three outputs of SplitMix64 with seed 1234567 (Vigna's reference implementation).
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    state = torch.tensor([1234567]) + torch.tensor([1, 2, 3]) * golden
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(value) % (1 << 64) for value in _mix(state)] == expected


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_view_does_not_depend_on_its_batch(data: st.DataObject) -> None:
    num_images = 23
    images, views = make_images(num_images), make_views(strength=1.3)
    samples = torch.arange(num_images) * 1_000_003
    epoch = data.draw(st.integers(0, 1000))
    whole = views(images, epoch=epoch, samples=samples)
    order = data.draw(st.lists(st.integers(0, num_images - 1), min_size=1, max_size=40))
    part = views(images[order], epoch=epoch, samples=samples[order])
    assert torch.equal(part, whole[order])


@settings(max_examples=10, deadline=None)
@given(num_samples=st.integers(1, 60), epochs=st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_an_epoch_prepared_at_once_gives_the_same_views(
    num_samples: int, epochs: list[int]
) -> None:
    images, samples = make_images(num_samples), torch.arange(num_samples).flip(0)
    at_once, by_batch = make_views(strength=1.3), make_views(strength=1.3)
    at_once.num_samples = num_samples
    for epoch in epochs:
        for part in samples.split(7):
            views = at_once(images[part], epoch=epoch, samples=part)
            assert torch.equal(views, by_batch(images[part], epoch=epoch, samples=part))


def test_an_epoch_prepared_at_once_leaves_a_sixth_of_its_operations_to_steps() -> None:
    class Count(TorchDispatchMode):
        num_launched = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.num_launched += not func.is_view
            return func(*args, **(kwargs or {}))

    def launched(views: Views) -> int:
        with Count() as count:
            views(images, epoch=0, samples=torch.arange(8))
        return count.num_launched

    images, views = make_images(8), make_views()
    whole = launched(views)
    views.num_samples = 100
    views(images, epoch=0, samples=torch.arange(8))
    assert launched(views) * 6 < whole


def test_a_view_depends_on_seed_epoch_and_sample() -> None:
    image = make_images(1)
    view = make_views()(image, epoch=0, samples=torch.tensor([3]))
    assert not torch.equal(view, make_views()(image, epoch=1, samples=torch.tensor([3])))
    assert not torch.equal(view, make_views()(image, epoch=0, samples=torch.tensor([4])))
    assert not torch.equal(view, make_views(seed=8)(image, epoch=0, samples=torch.tensor([3])))


def test_views_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make_views()(make_images(4), epoch=0, samples=torch.arange(4))
    assert torch.equal(before, torch.get_rng_state())


def test_strength_zero_returns_the_image() -> None:
    images = make_images(5)
    views = make_views(strength=0.0)(images, epoch=2, samples=torch.arange(5))
    assert torch.equal(views, images.float() / 255)


def test_draws_are_uniform_and_uncorrelated() -> None:
    uniform = make_views()._uniform(0, torch.arange(20_000))
    # The mean of 20,000 uniform numbers has a standard deviation of 0.00204; five of them.
    assert (uniform.mean(0) - 0.5).abs().max() < 0.0103
    assert (uniform.var(0) - 1 / 12).abs().max() < 0.004
    correlation = torch.corrcoef(uniform.T) - torch.eye(uniform.shape[1])
    assert correlation.abs().max() < 0.036


def test_views_stay_in_range_and_keep_shape() -> None:
    views = make_views(strength=4.0)(make_images(64), epoch=0, samples=torch.arange(64))
    assert views.shape == (64, 1, SIDE_PX, SIDE_PX)
    assert views.dtype == torch.float32
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1


@pytest.mark.gpu
def test_views_on_a_gpu_are_those_on_a_cpu_to_rounding(device: str) -> None:
    images, samples = make_images(64), torch.arange(64)
    here = make_views()(images, epoch=3, samples=samples)
    views = make_views().to(device)
    for views.num_samples in (None, 64):
        there = views(images.to(device), epoch=3, samples=samples.to(device))
        assert torch.allclose(there.cpu(), here, atol=1e-4)


def test_flip_is_exact() -> None:
    images = make_images(3)
    views = make_views(**off(flip_probability=1.0))(images, epoch=0, samples=torch.arange(3))
    # Exact up to the sampling position's rounding, a millionth of a pixel.
    torch.testing.assert_close(views, images.flip(3).float() / 255, atol=2e-5, rtol=0)


def test_brightness_and_contrast_on_a_constant_image() -> None:
    views = make_views(**off(brightness=0.2, contrast=0.5))
    images = torch.full((6, 1, SIDE_PX, SIDE_PX), 102, dtype=torch.uint8)  # 0.4
    params = views.draw(epoch=0, samples=torch.arange(6))
    expected = ((0.4 + params.brightness) * params.contrast).clamp(0, 1)
    out = views(images, epoch=0, samples=torch.arange(6))
    # The rim is left out: there bilinear sampling may read black by a rounding error.
    inner = out[:, 0, 1:-1, 1:-1]
    torch.testing.assert_close(inner.mean((1, 2)), expected.float(), atol=1e-6, rtol=0)
    assert float(inner.var((1, 2)).max()) < 1e-10


def test_noise_has_the_drawn_standard_deviation() -> None:
    views = make_views(**off(noise=0.05))
    images = torch.full((40, 1, SIDE_PX, SIDE_PX), 128, dtype=torch.uint8)
    noise = views(images, epoch=0, samples=torch.arange(40)) - 128 / 255
    drawn = views.draw(epoch=0, samples=torch.arange(40)).noise_std
    measured = noise[:, 0, 1:-1, 1:-1].std((1, 2))
    assert float(drawn.max()) <= 0.05
    # 1,444 pixels: the relative error of a standard deviation is 1.9 %; five of them.
    assert float(((measured - drawn) / drawn.clamp(min=1e-3)).abs().max()) < 0.1


def test_erasing_blanks_one_rectangle_of_the_drawn_size() -> None:
    views = make_views(**off(erasing_probability=1.0, erasing_area=0.2))
    images = torch.full((30, 1, SIDE_PX, SIDE_PX), 255, dtype=torch.uint8)
    out = views(images, epoch=0, samples=torch.arange(30))
    boxes = views.draw(epoch=0, samples=torch.arange(30)).box_px
    for image, (x, y, width, height) in zip(out, boxes.tolist(), strict=True):
        assert 0 < width * height <= 0.2 * SIDE_PX**2
        assert x + width <= SIDE_PX
        assert y + height <= SIDE_PX
        assert float(image[0, y : y + height, x : x + width].abs().max()) == 0
        assert float(image[0, 1:-1, 1:-1].eq(0).sum()) <= width * height


def test_views_equal_kornias_operators_on_the_same_draws() -> None:
    num_images = 24
    views = make_views(strength=1.5, **off(
        flip_probability=0.5, rotation_deg=25, translation=0.1, scaling=0.2, shear_deg=8,
        brightness=0.15, contrast=0.3, erasing_probability=0.6, erasing_area=0.15,
    ))  # fmt: skip
    images, samples = make_images(num_images), torch.arange(num_images)
    params = views.draw(epoch=5, samples=samples)

    always = torch.ones(num_images)
    reference = images.float() / 255
    reference = torch.where(params.flip.view(-1, 1, 1, 1), K.RandomHorizontalFlip(p=1.0)(reference), reference)  # noqa: E501  # fmt: skip
    affine = K.RandomAffine(degrees=1.0, p=1.0, align_corners=True)
    reference = affine(reference, params={
        "batch_prob": always,
        "angle": params.angle_deg.float(),
        "translations": params.translation_px.float(),
        "center": torch.full((num_images, 2), (SIDE_PX - 1) / 2),
        "scale": params.scale.float(),
        "shear_x": params.shear_rad.float().rad2deg(),
        "shear_y": torch.zeros(num_images),
        "forward_input_shape": torch.tensor(images.shape),
    })  # fmt: skip
    brightness = K.RandomBrightness(p=1.0, clip_output=False)
    reference = brightness(reference, params={
        "batch_prob": always,
        "brightness_factor": params.brightness.float() + 1,
        "forward_input_shape": torch.tensor(images.shape),
    })  # fmt: skip
    contrast = K.RandomContrast(p=1.0, clip_output=False)
    reference = contrast(reference, params={
        "batch_prob": always,
        "contrast_factor": params.contrast.float(),
        "forward_input_shape": torch.tensor(images.shape),
    }).clamp(0, 1)  # fmt: skip
    x, y, width, height = params.box_px.float().unbind(1)
    reference = K.RandomErasing(p=1.0)(reference, params={
        "batch_prob": always,
        "widths": width,
        "heights": height,
        "xs": x,
        "ys": y,
        "values": torch.zeros(num_images),
        "forward_input_shape": torch.tensor(images.shape),
    })  # fmt: skip
    torch.testing.assert_close(
        views(images, epoch=5, samples=samples), reference, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"noise": -0.1}, "augmentation.noise must be in [0, 1]; got -0.1"),
        ({"rotation_deg": 181}, "augmentation.rotation_deg must be in [0, 180]; got 181"),
    ],
)
def test_a_range_that_makes_no_sense_is_an_error(ranges: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as error:
        AugmentationSettings(**ranges)
    assert str(error.value) == message
