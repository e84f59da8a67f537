"""Five stages by resolution, the same features as torchvision's, and what a depth trains."""

import copy
import io
import warnings
from functools import cache
from itertools import accumulate, pairwise

import numpy as np
import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.backbones import Backbone, build_network, freeze_below, pool, run_stages
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.datamodule import PackDataModule
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from lightning_modules.stages import BACKBONES, HEAD_MODULE, STAGE_MODULES
from lightning_modules.state_dicts import from_torchvision, to_torchvision

# Parameters of each stage, stem first; they sum to the published totals without the head,
# 2,223,872, 23,508,032, 4,007,548, 58,143,808, 14,714,688, and 85,798,656.
STAGE_PARAMETERS = {
    "mobilenet_v2": [1_824, 13_968, 39_696, 487_040, 1_681_344],
    "resnet50": [9_536, 215_808, 1_219_584, 7_098_368, 14_964_736],
    "efficientnet_b0": [2_376, 16_714, 46_640, 786_078, 3_155_740],
    "resnet152": [9_536, 215_808, 2_339_840, 40_613_888, 14_964_736],
    "vgg16": [38_720, 221_440, 1_475_328, 5_899_776, 7_079_424],
    "vit_b_16": [14_918_400, 14_175_744, 14_175_744, 21_263_616, 21_265_152],
}
# Parameters trained at each depth, with a head for 5 classes: 1280 * 5 + 5 or 2048 * 5 + 5.
TRAINED_PARAMETERS = {
    "mobilenet_v2": [6_405, 1_687_749, 2_174_789, 2_214_485, 2_228_453, 2_230_277],
    "resnet50": [10_245, 14_974_981, 22_073_349, 23_292_933, 23_508_741, 23_518_277],
}
# Of a 64 px image, after each stage; ViT-B/16 has one token a patch of 16 px, and one more.
STAGE_SIDES_PX = {
    "mobilenet_v2": [32, 16, 8, 4, 2],
    "resnet50": [16, 16, 8, 4, 2],
    "efficientnet_b0": [32, 16, 8, 4, 2],
    "resnet152": [16, 16, 8, 4, 2],
    "vgg16": [32, 16, 8, 4, 2],
}
NUM_FEATURES = {
    "mobilenet_v2": 1280,
    "resnet50": 2048,
    "efficientnet_b0": 1280,
    "resnet152": 2048,
    "vgg16": 512,
    "vit_b_16": 768,
}
# The larger ones take seconds to draw and to run.
BY_COST = [
    pytest.param(name, marks=pytest.mark.slow)
    if name in ("resnet152", "vgg16", "vit_b_16")
    else name
    for name in BACKBONES
]

Data = tuple[Manifest, Pack]

# Lightning warns of what is meant here: frozen stages, few batches, no worker processes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's use of torch
]


@cache
def make_backbone(name: str) -> Backbone:
    """A backbone with random weights, in eval mode; not to be changed."""
    return Backbone(name).eval()


@cache
def make_shape(name: str) -> Backbone:
    """A backbone without values: quick to build, and its shapes are right."""
    with torch.device("meta"):
        return Backbone(name, image_size_px=64)


