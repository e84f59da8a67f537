"""Claims about maps, the network that they explain, and what the command writes."""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from lightning_modules.attribution_tests import rank_correlations
from lightning_modules.backbones import Backbone, run_stages
from lightning_modules.bundle import FORMAT, load_bundle
from lightning_modules.bundled_mixture import BundledMixture
from lightning_modules.bundled_network import BundledNetwork
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.phantom import PhantomSettings, write_phantoms
from lightning_modules.errors import InputError
from lightning_modules.explain import (
    _sum_of,
    enlarge,
    grad_cam,
    hide,
    integrated_gradients,
    untrained_network,
)
from lightning_modules.rebuilding import load_network
from lightning_modules.state_dicts import to_torchvision
from search.explanation.checks import point_at_phantoms, run_tests
from search.explanation.explain import explain_images, print_explanation
from search.explanation.gallery import choose_cases, draw_overlay
from search.explanation.verdict import judge

SIZE_PX = 32
CLASSES = ("benign_tumor", "malignant_tumor", "no_stroke", "no_tumor", "stroke")


def to_backbone(stages: list[nn.Module], num_features: int) -> Backbone:
    """A backbone of hand-made stages; the last one's output is averaged, or its class token is."""
    backbone = Backbone.__new__(Backbone)
    nn.Module.__init__(backbone)
    backbone.name = "by_hand"
    backbone.stages = nn.ModuleList(stages)
    backbone.num_features = num_features
    return backbone


class Centred(nn.Module):
    """The intensities again, which the network has normalised, as two channels: x and 1 - x."""

    def forward(self, images: Tensor) -> Tensor:
        grey = images[:, :1] * 0.229 + 0.485
        return torch.cat([grey, 1 - grey], dim=1)


def by_hand() -> BundledNetwork:
    """Its logits are 3 mean(x) and mean(1 - x) - 2 mean(x), of 8 x 8 cells of 4 px."""
    head = nn.Linear(2, 2)
    head.weight.data = torch.tensor([[3.0, 0.0], [-2.0, 1.0]])
    head.bias.data = torch.zeros(2)
    return BundledNetwork(to_backbone([Centred(), nn.AvgPool2d(4)], 2), head)


