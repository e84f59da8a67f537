"""Initial weights: found in order, checked key by key, known by digest, never unpickled."""

import hashlib
import http.client
import os
import pickle
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
from lightning_modules.weights import (
    WeightOrigin,
    digest_of,
    find_weights,
    from_torchvision,
    load_weights,
    read_state_dict,
    to_torchvision,
)

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
    state = make_state(name)
    backbone = load_weights(name, save(tmp_path / "w.pth", state), seed=0)
    head = nn.Linear(backbone.num_features, 1000)
    written = to_torchvision(backbone, head)
    with torch.device("meta"):
        network = build_network(name)
    network.load_state_dict(written, strict=True, assign=True)
    for key, tensor in network.state_dict().items():
        if not key.startswith(("fc.", "classifier.1.")):
            assert torch.equal(tensor, state[key]), key
    assert torch.equal(written["fc.bias" if name == "resnet50" else "classifier.1.bias"], head.bias)
    back = from_torchvision(backbone, written)
    assert back.keys() == backbone.state_dict().keys()
    assert all(torch.equal(back[key], backbone.state_dict()[key]) for key in back)


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
        ({"extra__weight": torch.ones(1)}, "1 keys foreign (first: extra.weight)"),
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
    # ResNet-50 has 318 tensors without its head, MobileNetV2 314 with its own.
    assert loading(path, "resnet50") == (
        f"weights {path} must be a state dict of torchvision's resnet50: "
        "318 keys missing (first: bn1.bias), 314 keys foreign (first: classifier.1.bias)"
    )


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        torch.ones(1),
        {"state_dict": {"a": torch.ones(1)}},
        {"lr": 0.1},
        {1: torch.ones(1)},
    ],
    ids=["list", "tensor", "nested", "numbers", "numbered"],
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


# Where they come from


def test_one_path_is_used_and_recorded(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", make_state())
    assert find_weights("w.pth", backbone=NAME, seed=3, base=tmp_path) == WeightOrigin(
        origin="w.pth", path=str(path), digest=digest_of(load_weights(NAME, path, seed=0)), seed=3
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


def test_without_a_network_the_next_entry_is_used(hub: Path, no_network: list[str]) -> None:
    found = find_weights(["imagenet", "random"], backbone=NAME, seed=0)
    assert found.origin == "random"
    assert len(no_network) == 1


# Real weights


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_real_weights_load(shared_data: Path, name: str) -> None:
    found = find_weights(str(shared_data / "weights"), backbone=name, seed=0)
    assert found.path is not None
    backbone = load_weights(name, Path(found.path), seed=0)
    assert digest_of(backbone) == found.digest
    stem = next(backbone.stages[0].parameters())
    assert stem.dtype == torch.float32
    key = STEM if name == NAME else "conv1.weight"
    assert torch.equal(stem, read_state_dict(Path(found.path))[key].float())