@cache
def make_network(name: str) -> nn.Module:
    """torchvision's network for 64 px, in eval mode; BatchNorm knows the statistics of noise.

    With those it starts with, the features of all images are equal to nine digits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(name, image_size_px=64)
        for child in network.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.momentum = 1.0
        with torch.no_grad():
            network(torch.randn(8, 3, 64, 64))
    return network.eval()


def make_images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@cache
def make_backbone_of(name: str) -> Backbone:
    """The backbone that holds that network's very tensors; not to be changed."""
    backbone = Backbone(name, image_size_px=64).eval()
    network = make_network(name).state_dict(keep_vars=True)
    backbone.load_state_dict(from_torchvision(backbone, network), assign=True)
    return backbone


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_have_the_written_out_numbers_of_parameters(name: str) -> None:
    with torch.device("meta"):
        stages = Backbone(name).stages
    assert [count(stage) for stage in stages] == STAGE_PARAMETERS[name]


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

    # ResNets, table 1: bottlenecks of width w, four times as wide outside.
    for name, depths in (("resnet50", (3, 4, 6, 3)), ("resnet152", (3, 8, 36, 3))):
        stages, channels = [conv_bn(3, 64, 7)], 64
        for width, repeats in zip((64, 128, 256, 512), depths, strict=True):
            total = conv_bn(channels, 4 * width, 1)  # the first block's shortcut
            for _ in range(repeats):
                total += conv_bn(channels, width, 1) + conv_bn(width, width, 3)
                total += conv_bn(width, 4 * width, 1)
                channels = 4 * width
            stages.append(total)
        assert stages == STAGE_PARAMETERS[name]

    # EfficientNet-B0, table 1, as MobileNetV2 with kernel k, and squeeze-and-excitation to a
    # quarter of the block's input.
    stages, channels = [conv_bn(3, 32, 3)], 32
    for stage, t, k, c, n in [
        (0, 1, 3, 16, 1), (1, 6, 3, 24, 2), (2, 6, 5, 40, 2), (3, 6, 3, 80, 3), (3, 6, 5, 112, 3),
        (4, 6, 5, 192, 4), (4, 6, 3, 320, 1),
    ]:  # fmt: skip
        stages += [0] * (stage + 1 - len(stages))
        for _ in range(n):
            wide, squeezed = t * channels, channels // 4
            stages[stage] += 0 if t == 1 else conv_bn(channels, wide, 1)
            stages[stage] += conv_bn(wide, wide, k, groups=wide) + conv_bn(wide, c, 1)
            stages[stage] += 2 * wide * squeezed + wide + squeezed
            channels = c
    stages[4] += conv_bn(320, 1280, 1)
    assert stages == STAGE_PARAMETERS["efficientnet_b0"]

    # VGG16, table 1, column D: 3x3 convolutions with biases.
    stages, channels = [], 3
    for width, repeats in [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]:
        stages.append(0)
        for _ in range(repeats):
            stages[-1] += 9 * channels * width + width
            channels = width
    assert stages == STAGE_PARAMETERS["vgg16"]

    # ViT-B/16, table 1: 768 wide, 3072 within, four square matrices for attention; 196 patches.
    norm = 2 * 768
    layer = 2 * norm + 4 * (768 * 768 + 768) + 768 * 3072 + 3072 + 3072 * 768 + 768
    embedding = (3 * 16 * 16 * 768 + 768) + 768 + (196 + 1) * 768
    stages = [embedding + 2 * layer, 2 * layer, 2 * layer, 3 * layer, 3 * layer + norm]
    assert stages == STAGE_PARAMETERS["vit_b_16"]


def test_the_numbers_at_each_depth_are_the_heads_and_the_last_stages() -> None:
    for name, trained in TRAINED_PARAMETERS.items():
        head = NUM_FEATURES[name] * 5 + 5
        assert trained == [*accumulate(reversed(STAGE_PARAMETERS[name]), initial=head)]


@pytest.mark.parametrize("name", BACKBONES)
def test_each_depth_trains_the_written_out_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        backbone = Backbone(name)
    trained = [count_trained(backbone)]
    for depth in (4, 3, 2, 1, 0):  # it does not thaw: from all to none
        freeze_below(list(backbone.stages), depth)
        trained.insert(0, count_trained(backbone))
    assert trained == [*accumulate(reversed(STAGE_PARAMETERS[name]), initial=0)]
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
    with torch.device("meta"):
        stages = list(Backbone(name).stages)
    assert freeze_below(stages, 5) == []
    stem_norms = [child for child in stages[0].modules() if isinstance(child, nn.BatchNorm2d)]
    assert bool(stem_norms) == (name not in ("vgg16", "vit_b_16"))
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


@pytest.mark.parametrize("name", STAGE_SIDES_PX)
def test_a_stage_ends_where_the_resolution_halves(name: str) -> None:
    activations, sides = torch.empty(2, 3, 64, 64, device="meta"), []
    for stage in make_shape(name).stages:
        activations = stage(activations)
        assert activations.shape[2] == activations.shape[3]
        sides.append(activations.shape[2])
    assert sides == STAGE_SIDES_PX[name]


def test_a_transformers_stages_pass_tokens_on() -> None:
    activations = torch.empty(2, 3, 64, 64, device="meta")
    for stage in make_shape("vit_b_16").stages:
        activations = stage(activations)
        assert activations.shape == (2, 1 + 4 * 4, 768)
    assert pool(activations).shape == (2, 768)


def test_a_transformers_twelve_layers_each_have_one_stage() -> None:
    modules = [module for stage in STAGE_MODULES["vit_b_16"] for module in stage]
    layers = [f"encoder.layers.encoder_layer_{layer}" for layer in range(12)]
    assert modules == ["conv_proj", *layers, "encoder.ln"]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_tensor_has_one_name_in_torchvisions_network(name: str) -> None:
    backbone = make_shape(name)
    assert backbone.num_features == NUM_FEATURES[name]
    with torch.device("meta"):
        network = build_network(name, image_size_px=64)
        head = nn.Linear(backbone.num_features, 1000)
    written = to_torchvision(backbone, head)
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    assert {key: tensor.shape for key, tensor in written.items()} == expected


