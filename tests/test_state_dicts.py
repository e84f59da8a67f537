"""State dicts: read without unpickling, matched key by key under whatever names they have."""

import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from lightning_modules.backbones import build_network
from lightning_modules.errors import InputError
from lightning_modules.stages import BACKBONES, HEAD_MODULE
from lightning_modules.state_dicts import (
    digest_of,
    from_torchvision,
    match_state_dict,
    read_state_dict,
    to_torchvision,
)
from lightning_modules.weights import find_weights, load_weights

State = dict[str, Tensor]
NAME = "mobilenet_v2"
# torchvision's first and last names, and one of the third stage.
STEM, LAST, MIDDLE = "features.0.0.weight", "features.18.1.bias", "features.5.conv.0.0.weight"

OBJECTS = "weights {} must hold tensors only (no pickled objects); save `model.state_dict()`"


@cache
def _network_state(name: str) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build_network(name).state_dict()


def make_state(name: str = NAME, **changes: Tensor | None) -> State:
    """A state dict of torchvision's network; ``None`` takes a key out."""
    state = _network_state(name) | {key.replace("__", "."): new for key, new in changes.items()}
    return {key: tensor for key, tensor in state.items() if tensor is not None}


def constants(name: str, network: nn.Module | None = None) -> State:
    """A state dict whose tensors are a number each, repeated: they take four bytes in a file."""
    if network is None:
        with torch.device("meta"):
            network = build_network(name)
    return {
        key: torch.tensor(float(index)).to(tensor.dtype).expand(tensor.shape)
        for index, (key, tensor) in enumerate(network.state_dict().items())
    }


def save(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        function()
    assert str(error.value).isprintable()  # no line break is
    return str(error.value)


def loading(path: Path, backbone: str = NAME) -> str:
    return message_of(lambda: load_weights(backbone, path, seed=0))


# Files that are state dicts


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_file_loads_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    state = make_state()
    backbone = load_weights(NAME, save(tmp_path / f"w{suffix}", state), seed=0)
    assert torch.equal(backbone.stages[0][0][0].weight, state[STEM])
    assert torch.equal(backbone.stages[4][4][1].bias, state[LAST])
    assert torch.equal(backbone.stages[2][1].conv[0][0].weight, state[MIDDLE])


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_and_a_head_load_strictly_into_torchvisions_network(
    tmp_path: Path, name: str
) -> None:
    state = constants(name)
    backbone = load_weights(name, save(tmp_path / "w.pth", state), seed=0)
    head = nn.Linear(backbone.num_features, 1000)
    written = to_torchvision(backbone, head)
    with torch.device("meta"):
        network = build_network(name)
    network.load_state_dict(written, strict=True, assign=True)
    own_head = f"{HEAD_MODULE[name]}."
    for key, tensor in network.state_dict().items():
        if not key.startswith(own_head):
            assert torch.equal(tensor, state[key]), key
    assert torch.equal(written[f"{own_head}bias"], head.bias)
    back = from_torchvision(backbone, written)
    own = backbone.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in back)


@pytest.mark.parametrize(
    "head",
    [
        {"classifier__1__weight": torch.ones(5, 1280), "classifier__1__bias": torch.ones(5)},
        {"classifier__1__weight": None, "classifier__1__bias": None},
    ],
    ids=["of another size", "absent"],
)
def test_the_head_of_a_file_does_not_matter(tmp_path: Path, head: dict[str, Tensor | None]) -> None:
    with_head = load_weights(NAME, save(tmp_path / "a.pth", make_state()), seed=0)
    without = load_weights(NAME, save(tmp_path / "b.pth", make_state(**head)), seed=0)
    assert digest_of(without) == digest_of(with_head)


def test_a_half_precision_file_is_cast(tmp_path: Path) -> None:
    half = {
        key: tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in make_state().items()
    }
    backbone = load_weights(NAME, save(tmp_path / "w.pth", half), seed=0)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert torch.equal(backbone.stages[0][0][0].weight, make_state()[STEM].half().float())
    assert backbone.stages[0][0][1].num_batches_tracked.dtype == torch.int64


