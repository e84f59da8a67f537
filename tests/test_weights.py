"""Initial weights: found in order, known by digest, licensed, and the same in every trial."""

import dataclasses
import hashlib
import http.client
import json
import re
import urllib.error
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from lightning_modules.backbones import build_network
from lightning_modules.errors import InputError
from lightning_modules.stages import BACKBONES
from lightning_modules.state_dicts import digest_of, read_state_dict
from lightning_modules.weight_files import IMAGENET_WEIGHTS
from lightning_modules.weights import WeightOrigin, find_weights, initial_backbone, load_weights

State = dict[str, Tensor]
NAME = "mobilenet_v2"
# torchvision's first and last names.
STEM, LAST = "features.0.0.weight", "features.18.1.bias"


@cache
def _network_state(name: str) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build_network(name).state_dict()


def make_state(name: str = NAME, **changes: Tensor | None) -> State:
    """A state dict of torchvision's network; ``None`` takes a key out."""
    state = _network_state(name) | {key.replace("__", "."): new for key, new in changes.items()}
    return {key: tensor for key, tensor in state.items() if tensor is not None}


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


# Where they come from


def test_one_path_is_used_and_recorded(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", make_state())
    assert find_weights("w.pth", backbone=NAME, seed=3, base=tmp_path) == WeightOrigin(
        origin="w.pth",
        path=str(path),
        digest=digest_of(load_weights(NAME, path, seed=0)),
        seed=3,
        num_matched=312,
        num_ignored=2,
        ignored=("classifier.1.bias", "classifier.1.weight"),
    )


def test_a_list_is_tried_in_order_and_what_was_used_is_recorded(tmp_path: Path) -> None:
    first = save(tmp_path / "first.pth", make_state())
    second = save(tmp_path / "second.pth", make_state(features__18__1__bias=torch.ones(1280)))
    absent = str(tmp_path / "absent.pth")
    found = find_weights([absent, str(second), str(first), "random"], backbone=NAME, seed=0)
    assert found.origin == str(second)
    assert found.path == str(second)
    found = find_weights([absent, "random"], backbone=NAME, seed=4)
    assert (found.origin, found.path, found.seed) == ("random", None, 4)
    assert found.digest == digest_of(load_weights(NAME, None, seed=4))


def test_a_list_without_a_usable_entry_names_every_attempt(tmp_path: Path) -> None:
    other = save(tmp_path / "other.pth", [1])
    absent = tmp_path / "absent.pth"
    message = message_of(lambda: find_weights([str(absent), str(other)], backbone=NAME, seed=0))
    assert message == (
        "weights must be imagenet, random, a state dict file, or a folder of them; nothing at "
        f"{absent}; weights {other} must be a state dict (a flat mapping of names to tensors); "
        "save `model.state_dict()`"
    )


@pytest.mark.parametrize("file", ["mobilenet_v2.pth", "mobilenet_v2-b0353104.safetensors"])
def test_a_folder_is_searched_for_the_backbones_name(tmp_path: Path, file: str) -> None:
    path = save(tmp_path / file, make_state())
    (tmp_path / "resnet50.pth").write_bytes(b"another network")
    (tmp_path / "mobilenet_v2.md").write_text("another kind of file")
    found = find_weights(str(tmp_path), backbone=NAME, seed=0)
    assert (found.origin, found.path) == (str(tmp_path), str(path))


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_must_hold_one_file_of_the_backbone(tmp_path: Path, count: int) -> None:
    for index in range(count):
        (tmp_path / f"mobilenet_v2-{index}.pth").touch()
    (tmp_path / "resnet50.pth").touch()
    message = message_of(lambda: find_weights(str(tmp_path), backbone=NAME, seed=0))
    assert message == (
        f"weights folder {tmp_path} must hold one file named mobilenet_v2*.pth or "
        f"mobilenet_v2*.safetensors; found {count}"
    )


def test_random_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = digest_of(load_weights(NAME, None, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert digest_of(load_weights(NAME, None, seed=5)) == one
    assert digest_of(load_weights(NAME, None, seed=6)) != one


def test_a_trials_weights_are_channels_last_and_its_own_where_trained() -> None:
    one, other = (
        initial_backbone("resnet50", None, seed=0, unfreeze_depth=1, image_size_px=32)
        for _ in range(2)
    )
    assert one.stages[3] is other.stages[3]
    trained, others = (net.stages[4][0][0].conv2.weight for net in (one, other))
    assert trained.shape == (512, 512, 3, 3)
    assert trained.requires_grad
    assert trained.data_ptr() != others.data_ptr()
    assert torch.equal(trained, others)
    for weight in (trained, one.stages[3][0][0].conv2.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


def test_the_digest_changes_with_one_bit_a_name_a_type_or_a_shape() -> None:
    def digest(name: str = "a", **changes: Any) -> str:
        module = nn.Module()
        tensor = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(changes.get("dtype", torch.float32))
        tensor.view(torch.uint8)[5] ^= changes.get("bit", 0)
        module.register_buffer(name, tensor.view(changes.get("shape", (4,))))
        return digest_of(module)

    digests = [
        digest(),
        digest(bit=1),
        digest("b"),
        digest(dtype=torch.float64),
        digest(shape=(2, 2)),
    ]
    assert digests[0] == digest()
    assert len(set(digests)) == len(digests)


def test_the_digest_is_the_written_out_one_and_does_not_see_the_memory_layout() -> None:
    module = nn.Module()
    tensor = torch.arange(16, dtype=torch.float32).view(1, 2, 2, 4)
    module.register_buffer("b", torch.tensor([7]))
    module.register_buffer("a", tensor.to(memory_format=torch.channels_last))
    expected = hashlib.sha256(
        b"a torch.float32 (1, 2, 2, 4)\n"
        + tensor.numpy().tobytes()
        + b"b torch.int64 (1,)\n"
        + (7).to_bytes(8, "little")
    )
    assert digest_of(module) == expected.hexdigest()


# What they are said to be


@pytest.mark.parametrize(
    ("files", "provenance", "licence"),
    [
        ({}, None, None),
        ({".license": "\nSome Licence, version 2\nYou may\n"}, None, "Some Licence, version 2"),
        (
            {".license": "Copyright 2022\nSPDX-License-Identifier: CC-BY-NC-4.0\n"},
            None,
            "CC-BY-NC-4.0",
        ),
        ({".yaml": "origin: RadImageNet\nlicence: MIT"}, "RadImageNet", "MIT"),
        ({".yaml": "license: MIT\nepochs: 3"}, None, "MIT"),
        ({".license": "GPL", ".yaml": "origin: >\n  two\n  lines"}, "two lines", "GPL"),
        ({".license": "GPL", ".yaml": "licence: MIT"}, None, "MIT"),
        ({".yaml": 'origin: "a\\e[31mb\\u202Ec"\nlicence: 3'}, "a[31mbc", None),
        ({".license": "x" * 600}, None, "x" * 500),
        ({".license": "", ".yaml": "{}"}, None, None),
    ],
)
def test_origin_and_licence_come_from_files_beside_the_weights(
    tmp_path: Path, files: dict[str, str], provenance: str | None, licence: str | None
) -> None:
    path = save(tmp_path / "w.pth", make_state())
    for suffix, text in files.items():
        (tmp_path / f"w.pth{suffix}").write_text(text)
    found = find_weights(str(path), backbone=NAME, seed=0)
    assert (found.provenance, found.licence) == (provenance, licence)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("w.pth.yaml", b"a: [", "must be YAML; "),
        ("w.pth.yaml", b"- MIT", "must be a mapping with origin, licence, or both; got a list"),
        ("w.pth.yaml", b"!!python/object/apply:os.mkdir [x]", "must be YAML; line 1: tags are "),
        ("w.pth.yaml", b"[" * 9999, "must be YAML; "),
        ("w.pth.license", b"\xff\xfe", "must be text in UTF-8; "),
        ("w.pth.license", b" " * 65537, "must be below 64 KiB; is it about these weights?"),
    ],
)
def test_a_damaged_file_beside_the_weights_gives_one_line(
    tmp_path: Path, name: str, content: bytes, rule: str
) -> None:
    path = save(tmp_path / "w.pth", make_state())
    (tmp_path / name).write_bytes(content)
    message = message_of(lambda: find_weights(str(path), backbone=NAME, seed=0))
    assert message.startswith(f"{tmp_path / name} {rule}")


def test_where_weights_came_from_survives_the_record_and_is_one_line(tmp_path: Path) -> None:
    state = {f"module.{key}": tensor for key, tensor in make_state().items()}
    state |= {f"head.{number:03}": torch.ones(1) for number in range(60)}
    path = save(tmp_path / "w.pth", state)
    (tmp_path / "w.pth.yaml").write_text("origin: LVM-Med\nlicence: CC-BY-NC-4.0")
    found = find_weights(str(path), backbone=NAME, seed=0)
    assert (found.num_ignored, len(found.ignored)) == (62, 50)  # the record takes no endless list
    assert found.summary == (
        "312 tensors matched under module.; 62 ignored (first: head.000); LVM-Med; "
        "licence: CC-BY-NC-4.0"
    )
    fact = json.loads(json.dumps(dataclasses.asdict(found)))
    assert WeightOrigin(**fact).summary == found.summary
    old = {key: fact[key] for key in ("origin", "path", "digest", "seed", "passed_over")}
    assert WeightOrigin(**old).summary == "0 tensors matched; licence: not stated"
    assert find_weights("random", backbone=NAME, seed=0).summary == ""


# torchvision's download


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torch.hub keeps its files, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No connection can be made; lists the addresses that were asked for."""
    asked = []

    def refuse(url: str, dst: str, **_: object) -> None:
        asked.append(url)
        Path(dst).write_bytes(b"torn")
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return asked


def served(path: Path, state: State) -> SimpleNamespace:
    """What torchvision would say of a file that lies on this machine, named by its hash."""
    torch.save(state, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(path.with_name(f"mobilenet_v2-{sha256[:8]}.pth"))
    return SimpleNamespace(url=path.as_uri())


def test_without_a_network_one_line_says_how_to_supply_a_file(
    hub: Path, no_network: list[str]
) -> None:
    message = message_of(lambda: find_weights("imagenet", backbone="resnet50", seed=0))
    assert message == (
        "imagenet weights of resnet50 could not be downloaded (<urlopen error Network is "
        f"unreachable>): put torchvision's resnet50-0676ba61.pth into {hub}, or give a state dict "
        "with `--weights FILE_OR_FOLDER`, or start from `--weights random`"
    )
    assert no_network == ["https://download.pytorch.org/models/resnet50-0676ba61.pth"]
    assert list(hub.iterdir()) == []  # what was torn is gone


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionResetError("peer"),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b"torn", 99),
        RuntimeError("invalid hash value"),
        KeyboardInterrupt(),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_download_that_breaks_off_leaves_no_file(
    hub: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def break_off(url: str, dst: str, **_: object) -> None:
        Path(dst).write_bytes(b"torn")
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", break_off)
    kind = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else InputError
    with pytest.raises(kind):
        find_weights("imagenet", backbone=NAME, seed=0)
    assert list(hub.iterdir()) == []


def test_a_file_of_the_wrong_hash_in_the_hubs_folder_is_not_used(
    hub: Path, no_network: list[str]
) -> None:
    hub.mkdir(parents=True)
    save(hub / "mobilenet_v2-b0353104.pth", make_state())
    message = message_of(lambda: find_weights("imagenet", backbone=NAME, seed=0))
    assert message.startswith("imagenet weights of mobilenet_v2 could not be downloaded")
    assert no_network == ["https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"]


def test_a_download_is_used_and_then_found_without_a_network(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    weights = served(tmp_path / "served.pth", state)
    monkeypatch.setattr(torchvision.models, "get_weight", lambda _: weights)
    first = find_weights("imagenet", backbone=NAME, seed=0)
    assert [path.name for path in hub.iterdir()] == [weights.url.rsplit("/", 1)[1]]
    assert first.origin == "imagenet"
    assert first.licence is not None
    assert first.licence.startswith("BSD-3-Clause (torchvision)")
    assert torch.equal(read_state_dict(Path(str(first.path)))[STEM], state[STEM])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    assert find_weights("imagenet", backbone=NAME, seed=0) == first


def test_a_download_of_the_wrong_hash_is_refused(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = served(tmp_path / "served.pth", make_state())
    path = Path(weights.url.removeprefix("file://"))
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.setattr(torchvision.models, "get_weight", lambda _: weights)
    message = message_of(lambda: find_weights("imagenet", backbone=NAME, seed=0))
    assert "could not be downloaded (invalid hash value (expected" in message
    assert list(hub.iterdir()) == []


def test_each_backbone_has_a_download_of_its_own_that_names_its_hash() -> None:
    urls = [torchvision.models.get_weight(IMAGENET_WEIGHTS[name]).url for name in BACKBONES]
    names = [url.rsplit("/", 1)[1] for url in urls]
    for name, file in zip(BACKBONES, names, strict=True):
        assert re.fullmatch(rf"{name}\w*-[0-9a-f]{{8}}\.pth", file)


def test_without_a_network_the_next_entry_is_used(hub: Path, no_network: list[str]) -> None:
    found = find_weights(["imagenet", "random"], backbone=NAME, seed=0)
    assert found.origin == "random"
    assert len(no_network) == 1


# Real weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_real_weights_load(shared_data: Path, name: str) -> None:
    found = find_weights(str(shared_data / "weights"), backbone=name, seed=0)
    assert found.path is not None
    backbone = load_weights(name, Path(found.path), seed=0)
    assert digest_of(backbone) == found.digest
    stem = next(backbone.stages[0].parameters())
    assert stem.dtype == torch.float32
    key = STEM if name == NAME else "conv1.weight"
    assert torch.equal(stem, read_state_dict(Path(found.path))[key].float())