@pytest.mark.parametrize("name", BY_COST)
def test_features_are_torchvisions_own_to_the_bit(name: str) -> None:
    network = make_network(name)
    head = network.get_submodule(HEAD_MODULE[name])
    nn.init.normal_(head.weight)  # ViT's is zero
    backbone = make_backbone_of(name)
    assert isinstance(head, nn.Linear)
    own = to_torchvision(backbone, head)
    assert [key for key, t in network.state_dict().items() if not torch.equal(own[key], t)] == []
    with torch.no_grad():
        features, logits = backbone(make_images()), network(make_images())
    assert features.shape == (2, NUM_FEATURES[name])
    assert float((features[0] - features[1]).abs().max()) > 0.01
    assert torch.equal(head(features), logits)


@pytest.mark.parametrize("name", BY_COST)
def test_features_from_a_later_stage_on_are_the_same(name: str) -> None:
    backbone = make_backbone_of(name)
    with torch.no_grad():
        activations = make_images()
        expected = backbone(activations)
        for first_stage in range(1, 6):
            activations = backbone.stages[first_stage - 1](activations)
            last = run_stages(backbone.stages[first_stage:], activations)
            assert torch.equal(pool(last), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_an_onnx_model_of_any_batch_size_gives_the_same_features(name: str) -> None:
    backbone = make_backbone_of(name)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            backbone,
            (images[:2],),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    with torch.no_grad():
        exact = copy.deepcopy(backbone).double()(images.double()).numpy()
        rounding = np.abs(backbone(images).numpy() - exact).max()
    # A random ResNet-152 makes much of the last digit: of torch's rounding, too.
    for size in (1, 3):
        (features,) = session.run(None, {"images": images[:size].numpy()})
        assert np.abs(features - exact[:size]).max() < 5 * rounding + 1e-5
        assert rounding < 0.01 * exact.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet152", "vgg16", "vit_b_16"])
def test_a_frozen_stage_is_bit_identical_after_fit_and_a_trained_one_is_not(
    tiny_data: Data, name: str
) -> None:
    manifest, pack = tiny_data
    # Without weight decay, only a gradient moves a weight.
    module = ImageClassifier(
        backbone=name, num_classes=3, image_size_px=32, unfreeze_depth=1, weight_decay=0.0, lr=1e-2
    )
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=PackDataModule(manifest, pack, batch_size=4, seed=0))
    after = module.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    expected = {key for key in before if key.startswith(("head.", "backbone.stages.4."))}
    # A key's bias adds the same to a whole row of scores, and softmax takes no notice.
    assert moved == expected
    for stage in module.backbone.stages[:4]:
        assert not any(child.training for child in stage.modules())


@pytest.mark.slow
def test_embeddings_biases_and_norms_are_not_decayed() -> None:
    module = ImageClassifier(
        backbone="vit_b_16", num_classes=3, image_size_px=32, unfreeze_depth=5, weight_decay=0.25
    )
    decays = {
        id(parameter): group["weight_decay"]
        for group in module.configure_optimizers().param_groups
        for parameter in group["params"]
    }
    for name, parameter in module.named_parameters():
        is_matrix = name.endswith(("weight", "in_proj_weight")) and ".ln" not in name
        is_norm = parameter.ndim == 1
        assert decays[id(parameter)] == (0.25 if is_matrix and not is_norm else 0.0), name


@pytest.mark.parametrize("depth", [-1, 6])
def test_a_depth_without_stages_is_an_error(depth: int) -> None:
    with pytest.raises(InputError) as error:
        freeze_below(list(make_backbone("mobilenet_v2").stages), depth)
    assert str(error.value) == f"unfreeze_depth must be in [0, 5]; got {depth}"


def test_an_unknown_backbone_is_an_error() -> None:
    with pytest.raises(InputError) as error:
        Backbone("resnet18")
    assert str(error.value) == (
        "backbone must be one of mobilenet_v2, resnet50, efficientnet_b0, resnet152, vgg16, "
        "vit_b_16; got 'resnet18'"
    )


@pytest.mark.parametrize(
    ("size", "remedy"), [(100, "96 or 112"), (31, "16 or 32"), (15, "16 or 32")]
)
def test_an_image_that_patches_do_not_cover_is_an_error(size: int, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        Backbone("vit_b_16", image_size_px=size)
    assert str(error.value) == (
        "image_size_px must be a multiple of 16 for vit_b_16, which cuts images into patches; "
        f"got {size}: take {remedy}"
    )


@pytest.mark.slow
def test_images_of_other_sizes_suit_the_other_backbones() -> None:
    for name in STAGE_SIDES_PX:
        with torch.device("meta"):
            backbone = Backbone(name, image_size_px=100)
        assert backbone(torch.empty(1, 3, 72, 72, device="meta")).shape == (1, NUM_FEATURES[name])