def test_loading_a_file_draws_no_random_numbers(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", make_state())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_weights(NAME, path, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


# Files that are not


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"features__18__2__weight": torch.ones(1)},
            "1 keys foreign (first: features.18.2.weight)",
        ),
        (
            {"features__0__0__weight": None, "features__18__1__bias": None},
            "2 keys missing (first: features.0.0.weight)",
        ),
        (
            {"features__18__1__bias": torch.ones(7)},
            "1 keys of another shape (first: features.18.1.bias)",
        ),
        (
            {"features__18__1__bias": None, "features__18__1__bia": torch.ones(1280)},
            "1 keys missing (first: features.18.1.bias), 1 keys foreign (first: features.18.1.bia)",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_says_where(
    tmp_path: Path, changes: dict[str, Tensor | None], found: str
) -> None:
    path = save(tmp_path / "w.pth", make_state(**changes))
    assert loading(path) == (
        f"weights {path} must be a state dict of torchvision's mobilenet_v2: {found}"
    )


def test_a_state_dict_of_the_other_network_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", make_state())
    # ResNet-50 has 265 tensors without its head and counters, MobileNetV2 314 with its own.
    assert loading(path, "resnet50") == (
        f"weights {path} must be a state dict of torchvision's resnet50: "
        "265 keys missing (first: bn1.bias), 314 keys foreign (first: classifier.1.bias)"
    )


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        torch.ones(1),
        {"network": {"a": torch.ones(1)}},
        {"state_dict": {"a": torch.ones(1), "b": 2}},
        {"lr": 0.1},
        {1: torch.ones(1)},
        {"a\nb": torch.ones(1)},
        {"a" * 301: torch.ones(1)},
        {"a": torch.ones(1, device="meta")},
    ],
    ids=[
        "list",
        "tensor",
        "unknown nested",
        "nested numbers",
        "numbers",
        "numbered",
        "two lines",
        "endless",
        "empty",
    ],
)
def test_what_is_not_a_mapping_of_tensors_says_how_to_make_one(
    tmp_path: Path, content: object
) -> None:
    path = save(tmp_path / "w.pth", content)
    assert loading(path) == (
        f"weights {path} must be a state dict (a flat mapping of names to tensors); save "
        "`model.state_dict()`"
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_torn_file_gives_one_line(tmp_path: Path, suffix: str, share: float) -> None:
    path = save(tmp_path / f"w{suffix}", {"a": torch.ones(10_000)})
    os.truncate(path, int(share * path.stat().st_size))
    message = message_of(lambda: read_state_dict(path))
    assert message.startswith(f"weights {path} ")


def test_text_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_text("<!DOCTYPE html>\n<p>404\n")
    assert message_of(lambda: read_state_dict(path)) == OBJECTS.format(path)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["torch", "old torch", "bare pickle"])
