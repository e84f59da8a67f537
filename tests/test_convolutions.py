"""Our convolutions: where they are, and that they compute what torch's do."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.backbones import Backbone, build_network
from lightning_modules.convolutions import DepthwiseConvolution, PointwiseConvolution


def strided() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)


def pointwise(bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    convolution = nn.Conv2d(64, 96, 1, bias=bias)
    return convolution.to(memory_format=torch.channels_last)


def gradients(convolution: nn.Conv2d, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the gradients of its squares' sum by images and weights."""
    given = images.clone().requires_grad_()
    convolution.zero_grad()
    output = convolution(given)
    output.float().square().sum().backward()
    assert given.grad is not None
    assert convolution.weight.grad is not None
    return output.detach(), given.grad, convolution.weight.grad


def test_in_float32_it_is_torchs_own_to_the_last_bit() -> None:
    images = torch.randn(4, 8, 12, 12)
    expected = gradients(strided(), images)
    for ours, theirs in zip(
        gradients(DepthwiseConvolution.in_place_of(strided()), images), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_under_autocast_its_gradients_are_those_of_float32() -> None:
    images = torch.randn(4, 8, 12, 12).bfloat16()
    # By hand: float32 all through, but for the rounding of what goes out and of what comes back.
    given, weight = images.float().requires_grad_(), strided().weight
    output = nn.functional.conv2d(given, weight, stride=2, padding=1, groups=8).bfloat16()
    output.float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(DepthwiseConvolution.in_place_of(strided()), images)
    assert ours[0].dtype == torch.bfloat16
    assert torch.equal(ours[0], output)
    assert given.grad is not None
    assert weight.grad is not None
    assert torch.equal(ours[1], given.grad.bfloat16())
    assert torch.equal(ours[2], weight.grad)


def test_without_a_gradient_autocast_is_as_ever() -> None:
    images = torch.randn(4, 8, 12, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = DepthwiseConvolution.in_place_of(strided())(images)
        theirs = strided()(images)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_it_stands_where_a_backbone_halves_its_resolution() -> None:
    # Sandler et al., table 2: the first block of each row with s = 2.
    own = [
        name
        for name, module in build_network("mobilenet_v2").named_modules()
        if isinstance(module, DepthwiseConvolution)
    ]
    assert own == [f"features.{block}.conv.1.0" for block in (2, 4, 7, 14)]
    # ResNet-50's strided convolutions are no depthwise ones.
    network = build_network("resnet50")
    assert not any(isinstance(module, DepthwiseConvolution) for module in network.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_pointwise_convolution_trains_as_torchs_own_up_to_rounding(
    bias: bool, memory_format: torch.memory_format
) -> None:
    images = torch.randn(4, 64, 5, 7).to(memory_format=memory_format)
    expected = gradients(pointwise(bias), images)
    own = PointwiseConvolution.in_place_of(pointwise(bias))
    for ours, theirs in zip(gradients(own, images), expected, strict=True):
        assert ours.shape == theirs.shape
        # Sums of up to 140 products; one in float32 is off by some 1e-7 of its size.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_a_pointwise_convolution_keeps_images_channels_last() -> None:
    images = torch.randn(4, 64, 5, 7).to(memory_format=torch.channels_last)
    output, gradient, _ = gradients(PointwiseConvolution.in_place_of(pointwise()), images)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_pointwise_convolution_that_is_not_trained_is_torchs_own_to_the_last_bit() -> None:
    images = torch.randn(4, 64, 5, 7)
    frozen = pointwise().requires_grad_(False)
    assert torch.equal(PointwiseConvolution.in_place_of(frozen)(images), frozen(images))
    with torch.no_grad():
        own = PointwiseConvolution.in_place_of(pointwise())
        assert torch.equal(own(images), pointwise()(images))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = own(images), pointwise()(images)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("capability", "number"), [("AVX2", 22), ("AVX512", 0)])
def test_pointwise_convolutions_stand_where_the_cpu_has_no_avx512(
    monkeypatch: pytest.MonkeyPatch, capability: str, number: int
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    modules = build_network("mobilenet_v2").modules()
    # Sandler et al., table 2: of blocks 1 to 17, 8 and later expand 64 channels or more, 7 and
    # later are projected to as many; and the last convolution makes 1280 of 320.
    assert sum(isinstance(module, PointwiseConvolution) for module in modules) == number


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_random_weights_and_names_are_those_of_torchvision(name: str) -> None:
    import torchvision

    torch.manual_seed(3)
    expected = getattr(torchvision.models, name)().state_dict()
    torch.manual_seed(3)
    ours = build_network(name).state_dict()
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_frozen_stages_give_the_same_bits_with_and_without_grad_mode() -> None:
    backbone = Backbone("mobilenet_v2").eval().requires_grad_(False)
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        with_grad_mode = backbone(images)
        with torch.no_grad():
            without = backbone(images)
    assert torch.equal(with_grad_mode, without)
