"""Five stages by resolution, the same features as torchvision's, and what a depth trains."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.backbones import Backbone, build_network, freeze_below, pool
from lightning_modules.classifier import ImageClassifier
from lightning_modules.errors import InputError
from lightning_modules.stages import BACKBONES, HEAD_MODULE

# Parameters of each stage, stem first; they sum to the published totals without the head,
# 2,223,872 and 23,508,032.
STAGE_PARAMETERS = {
    "mobilenet_v2": [1_824, 13_968, 39_696, 487_040, 1_681_344],
    "resnet50": [9_536, 215_808, 1_219_584, 7_098_368, 14_964_736],
}
# Parameters trained at each depth, with a head for 5 classes: 1280 * 5 + 5 or 2048 * 5 + 5.
TRAINED_PARAMETERS = {
    "mobilenet_v2": [6_405, 1_687_749, 2_174_789, 2_214_485, 2_228_453, 2_230_277],
    "resnet50": [10_245, 14_974_981, 22_073_349, 23_292_933, 23_508_741, 23_518_277],
}
# Of a 64 px image, after each stage.
STAGE_SIDES_PX = {"mobilenet_v2": [32, 16, 8, 4, 2], "resnet50": [16, 16, 8, 4, 2]}


@cache
def make_backbone(name: str) -> Backbone:
    """A backbone with random weights, in eval mode; not to be changed."""
    return Backbone(name).eval()


def make_images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_have_the_written_out_numbers_of_parameters(name: str) -> None:
    assert [count(stage) for stage in make_backbone(name).stages] == STAGE_PARAMETERS[name]


def test_the_written_out_numbers_follow_from_the_papers_tables() -> None:
    def conv_bn(inputs: int, outputs: int, side: int, groups: int = 1) -> int:
        return inputs // groups * outputs * side**2 + 2 * outputs

    # MobileNetV2, table 2: expansion t, channels c, repeats n; a stage ends with the last stride.
    stages, channels = [conv_bn(3, 32, 3)], 32
    for stage, t, c, n in [
        (0, 1, 16, 1), (1, 6, 24, 2), (2, 6, 32, 3), (3, 6, 64, 4), (3, 6, 96, 3),
        (4, 6, 160, 3), (4, 6, 320, 1),
    ]:  # fmt: skip
        stages += [0] * (stage + 1 - len(stages))
        for _ in range(n):
            wide = t * channels
            stages[stage] += 0 if t == 1 else conv_bn(channels, wide, 1)
            stages[stage] += conv_bn(wide, wide, 3, groups=wide) + conv_bn(wide, c, 1)
            channels = c
    stages[4] += conv_bn(320, 1280, 1)
    assert stages == STAGE_PARAMETERS["mobilenet_v2"]

    # ResNet-50, table 1: bottlenecks of width w, four times as wide outside.
    stages, channels = [conv_bn(3, 64, 7)], 64
    for width, repeats in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        total = conv_bn(channels, 4 * width, 1)  # the first block's shortcut
        for _ in range(repeats):
            total += conv_bn(channels, width, 1) + conv_bn(width, width, 3)
            total += conv_bn(width, 4 * width, 1)
            channels = 4 * width
        stages.append(total)
    assert stages == STAGE_PARAMETERS["resnet50"]


@pytest.mark.parametrize("name", BACKBONES)
def test_each_depth_trains_the_written_out_number_of_parameters(name: str) -> None:
    module = ImageClassifier(backbone=name, num_classes=5, image_size_px=32, unfreeze_depth=5)
    trained = [count_trained(module)]
    for depth in (4, 3, 2, 1, 0):  # it does not thaw: from all to none
        freeze_below(list(module.backbone.stages), depth)
        trained.insert(0, count_trained(module))
    assert trained == TRAINED_PARAMETERS[name]
    assert all(fewer < more for fewer, more in pairwise(trained))


@pytest.mark.parametrize("depth", range(6))
def test_the_classifier_freezes_at_its_depth(depth: int) -> None:
    module = ImageClassifier(
        backbone="mobilenet_v2", num_classes=5, image_size_px=32, unfreeze_depth=depth
    )
    assert count_trained(module) == TRAINED_PARAMETERS["mobilenet_v2"][depth]
    assert module.frozen_stages == 5 - depth


def test_depth_0_leaves_only_the_head() -> None:
    module = ImageClassifier(
        backbone="mobilenet_v2", num_classes=5, image_size_px=32, unfreeze_depth=0
    )
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    assert not any(child.training for stage in module.backbone.stages for child in stage.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_full_depth_leaves_nothing_frozen_the_stems_batchnorm_included(name: str) -> None:
    stages = list(Backbone(name).stages)
    assert freeze_below(stages, 5) == []
    stem_norms = [child for child in stages[0].modules() if isinstance(child, nn.BatchNorm2d)]
    assert stem_norms
    for stage in stages:
        assert all(parameter.requires_grad for parameter in stage.parameters())
        assert all(child.training for child in stage.modules())


def test_a_depth_splits_modules_into_frozen_ones_in_eval_and_trained_ones() -> None:
    stages = list(Backbone("mobilenet_v2").stages)
    assert freeze_below(stages, 2) == stages[:3]
    for stage in stages[:3]:
        assert not any(parameter.requires_grad for parameter in stage.parameters())
        assert not any(child.training for child in stage.modules())
    for stage in stages[3:]:
        assert all(parameter.requires_grad for parameter in stage.parameters())
        assert all(child.training for child in stage.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_a_stage_ends_where_the_resolution_halves(name: str) -> None:
    activations, sides = make_images(), []
    with torch.no_grad():
        for stage in make_backbone(name).stages:
            activations = stage(activations)
            assert activations.shape[2] == activations.shape[3]
            sides.append(activations.shape[2])
    assert sides == STAGE_SIDES_PX[name]


@pytest.mark.parametrize("name", BACKBONES)
def test_features_are_torchvisions_own(name: str) -> None:
    backbone = make_backbone(name)
    network = build_network(name).eval()
    state = dict(zip(network.state_dict(), backbone.state_dict().values(), strict=False))
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert [key.startswith(HEAD_MODULE[name]) for key in missing] == [True, True]
    assert unexpected == []
    network.set_submodule(HEAD_MODULE[name], nn.Identity())
    with torch.no_grad():
        features, expected = backbone(make_images()), network(make_images())
    assert features.shape == (2, backbone.num_features)
    assert float(expected.std()) > 0
    torch.testing.assert_close(features, expected)


def test_features_from_a_later_stage_on_are_the_same() -> None:
    backbone = make_backbone("mobilenet_v2")
    with torch.no_grad():
        activations = make_images()
        expected = backbone(activations)
        for first_stage in range(1, 6):
            activations = backbone.stages[first_stage - 1](activations)
            last = backbone.run(activations, first_stage=first_stage)
            assert torch.equal(pool(last), expected)


@pytest.mark.parametrize("depth", [-1, 6])
def test_a_depth_without_stages_is_an_error(depth: int) -> None:
    with pytest.raises(InputError) as error:
        freeze_below(list(make_backbone("mobilenet_v2").stages), depth)
    assert str(error.value) == f"unfreeze_depth must be in [0, 5]; got {depth}"


def test_an_unknown_backbone_is_an_error() -> None:
    with pytest.raises(InputError) as error:
        Backbone("resnet18")
    assert str(error.value) == "backbone must be one of mobilenet_v2, resnet50; got 'resnet18'"