def test_an_object_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    content = {"a": torch.ones(1), "b": Payload(trace)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    message = message_of(lambda: read_state_dict(path))
    assert message == OBJECTS.format(path)
    assert not trace.exists()
    # The file is what it is meant to be: whoever unpickles it makes the folder.
    if form == "bare pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.is_dir()


def test_a_missing_file_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    assert loading(path) == f"weights must be a file; nothing at {path}"


# Files whose names are others


@cache
def _resnet_layouts() -> dict[str, State]:
    """ResNet-50s as other software names them: each value is the index in torchvision's order."""
    named = constants("resnet50")
    with torch.device("meta"):
        numbered = nn.Module()
        numbered.backbone = nn.Sequential(*list(build_network("resnet50").children())[:9])
        sequential = nn.Sequential(*build_network("resnet50").children())
    projections = {
        "module.projector.0.weight": torch.ones(3),
        "module.projector.2.bias": torch.ones(4),
        "queue": torch.ones(2, 2),
    }
    return {
        "named": named,
        "numbered": constants("", numbered),
        "numbered, no prefix": constants("", sequential),
        "data parallel": {f"module.{key}": tensor for key, tensor in named.items()},
        "model": {f"model.{key}": tensor for key, tensor in named.items()},
        "encoder": {f"module.encoder.{key}": tensor for key, tensor in named.items()} | projections,
    }


@pytest.mark.parametrize(
    ("layout", "prefix", "missing", "ignored"),
    [
        ("named", "", (), ("fc.bias", "fc.weight")),
        ("numbered", "backbone.", ("fc.weight", "fc.bias"), ()),
        ("numbered, no prefix", "", (), ("9.bias", "9.weight")),
        ("data parallel", "module.", (), ("module.fc.bias", "module.fc.weight")),
        ("model", "model.", (), ("model.fc.bias", "model.fc.weight")),
        (
            "encoder",
            "module.encoder.",
            (),
            (
                *("module.encoder.fc.bias", "module.encoder.fc.weight"),
                *("module.projector.0.weight", "module.projector.2.bias", "queue"),
            ),
        ),
    ],
)
def test_a_prefix_is_stripped_and_heads_are_ignored(
    tmp_path: Path, layout: str, prefix: str, missing: tuple[str, ...], ignored: tuple[str, ...]
) -> None:
    path = save(tmp_path / "w.pth", _resnet_layouts()[layout])
    match = match_state_dict("resnet50", read_state_dict(path), path)
    assert (match.prefix, match.num_matched) == (prefix, 318)
    assert (match.missing, match.ignored) == (missing, ignored)
    expected = constants("resnet50")
    assert match.state.keys() == expected.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(match.state[key], expected[key]) for key in match.state)


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state_dict"])
def test_a_network_is_found_beside_its_optimizer(tmp_path: Path, container: str) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    checkpoint = {
        "epoch": 300,
        "arch": "resnet50",
        "optimizer": optimizer.state_dict(),
        container: _resnet_layouts()["encoder"],
    }
    found = find_weights(str(save(tmp_path / "lvm.pth", checkpoint)), backbone="resnet50", seed=0)
    plain = save(tmp_path / "plain.pth", constants("resnet50"))
    assert found.digest == digest_of(load_weights("resnet50", plain, seed=0))
    assert (found.prefix, found.num_matched, found.missing) == ("module.encoder.", 318, ())
    assert found.num_ignored == 5
    assert found.ignored[-1] == "queue"


def test_counters_that_an_old_file_does_not_have_are_zero_and_listed(tmp_path: Path) -> None:
    state = {key: t for key, t in constants(NAME).items() if "num_batches" not in key}
    path = save(tmp_path / "w.pth", state)
    match = match_state_dict(NAME, state, path)
    assert (match.num_matched, len(match.missing)) == (260, 52)  # five tensors a norm, less one
    assert {key.rsplit(".", 1)[1] for key in match.missing} == {"num_batches_tracked"}
    assert load_weights(NAME, path, seed=0).stages[0][0][1].num_batches_tracked.item() == 0