def images(*seeds: int) -> Tensor:
    return torch.stack(
        [torch.rand(1, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


# Grad-CAM


def test_grad_cam_of_a_linear_head_is_the_class_activation_map() -> None:
    given = images(0, 1)
    cells = nn.functional.avg_pool2d(given, 4)[:, 0]
    maps = grad_cam(by_hand(), given, torch.tensor([0, 1]))
    # The gradient of a logit by a cell of channel k is w_k / 64.
    assert torch.allclose(maps[0], 3 * cells[0] / 64, atol=1e-6)
    against = (1 - cells[1]) - 2 * cells[1]
    assert torch.allclose(maps[1], against / 64, atol=1e-6)
    logits = by_hand()(given)
    assert maps.sum(dim=(1, 2)).tolist() == pytest.approx(
        [logits[0, 0].item(), logits[1, 1].item()]
    )


class ToTokens(nn.Module):
    """A class token and 8 x 8 patches, of two channels."""

    def forward(self, maps: Tensor) -> Tensor:
        patches = maps.flatten(2).transpose(1, 2)
        return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)


class Attend(nn.Module):
    """As the last block of a transformer: the class token takes up the mean of the patches."""

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:]
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


def test_grad_cam_of_tokens_is_that_of_the_same_cells() -> None:
    network = by_hand()
    stages = [Centred(), nn.Sequential(nn.AvgPool2d(4), ToTokens()), Attend()]
    of_tokens = BundledNetwork(to_backbone(stages, 2), network.head)
    given, targets = images(0, 1), torch.tensor([0, 1])
    assert torch.allclose(of_tokens(given), network(given), atol=1e-6)
    expected = grad_cam(network, given, targets)
    assert torch.allclose(grad_cam(of_tokens, given, targets), expected, atol=1e-6)
    # Nothing is left in the network.
    assert not any(stage._forward_pre_hooks for stage in of_tokens.backbone.stages)


def test_a_last_stage_without_places_is_refused() -> None:
    stages = [Centred(), nn.AvgPool2d(SIZE_PX), nn.Flatten(1)]
    backbone = to_backbone(stages, 2)
    backbone.forward = lambda given: run_stages(backbone.stages, given)  # type: ignore[method-assign]
    network = BundledNetwork(backbone, nn.Linear(2, 2))
    with pytest.raises(
        InputError, match=r"last stage with height and width.*use integrated_gradients"
    ):
        grad_cam(network, images(0), torch.tensor([0]))


# Integrated Gradients


class Corner(nn.Module):
    """The logit of class 1 is the sum of the first 8 x 8 pixels times 10."""

    def forward(self, intensities: Tensor) -> Tensor:
        value = 10 * intensities[:, 0, :8, :8].sum(dim=(1, 2))
        return torch.stack([torch.zeros_like(value), value], dim=1)


def test_what_a_pixel_adds_to_a_linear_logit_is_its_weight_times_its_difference() -> None:
    given = images(3)
    maps = integrated_gradients(Corner(), given, torch.tensor([1]))
    expected = torch.zeros(1, SIZE_PX, SIZE_PX)
    expected[:, :8, :8] = 10 * (given - hide(given))[:, 0, :8, :8]
    assert torch.allclose(maps, expected, atol=1e-5)
    assert (integrated_gradients(Corner(), given, torch.tensor([0])) == 0).all()


def test_a_dark_spot_counts_as_much_as_a_bright_one() -> None:
    spot = torch.full((2, 1, SIZE_PX, SIZE_PX), 0.5)
    spot[0, 0, 4, 4], spot[1, 0, 4, 4] = 0.0, 1.0
    dark, bright = integrated_gradients(Corner(), spot, torch.tensor([1, 1]))
    assert torch.allclose(dark, -bright, atol=1e-5)
    assert dark.abs().argmax() == bright.argmax() == 4 * SIZE_PX + 4


class Squared(nn.Module):
    """Its one logit is the square of the sum of all pixels."""

    def forward(self, intensities: Tensor) -> Tensor:
        return intensities.sum(dim=(1, 2, 3))[:, None] ** 2


def test_gradients_are_added_up_all_the_way() -> None:
    given = images(3)
    start, end = hide(given), given
    # On the way the gradient of every pixel is twice the sum, whose mean is that of both ends.
    expected = (end - start)[:, 0] * (start.sum() + end.sum())
    maps = integrated_gradients(Squared(), given, torch.tensor([0]))
    assert torch.allclose(maps, expected, rtol=1e-3, atol=1e-2)


def test_integrated_gradients_do_not_depend_on_the_batch(trained: BundledNetwork) -> None:
    given = images(1, 2, 3)
    together = integrated_gradients(trained, given, torch.tensor([1, 0, 1]))
    alone = integrated_gradients(trained, given[1:2], torch.tensor([0]))
    assert torch.allclose(together[1:2], alone, atol=1e-6)


@pytest.mark.parametrize("size_px", [32, 50, 224])
def test_what_is_hidden_keeps_its_brightness_and_loses_its_content(size_px: int) -> None:
    stripes = (torch.arange(size_px) // max(2, size_px // 32) % 2).float().expand(size_px, size_px)
    hidden = hide(stripes[None, None])
    middle = hidden[0, 0, size_px // 4 : -size_px // 4, size_px // 4 : -size_px // 4]
    assert middle.mean().item() == pytest.approx(0.5, abs=0.02)
    assert middle.std().item() < 0.02


def test_enlarged_maps_keep_what_is_constant_and_where_it_is_high() -> None:
    assert torch.allclose(enlarge(torch.full((1, 3, 3), 2.0), 10), torch.full((1, 10, 10), 2.0))
    corner = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert enlarge(corner, 8)[0, 0, 0] == 1
    assert enlarge(corner, 8)[0, 7, 7] == 0


# Mixtures

WEIGHTS = (0.3, 0.7)
ROWS = ([[3.0, 0.0], [-2.0, 1.0]], [[0.0, 4.0], [1.0, -1.0]])


def member(rows: list[list[float]], num_cells: int) -> BundledNetwork:
    """Its logits are a row's two numbers times mean(x) and mean(1 - x)."""
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.tensor(rows)
    return BundledNetwork(to_backbone([Centred(), nn.AdaptiveAvgPool2d(num_cells)], 2), head)


def mixture(*num_cells: int) -> BundledMixture:
    return BundledMixture([member(*of) for of in zip(ROWS, num_cells, strict=True)], WEIGHTS)


def parts_by_hand(given: Tensor, target: int, num_cells: tuple[int, ...]) -> list[Tensor]:
    """What each member adds to the map of a mixture's logit, at its own cells.

    The gradient of log(sum of w p) by a member's logits is its share of that sum, times one for the
    class itself, less the member's probability of each class.
    """
    found = []
    for rows, count in zip(ROWS, num_cells, strict=True):
        cells = nn.functional.adaptive_avg_pool2d(given, count)[:, 0]
        both = torch.stack([cells, 1 - cells], dim=1)
        maps = torch.einsum("jk,bkhw->bjhw", torch.tensor(rows), both) / count**2  # of each logit
        found.append((maps, maps.sum(dim=(2, 3)).softmax(1)))
    mixed = sum(w * p[:, target] for w, (_, p) in zip(WEIGHTS, found, strict=True))
    return [
        (w * p[:, target] / mixed)[:, None, None]
        * (maps[:, target] - (p[:, :, None, None] * maps).sum(dim=1))
        for w, (maps, p) in zip(WEIGHTS, found, strict=True)
    ]


@pytest.mark.parametrize("target", [0, 1])
def test_grad_cam_of_a_mixture_is_the_sum_of_its_logits_at_each_member(target: int) -> None:
    given, targets = images(0, 1), torch.full((2,), target)
    fine, coarse = parts_by_hand(given, target, (8, 4))
    # A coarse cell covers four fine ones, which share what it says.
    expected = fine + coarse.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    assert torch.allclose(grad_cam(mixture(8, 4), given, targets), expected, atol=1e-6)


def test_cells_that_do_not_fit_into_each_other_keep_their_sum() -> None:
    parts = parts_by_hand(images(0, 1), 1, (5, 3))
    maps = grad_cam(mixture(5, 3), images(0, 1), torch.tensor([1, 1]))
    assert maps.shape == (2, 5, 5)
    expected = sum(part.sum(dim=(1, 2)) for part in parts)
    assert maps.sum(dim=(1, 2)).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    # Of two cells in a line, three have two thirds, a third of each, and two thirds.
    found = _sum_of([torch.tensor([[[3.0, 6.0], [0.0, 0.0]]]), torch.zeros(1, 3, 3)])
    assert found[0].tolist() == [
        pytest.approx([4 / 3, 2, 8 / 3]),
        pytest.approx([2 / 3, 1, 4 / 3]),
        [0, 0, 0],
    ]


def test_a_member_may_pass_tokens_on() -> None:
    stages = [Centred(), nn.Sequential(nn.AdaptiveAvgPool2d(4), ToTokens()), Attend()]
    plain = mixture(8, 4)
    of_tokens = BundledNetwork(to_backbone(stages, 2), plain.members[1].head)
    mixed = BundledMixture([plain.members[0], of_tokens], WEIGHTS)
    given, targets = images(0, 1), torch.tensor([0, 1])
    expected = grad_cam(plain, given, targets)
    assert torch.allclose(grad_cam(mixed, given, targets), expected, atol=1e-6)
    for stage in (each.backbone.stages[-1] for each in mixed.members):
        assert not stage._forward_hooks
        assert not stage._forward_pre_hooks


def test_a_member_mixed_with_its_like_is_explained_as_it_is_alone_less_the_other_class() -> None:
    alone, given = by_hand(), images(0, 1)
    mixed = BundledMixture([by_hand(), by_hand()], (0.25, 0.75))
    ours, others = torch.tensor([0, 1]), torch.tensor([1, 0])
    # With two classes, log p is a function of the difference of their logits, of slope 1 - p.
    slope = 1 - alone(given).softmax(1)[[0, 1], ours]
    for method in (grad_cam, integrated_gradients):
        difference = method(alone, given, ours) - method(alone, given, others)
        found = method(mixed, given, ours)
        assert rank_correlations(found.numpy(), difference.numpy()) == pytest.approx([1, 1])
        if method is grad_cam:
            assert torch.allclose(found, slope[:, None, None] * difference, atol=1e-6)


def test_pixels_of_a_mixture_add_up_to_the_change_of_its_logit() -> None:
    given, targets = images(0, 1), torch.tensor([0, 1])
    network = mixture(8, 4)
    change = (network(given) - network(hide(given)))[[0, 1], targets]
    found = integrated_gradients(network, given, targets).sum(dim=(1, 2))
    assert found.tolist() == pytest.approx(change.tolist(), rel=1e-3, abs=1e-6)


def test_what_a_mixture_is_certain_of_is_explained_too() -> None:
    given, targets = images(0), torch.tensor([0])
    pair = [by_hand(), by_hand()]
    for each in pair:
        each.head.bias.data = torch.tensor([20.0, 0.0])
    doubt = pair[0](given).double().softmax(1)[0, 1].item()
    assert 0 < doubt < 6e-8  # in float32 the class has a probability of 1, with no gradient
    difference = grad_cam(by_hand(), given, targets) - grad_cam(by_hand(), given, 1 - targets)
    found = grad_cam(BundledMixture(pair, (0.5, 0.5)), given, targets)
    assert torch.allclose(found / doubt, difference, rtol=1e-3)


# What to show


def test_cases_are_right_wrong_and_uncertain_and_no_image_is_shown_twice() -> None:
    probabilities = np.array(
        [
            [0.9, 0.05, 0.05],  # 0: right
            [0.8, 0.1, 0.1],  # 1: right, less sure
            [0.1, 0.7, 0.2],  # 2: right, of another class
            [0.05, 0.9, 0.05],  # 3: wrong, sure
            [0.2, 0.2, 0.6],  # 4: wrong, less sure
            [0.41, 0.4, 0.19],  # 5: right, and hardly so
        ]
    )
    labels = np.array([0, 0, 1, 2, 0, 0])
    found = choose_cases(probabilities, labels, num_each=2)
    assert found == {"right": [0, 2], "wrong": [3, 4], "uncertain": [5, 1]}
    everything = choose_cases(probabilities, labels, num_each=10)
    assert everything == {"right": [0, 2, 1, 5], "wrong": [3, 4], "uncertain": []}


def test_an_overlay_leaves_the_image_where_the_map_is_not_positive() -> None:
    grey = np.full((2, 2), 100, np.uint8)
    drawn = draw_overlay(grey, np.array([[-1.0, 0.0], [0.5, 1.0]]))
    assert (drawn[0] == 100).all()
    assert (drawn[1] != 100).any()
    assert (draw_overlay(grey, np.zeros((2, 2))) == 100).all()


# The bundle's network


def head_of(backbone: Backbone, num_classes: int) -> nn.Linear:
    head = nn.Linear(backbone.num_features, num_classes)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(5))
    return head


def constant_onnx(num_classes: int, size_px: int) -> bytes:
    """A model of the right shapes that always answers the first class."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["intensities"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["mean"]),
        helper.make_node("Gemm", ["mean", "weight", "bias"], ["logits"]),
    ]
    shape, bias = ["batch", 1, size_px, size_px], [1.0] + [0.0] * (num_classes - 1)
    graph = helper.make_graph(
        nodes,
        "bundle",
        [helper.make_tensor_value_info("intensities", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", num_classes])],
        [
            helper.make_tensor("weight", TensorProto.FLOAT, [1, num_classes], [0.0] * num_classes),
            helper.make_tensor("bias", TensorProto.FLOAT, [num_classes], bias),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def write_bundle(
    folder: Path, state: dict[str, Tensor], model: bytes, classes: tuple[str, ...], **changes: Any
) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model)
    (folder / "model.pt2").write_bytes(b"unused")
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    files = ("model.onnx", "model.pt2", "model.safetensors")
    config = {
        "format": FORMAT,
        "backbone": "mobilenet_v2",
        "classes": list(classes),
        "temperature": 1.0,
        "input": {"image_size_px": SIZE_PX},
        "digests": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files
        },
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(scope="module")
def trained() -> BundledNetwork:
    torch.manual_seed(1)
    backbone = Backbone("mobilenet_v2", image_size_px=SIZE_PX)
    return BundledNetwork(backbone, head_of(backbone, len(CLASSES)))


@pytest.fixture
def bundle(trained: BundledNetwork, tmp_path: Path) -> Path:
    state = to_torchvision(trained.backbone, trained.head)
    return write_bundle(tmp_path / "bundle", state, constant_onnx(len(CLASSES), SIZE_PX), CLASSES)


def test_the_network_of_a_bundle_is_the_one_that_was_saved(
    bundle: Path, trained: BundledNetwork
) -> None:
    network = load_network(bundle)
    assert not network.training
    with torch.inference_mode():
        assert torch.equal(network(images(0, 1)), trained(images(0, 1)))


def test_changed_weights_are_refused(bundle: Path) -> None:
    path = bundle / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="must be the ones that were exported"):
        load_network(bundle)


@pytest.mark.parametrize("name", [None, 3, ["mobilenet_v2"], "resnet18", "../resnet50"])
def test_a_backbone_that_is_none_is_refused(
    trained: BundledNetwork, tmp_path: Path, name: object
) -> None:
    state = to_torchvision(trained.backbone, trained.head)
    model = constant_onnx(len(CLASSES), SIZE_PX)
    folder = write_bundle(tmp_path / "bundle", state, model, CLASSES, backbone=name)
    with pytest.raises(InputError, match="must name a backbone, one of mobilenet_v2"):
        load_network(folder)


def test_a_head_of_other_classes_is_refused(trained: BundledNetwork, tmp_path: Path) -> None:
    state = to_torchvision(trained.backbone, head_of(trained.backbone, 4))
    model = constant_onnx(len(CLASSES), SIZE_PX)
    folder = write_bundle(tmp_path / "bundle", state, model, CLASSES)
    with pytest.raises(InputError, match="must hold a linear head for 5 classes"):
        load_network(folder)


def test_an_untrained_network_depends_on_its_seed_alone(trained: BundledNetwork) -> None:
    before = torch.get_rng_state()
    first = untrained_network(trained, images(0), seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    again, other = (untrained_network(trained, images(0), seed=seed) for seed in (4, 5))
    with torch.inference_mode():
        assert torch.equal(first(images(0)), again(images(0)))
        assert not torch.equal(first(images(0)), other(images(0)))
        assert not torch.equal(first(images(0)), trained(images(0)))


def test_an_untrained_network_tells_images_apart(trained: BundledNetwork) -> None:
    given = images(0, 1, 2)
    network = untrained_network(trained, given, seed=0)
    assert not any(module.training for module in network.modules())
    with torch.inference_mode():
        assert network(given).std(dim=0).min() > 0.01
    maps = integrated_gradients(network, given, torch.tensor([0, 1, 2]))
    assert maps.abs().amax(dim=(1, 2)).min() > 1e-5


def settings_of(*members: tuple[float, str]) -> list[dict[str, Any]]:
    return [{"weight": weight, "params": {"backbone": name}} for weight, name in members]


MIXED = settings_of((0.25, "mobilenet_v2"), (0.75, "mobilenet_v2"))


@pytest.fixture(scope="module")
def pair() -> list[BundledNetwork]:
    """Two networks that give what `constant_onnx` does, whatever they see."""
    torch.manual_seed(2)
    networks = []
    for _ in range(2):
        backbone = Backbone("mobilenet_v2", image_size_px=SIZE_PX)
        head = nn.Linear(backbone.num_features, len(CLASSES))
        head.weight.data.zero_()
        head.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
        networks.append(BundledNetwork(backbone, head))
    return networks


def write_mixed(folder: Path, networks: list[BundledNetwork], **changes: Any) -> Path:
    state = {
        f"members.{number}.{name}": tensor.clone()
        for number, network in enumerate(networks)
        for name, tensor in to_torchvision(network.backbone, network.head).items()
    }
    model = constant_onnx(len(CLASSES), SIZE_PX)
    settings = {"backbone": "ensemble", "members": MIXED} | changes
    return write_bundle(folder, state, model, CLASSES, **settings)


def test_the_mixture_of_a_bundle_is_the_one_that_was_saved(
    pair: list[BundledNetwork], tmp_path: Path
) -> None:
    network = load_network(write_mixed(tmp_path / "bundle", pair))
    assert isinstance(network, BundledMixture)
    assert network.weights == (0.25, 0.75)
    assert not any(module.training for module in network.modules())
    for found, saved in zip(network.members, pair, strict=True):
        state = saved.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (None, "must list two members or more"),
        ({"0": MIXED[0]}, "must list two members or more"),
        (MIXED[:1], "must list two members or more"),
        ([*MIXED, 3], "must list two members or more"),
        ([{**MIXED[0], "weight": "0.25"}, MIXED[1]], "must list two members or more"),
        ([{**MIXED[0], "weight": 0.5}, MIXED[1]], "that sum to 1"),
        (
            settings_of((-0.5, "mobilenet_v2"), (1.5, "mobilenet_v2")),
            "weights above 0",
        ),
        ([{"weight": 0.25}, MIXED[1]], "must name a backbone"),
        (settings_of((0.25, "mobilenet_v2"), (0.75, "ensemble")), "must name a backbone"),
        (settings_of((0.25, "mobilenet_v2"), (0.75, "resnet50")), "model.safetensors"),
        (settings_of(*[(0.25, "mobilenet_v2")] * 4), "model.safetensors"),
    ],
)
def test_members_that_are_not_those_of_the_file_are_refused(
    pair: list[BundledNetwork], tmp_path: Path, members: object, message: str
) -> None:
    folder = write_mixed(tmp_path / "bundle", pair, members=members)
    with pytest.raises(InputError, match=message):
        load_network(folder)


def test_tensors_of_no_member_are_refused(pair: list[BundledNetwork], tmp_path: Path) -> None:
    folder = write_mixed(tmp_path / "bundle", [*pair, pair[0]])
    with pytest.raises(InputError, match=r"must hold the tensors of the 2 members.* 314 others"):
        load_network(folder)


def test_a_mixture_that_is_not_that_of_the_onnx_model_is_refused(
    pair: list[BundledNetwork], trained: BundledNetwork, tmp_path: Path
) -> None:
    folder = write_mixed(tmp_path / "bundle", [pair[0], trained])
    with pytest.raises(InputError, match=r"members and weights that model\.onnx mixes"):
        load_network(folder)


def test_an_untrained_mixture_has_weights_of_its_own_in_each_member(
    pair: list[BundledNetwork],
) -> None:
    network = BundledMixture(pair, (0.25, 0.75))
    untrained = untrained_network(network, images(0), seed=4)
    assert isinstance(untrained, BundledMixture)
    assert untrained.weights == network.weights
    first, second = untrained.members
    assert not torch.equal(first.head.weight, second.head.weight)
    assert (pair[0].head.weight == 0).all()  # the trained one is as it was
    alone = untrained_network(pair[0], images(0), seed=4)
    assert torch.equal(alone.members[0].head.weight, first.head.weight)


def test_the_members_of_a_mixture_are_named(pair: list[BundledNetwork], tmp_path: Path) -> None:
    folder = write_mixed(tmp_path / "bundle", pair)
    result = explain_images(folder, [png(tmp_path / "1.png", 0)], tmp_path / "out", num_tests=0)
    assert result["backbone"] == "ensemble"
    assert result["members"] == ["mobilenet_v2", "mobilenet_v2"]


class Normalised(nn.Module):
    """What ``neurosweep export`` writes: the trained module, its normalisation written out."""

    def __init__(self, module: ImageClassifier) -> None:
        super().__init__()
        self.backbone, self.head = module.backbone, module.head

    def forward(self, intensities: Tensor) -> Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406])[None, :, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[None, :, None, None]
        logits: Tensor = self.head(self.backbone((intensities - mean) / std))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50", "vit_b_16"])
def test_the_network_agrees_with_the_onnx_model(name: str, tmp_path: Path) -> None:
    module = ImageClassifier(backbone=name, num_classes=3, image_size_px=SIZE_PX).eval()
    program = torch.onnx.export(
        Normalised(module).eval(),
        (torch.zeros(2, 1, SIZE_PX, SIZE_PX),),
        dynamo=True,
        verbose=False,
        input_names=["intensities"],
        output_names=["logits"],
        dynamic_shapes={"intensities": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    program.save(tmp_path / "model.onnx", external_data=False)
    model = (tmp_path / "model.onnx").read_bytes()
    state = to_torchvision(module.backbone, module.head)
    folder = write_bundle(tmp_path / "bundle", state, model, ("a", "b", "c"), backbone=name)
    pixels = (images(0, 1, 2)[:, 0] * 255).to(torch.uint8).numpy()
    network = load_network(folder)
    with torch.inference_mode():
        ours = network(torch.from_numpy(pixels[:, None]).float() / 255).numpy()
    assert ours == pytest.approx(load_bundle(folder).logits(pixels), abs=1e-4)
    # The maps are those of the backbone's cells: 32 px, of a transformer 16 px.
    cells = 2 if name == "vit_b_16" else 1
    targets = torch.tensor([0, 1, 2])
    assert grad_cam(network, images(0, 1, 2), targets).shape == (3, cells, cells)
    maps = integrated_gradients(network, images(0, 1, 2), targets)
    assert maps.shape == (3, SIZE_PX, SIZE_PX)


# The command


def png(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_images_become_overlays_and_arrays(bundle: Path, tmp_path: Path) -> None:
    given = [png(tmp_path / "DOE^JANE" / "1.png", 0), png(tmp_path / "ROE" / "1.png", 1)]
    out = tmp_path / "out"
    result = explain_images(bundle, given, out, num_tests=0)
    assert (result["backbone"], result["members"]) == ("mobilenet_v2", ["mobilenet_v2"])
    assert json.loads((out / "explanation.json").read_text()) == result
    listed = {"explanation.json"}
    for row in result["images"]:
        assert row["image"] == "1.png"
        assert row["explained_class"] == CLASSES[0]  # what the ONNX model always answers
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert set(row["files"]) == {"grad_cam", "integrated_gradients"}
        for files in row["files"].values():
            listed |= set(files.values())
            values = np.load(out / files["array"], allow_pickle=False)
            assert (values.shape, values.dtype) == ((SIZE_PX, SIZE_PX), np.float32)
            with Image.open(out / files["overlay"]) as overlay:
                assert (overlay.mode, overlay.size) == ("RGB", (SIZE_PX, SIZE_PX))
    assert {path.name for path in out.iterdir()} == listed
    assert len(listed) == 1 + 2 * 2 * 2
    written = b"".join(path.read_bytes() for path in out.iterdir())
    assert b"JANE" not in written
    assert b"ROE" not in written


def test_a_manifest_becomes_a_gallery_of_validation_images_only(
    bundle: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    rows = ["path,label,group_id,split"]
    for index, split in enumerate(["train", "val", "val", "val", "test", "test"]):
        label = CLASSES[index % 2] if split == "val" else "stroke"
        path = f"{split}-folder/{split}{index}<b>.png"
        png(data / path, index)
        rows.append(f"{path},{label},Jane Doe {index},{split}")
    data.joinpath("manifest.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    result = explain_images(bundle, [data / "manifest.csv"], out, num_tests=0)
    # The model always answers the first class: rows 1 and 3 are of the second, row 2 is of it.
    kinds = [(row["kind"], row["image"], row["label"]) for row in result["images"]]
    assert kinds == [
        ("right", "val2<b>.png", CLASSES[0]),
        ("wrong", "val1<b>.png", CLASSES[1]),
        ("wrong", "val3<b>.png", CLASSES[1]),
    ]
    assert result["images"][0]["group"] == hashlib.sha256(b"Jane Doe 2").hexdigest()[:10]
    page = (out / "gallery.html").read_text()
    assert "val2&lt;b&gt;.png" in page
    assert "<b>.png" not in page
    assert page.count("data:image/png;base64,") == 3 * 3
    for secret in ("Jane", "folder", "test", "http", str(tmp_path)):
        assert secret not in re.sub(r"base64,[^\"]*", "", page)
        assert secret not in (out / "explanation.json").read_text()


def test_labels_that_the_bundle_does_not_have_are_refused(bundle: Path, tmp_path: Path) -> None:
    for label in ("stroke", "tumour"):
        png(tmp_path / "data" / label / "1.png", 0)
    with pytest.raises(InputError, match=r"must be the bundle's classes.*has tumour: rename them"):
        explain_images(bundle, [tmp_path / "data"], tmp_path / "out")


def test_what_cannot_be_explained_leaves_nothing_behind(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"1\.png is not a PNG"):
        explain_images(bundle, [tmp_path / "1.png"], tmp_path / "out")
    with pytest.raises(InputError, match="must exist; there is no"):
        explain_images(bundle, [tmp_path / "2.png"], tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_a_folder_with_something_in_it_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="explanations go into a new folder"):
        explain_images(bundle, [png(tmp_path / "1.png", 0)], bundle)


def test_an_explanation_of_ones_own_is_replaced_by_the_next_and_by_no_mistake(
    bundle: Path, tmp_path: Path
) -> None:
    own, image = bundle / "explanation", png(tmp_path / "1.png", 0)
    explain_images(bundle, [image], own, num_tests=0)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    with pytest.raises(InputError, match="must exist; there is no"):
        explain_images(bundle, [tmp_path / "2.png"], own)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    explain_images(bundle, [png(tmp_path / "3.png", 1)], own, num_tests=0)
    names = {path.name for path in own.iterdir()}
    assert "0000-3-grad_cam.png" in names
    assert "0000-1-grad_cam.png" not in names


def verdict_of(
    share_better: float, spearman: float | None, low: float, num_images: int = 16
) -> str:
    against = {"share_better_than_random": share_better}
    tests = {
        "num_images": num_images,
        "grad_cam": {
            "deletion": against,
            "insertion": {"share_better_than_random": 1.0},
            "weights_forgotten_down_to": {"stage 1": {"spearman": spearman}},
        },
    }
    game = {"grad_cam": {"share": {"low": low}, "random_point": 0.02}}
    return judge({"tests": tests, "pointing_game": game}, "grad_cam")


def test_maps_that_fail_a_test_are_not_to_be_gone_by() -> None:
    # By chance 12 of 16 or more are better with a probability of 0.038, 11 with 0.105.
    passed = "deletion, insertion, forgotten weights, pointing game"
    assert verdict_of(12 / 16, 0.1, 0.3) == f"passes {passed}"
    assert verdict_of(11 / 16, 0.1, 0.3) == "fails deletion: do not go by its maps"
    assert verdict_of(1.0, -0.7, 0.01) == (
        "fails forgotten weights, pointing game: do not go by its maps"
    )
    # A flat map of forgotten weights is not the old one.
    assert verdict_of(1.0, None, 0.3) == f"passes {passed}"
    # All of four are better by chance once in sixteen times.
    assert verdict_of(1.0, 0.1, 0.3, num_images=4) == "passes pointing game"
    assert judge({}, "grad_cam") == "not judged: five images or more are needed"


def test_the_tests_of_maps_say_what_they_compared() -> None:
    told: list[tuple[str, int, int]] = []
    network = by_hand()
    bright = torch.zeros(3, 1, SIZE_PX, SIZE_PX)
    bright[..., 4:12, 4:12] = 1
    network.head.bias.data[1] = -1  # so that class 0 is predicted, for its bright square
    result = run_tests(network, network, bright, seed=0, progress=lambda *done: told.append(done))
    assert result["num_images"] == 3
    assert told[-1] == ("testing maps", 1, 1)
    for name in ("grad_cam", "integrated_gradients"):
        found = result[name]
        assert found["deletion"]["area"] < found["deletion"]["random_area"]
        assert found["insertion"]["area"] > found["insertion"]["random_area"]
        assert found["insertion"]["share_better_than_random"] == 1
        # The same weights again change nothing.
        forgotten = found["weights_forgotten_down_to"]
        assert list(forgotten) == ["head", "stage 2", "stage 1"]
        for values in forgotten.values():
            assert values["spearman"] == pytest.approx(1)
            assert values["num_flat_maps"] == 0


def test_the_weights_of_all_members_are_forgotten_alike() -> None:
    network, untrained = mixture(8, 4), mixture(8, 4)
    for each in untrained.members:
        each.head.weight.data = each.head.weight.data.flip(0)
    given = images(0, 1, 2)
    result = run_tests(network, untrained, given, seed=0, progress=lambda *done: None)
    targets = network(given).argmax(1)
    before, after = (grad_cam(each, given, targets).numpy() for each in (network, untrained))
    # The heads are all that they have in weights: after the first step nothing is left.
    forgotten = result["grad_cam"]["weights_forgotten_down_to"]
    assert list(forgotten) == ["head", "stage 2", "stage 1"]
    for values in forgotten.values():
        assert values["spearman"] == pytest.approx(rank_correlations(before, after).mean())


def test_the_pointing_game_takes_a_mixture() -> None:
    alone = point_at_phantoms(by_hand(), ("benign_tumor", "other"), SIZE_PX, 20, seed=0)
    pair = BundledMixture([by_hand(), by_hand()], (0.5, 0.5))
    mixed = point_at_phantoms(pair, ("benign_tumor", "other"), SIZE_PX, 20, seed=0)
    # Both logits of this one have their extremes where the image has.
    assert mixed["grad_cam"]["num_hits"] == alone["grad_cam"]["num_hits"]


def test_the_pointing_game_finds_the_lesion_where_the_network_does() -> None:
    # The first class is whatever is bright: enhancing tumours are, beside vessels and scalp.
    result = point_at_phantoms(by_hand(), ("benign_tumor", "other"), SIZE_PX, 20, seed=0)
    assert result["num_images"] == 20
    for name in ("grad_cam", "integrated_gradients"):
        assert result[name]["by_class"]["benign_tumor"]["num_images"] == 20
        assert result[name]["share"]["value"] == result[name]["num_hits"] / 20
        assert 0 < result[name]["random_point"] < 0.2
    assert json.dumps(result, allow_nan=False)


def test_a_bundle_without_a_phantom_lesion_is_refused() -> None:
    with pytest.raises(InputError, match="needs a class that phantoms show as a lesion"):
        point_at_phantoms(by_hand(), ("cat", "no_tumor"), SIZE_PX, 5, seed=0)


@pytest.mark.slow
def test_a_manifest_is_explained_tested_and_pointed_at(bundle: Path, tmp_path: Path) -> None:
    settings = PhantomSettings(num_patients=5, slices_per_patient=1, image_size_px=SIZE_PX)
    manifest = write_phantoms(settings, tmp_path / "phantoms")
    out = tmp_path / "out"
    with pytest.raises(InputError, match="does not say which they are: give the sweep's folder"):
        explain_images(bundle, [manifest], out)  # it has no splits: any image may be locked
    rows = pd.read_csv(manifest, dtype=str)
    rows.assign(split="val").to_csv(manifest, index=False)
    result = explain_images(bundle, [manifest], out, num_tests=3, num_phantoms=6)
    assert result["tests"]["num_images"] == 3
    forgotten = result["tests"]["grad_cam"]["weights_forgotten_down_to"]
    assert list(forgotten) == ["head", *(f"stage {n}" for n in (5, 4, 3, 2, 1))]
    assert result["pointing_game"]["num_images"] == 6
    assert json.loads((out / "explanation.json").read_text()) == result
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    print_explanation(console, result)
    printed = console.export_text()
    share = result["pointing_game"]["grad_cam"]["share"]["value"]
    assert re.search(rf"pointing game, 6 phantoms +{share:.3f} \[", printed)
    assert f"{result['tests']['grad_cam']['deletion']['area']:.3f} (random" in printed
    assert "grad_cam: " + result["verdicts"]["grad_cam"] in printed
    again = explain_images(bundle, [manifest], tmp_path / "again", num_tests=3, num_phantoms=6)
    assert again == result