def test_a_deeper_network_of_the_same_names_is_not_cut_short(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", constants("resnet152"))
    # 34 blocks more, of three convolutions and norms: 3 + 3 * 5 tensors each.
    assert loading(path, "resnet50") == (
        f"weights {path} must be a state dict of torchvision's resnet50: "
        "612 keys foreign (first: layer2.4.bn1.bias)"
    )


def test_a_weight_that_is_missing_under_a_prefix_is_named_as_torchvision_does(
    tmp_path: Path,
) -> None:
    state = dict(_resnet_layouts()["numbered"])
    del state["backbone.4.0.conv1.weight"]
    path = save(tmp_path / "w.pth", state)
    assert loading(path, "resnet50") == (
        f"weights {path} must be a state dict of torchvision's resnet50: "
        "1 keys missing (first: layer1.0.conv1.weight)"
    )


def test_two_whole_networks_in_one_file_are_not_chosen_between(tmp_path: Path) -> None:
    both = {
        f"{encoder}.{key}": tensor
        for encoder in ("encoder_q", "encoder_k")
        for key, tensor in constants("resnet50").items()
    }
    path = save(tmp_path / "w.pth", both)
    assert loading(path, "resnet50") == (
        f"weights {path} must hold one network; got 2 of that kind, under encoder_k. and "
        "encoder_q.: save the state dict of one of them"
    )


@pytest.mark.parametrize("count", [0, 3, 160])
def test_part_of_a_network_is_refused(tmp_path: Path, count: int) -> None:
    state = dict(list(_resnet_layouts()["data parallel"].items())[:count])
    message = loading(save(tmp_path / "w.pth", state), "resnet50")
    assert message.startswith(f"weights {tmp_path}/w.pth must be a state dict of torchvision's")
    assert " keys missing (first: " in message


# Position embeddings


def vit_state(side: int) -> State:
    """ViT-B/16's state dict for an image of so many patches a side, each position another value."""
    positions = torch.arange(side**2 + 1.0) ** 2 / 100
    return constants("vit_b_16") | {
        "encoder.pos_embedding": positions[None, :, None].repeat(1, 1, 768)
    }


def test_position_embeddings_of_the_images_size_stay_as_they_are() -> None:
    state = vit_state(14)
    match = match_state_dict("vit_b_16", state, Path("w.pth"), image_size_px=224)
    assert torch.equal(match.state["encoder.pos_embedding"], state["encoder.pos_embedding"])


def test_position_embeddings_are_interpolated_bicubically() -> None:
    state = vit_state(14)
    # 27 positions between the same corners: every second one is one of the 14.
    match = match_state_dict("vit_b_16", state, Path("w.pth"), image_size_px=27 * 16)
    positions = match.state["encoder.pos_embedding"]
    assert positions.shape == (1, 27**2 + 1, 768)
    assert torch.equal(positions[0, 0], state["encoder.pos_embedding"][0, 0])  # the class token's
    before = state["encoder.pos_embedding"][0, 1:, 0].view(14, 14)
    after = positions[0, 1:, 0].view(27, 27)
    torch.testing.assert_close(after[::2, ::2], before)
    # Halfway, Keys' cubic with a = -0.75 weighs four neighbours -3/32, 19/32, 19/32, -3/32.
    row = before[5]
    halfway = 19 / 32 * (row[4] + row[5]) - 3 / 32 * (row[3] + row[6])
    torch.testing.assert_close(after[10, 9], halfway)


@pytest.mark.parametrize(
    "positions",
    [
        torch.ones(1, 196, 768),  # the class token's is missing
        torch.ones(1, 197, 384),
        torch.ones(197, 768),
        torch.ones(1, 1, 768),
        torch.ones(1, 1, 768).expand(1, 1 + 10**10, 768),  # four bytes a value, none of them there
    ],
    ids=["no class token", "narrow", "flat", "no patches", "huge"],
)
def test_position_embeddings_of_another_kind_are_refused(positions: Tensor) -> None:
    state = vit_state(14) | {"encoder.pos_embedding": positions}
    message = message_of(lambda: match_state_dict("vit_b_16", state, Path("w.pth")))
    assert message == (
        "weights w.pth must be a state dict of torchvision's vit_b_16: "
        "1 keys of another shape (first: encoder.pos_embedding)"
    )


@pytest.mark.slow
def test_interpolated_weights_are_torchvisions_own_at_that_size(tmp_path: Path) -> None:
    backbone = load_weights("vit_b_16", None, seed=0, image_size_px=64)
    path = save(tmp_path / "w.pth", to_torchvision(backbone, nn.Linear(768, 5)))
    again = load_weights("vit_b_16", path, seed=1, image_size_px=64)
    assert digest_of(again) == digest_of(backbone)
    larger = load_weights("vit_b_16", path, seed=1, image_size_px=96)
    network = torchvision.models.vit_b_16(image_size=96, num_classes=5).eval()
    network.load_state_dict(to_torchvision(larger, nn.Linear(768, 5)), strict=True)
    network.heads = nn.Identity()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(larger.eval()(images), network(images))
