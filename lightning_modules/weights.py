"""Initial weights of a backbone: where they come from, and what exactly they are.

They are found once, before a sweep starts; trials get a local file and its digest.
"""

import copy
import functools
import hashlib
import http.client
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from lightning_modules.backbones import Backbone, build_network, freeze_below
from lightning_modules.errors import InputError
from lightning_modules.files import sha256_of
from lightning_modules.stages import HEAD_MODULE

# The recipe of the published comparisons: torchvision's first weights, not the longer second one.
IMAGENET_WEIGHTS = {
    "mobilenet_v2": "MobileNet_V2_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True, kw_only=True)
class WeightOrigin:
    """Where a backbone's initial weights came from.

    Attributes:
        origin: ``imagenet``, ``random``, or the path that the user gave.
        path: The local file that holds them; none for ``random``.
        digest: SHA-256 over the backbone's tensors (names, shapes, values), head left out.
        seed: What ``random`` weights were drawn from.
        passed_over: Why earlier attempts of a list could not be used.
    """

    origin: str
    path: str | None
    digest: str
    seed: int
    passed_over: tuple[str, ...] = ()


def find_weights(
    spec: str | Sequence[str], *, backbone: str, seed: int, base: Path | None = None
) -> WeightOrigin:
    """Find the first usable initial weights, downloading them if that is what they are.

    Args:
        spec: ``imagenet`` (torchvision's own download), ``random``, the path of a state dict
            (``.pth``, ``.safetensors``) or of a folder that holds one whose name starts with the
            backbone's, or several of these, tried in order.
        backbone: One of ``BACKBONES``.
        seed: What random weights are drawn from.
        base: The folder that relative paths start from; the current one if none.

    Raises:
        InputError: If none can be had. One line names each attempt and says how to supply a file.
    """
    attempts = [spec] if isinstance(spec, str) else list(spec)
    failures: list[str] = []
    for attempt in attempts:
        try:
            path = _local_file(attempt, backbone, base or Path())
            return WeightOrigin(
                origin=attempt,
                path=None if path is None else str(path),
                digest=digest_of(load_weights(backbone, path, seed=seed)),
                seed=seed,
                passed_over=tuple(failures),
            )
        except InputError as error:
            failures.append(str(error))
    raise InputError("; ".join(failures))


def load_weights(backbone: str, path: Path | None, *, seed: int) -> Backbone:
    """Build a backbone with the weights of a file, or with random ones if there is none.

    Raises:
        InputError: If the file is not a state dict of that network: keys that are foreign or
            missing, or shapes that differ, are named. The head's own keys may differ or be absent.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = Backbone(backbone)
    if path is not None:
        built.load_state_dict(_backbone_state(built, read_state_dict(path), path))
    return built


def initial_backbone(
    backbone: str, path: Path | None, *, seed: int, unfreeze_depth: int
) -> Backbone:
    """Return what ``load_weights`` does, frozen below a depth; read once a process.

    The frozen stages are the same modules each time, since nobody changes them; the others are
    copies of their own.

    Args:
        backbone: One of ``BACKBONES``.
        path: A local file; none for random weights.
        seed: What random weights are drawn from.
        unfreeze_depth: Stages trained, counted from the head.

    Raises:
        InputError: As ``load_weights`` and ``freeze_below``.
    """
    initial = _initial(backbone, path, _version_of(path), seed)
    frozen = freeze_below(list(initial.stages), unfreeze_depth)
    copied = copy.deepcopy(initial, memo={id(stage): stage for stage in frozen})
    for stage in copied.stages[len(frozen) :]:
        stage.requires_grad_(True).train()
    return copied


def initial_digest(backbone: str, path: Path | None, *, seed: int, num_stages: int) -> str:
    """Return ``digest_of`` the first stages of the initial backbone; taken once a process."""
    return _initial_digest(backbone, path, _version_of(path), seed, num_stages)


def num_initial_backbones() -> int:
    """Return how many backbones this process keeps to copy from."""
    return _initial.cache_info().currsize


@functools.lru_cache(maxsize=4)
def _initial(backbone: str, path: Path | None, version: tuple[int, int], seed: int) -> Backbone:
    return load_weights(backbone, path, seed=seed)


@functools.lru_cache(maxsize=64)
def _initial_digest(
    backbone: str, path: Path | None, version: tuple[int, int], seed: int, num_stages: int
) -> str:
    return digest_of(_initial(backbone, path, version, seed).stages[:num_stages])


def _version_of(path: Path | None) -> tuple[int, int]:
    """Return what changes when a file does; a missing one is reported when it is read."""
    if path is None or not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict without unpickling anything but tensors.

    Raises:
        InputError: If the file is missing, torn, or holds anything but a mapping of tensors.
    """
    if not path.is_file():
        raise InputError(f"weights must be a file; nothing at {path}")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"weights {path} cannot be read: {_first_line(error)}") from error
    except Exception as error:  # torch raises pickle.UnpicklingError and bare ones of its own
        # Not torch's words: they advise to load the file all the same.
        raise InputError(
            f"weights {path} must hold tensors only (no pickled objects); save `model.state_dict()`"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(
            f"weights {path} must be a state dict (a flat mapping of names to tensors); save "
            "`model.state_dict()`"
        )
    return dict(state)


def digest_of(module: torch.nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers: names, types, shapes, values."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def to_torchvision(backbone: Backbone, head: torch.nn.Linear) -> dict[str, Tensor]:
    """Return the state dict that torchvision's own network with this head would have."""
    state = {}
    names = list(backbone.torchvision_names())
    for name, tensor in backbone.state_dict().items():
        ours, theirs = next(pair for pair in names if name.startswith(pair[0]))
        state[theirs + name.removeprefix(ours)] = tensor
    for name, tensor in head.state_dict().items():
        state[f"{HEAD_MODULE[backbone.name]}.{name}"] = tensor
    return state


def from_torchvision(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's part of a torchvision state dict under the backbone's own names."""
    ours_of = {theirs: ours for ours, theirs in backbone.torchvision_names()}
    prefixes = tuple(ours_of)
    return {
        ours_of[prefix] + name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }


def _local_file(attempt: str, backbone: str, base: Path) -> Path | None:
    if attempt == "random":
        return None
    if attempt == "imagenet":
        return _download_imagenet(backbone)
    path = base / Path(attempt).expanduser()
    if path.is_dir():
        found = sorted(
            entry
            for entry in path.iterdir()
            if entry.name.startswith(backbone) and entry.suffix in SUFFIXES
        )
        if len(found) != 1:
            raise InputError(
                f"weights folder {path} must hold one file named {backbone}*.pth or "
                f"{backbone}*.safetensors; found {len(found)}"
            )
        path = found[0]
    if not path.is_file():
        raise InputError(
            f"weights must be imagenet, random, a state dict file, or a folder of them; "
            f"nothing at {path}"
        )
    return path.resolve()


def _download_imagenet(backbone: str) -> Path:
    """Return torchvision's file in torch.hub's folder, downloaded and checked if not yet there."""
    url: str = torchvision.models.get_weight(IMAGENET_WEIGHTS[backbone]).url
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    # torchvision names its files by the first eight digits of their SHA-256.
    expected = path.stem.rsplit("-", 1)[1]
    if path.is_file() and sha256_of(path).startswith(expected):
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    timeout_s = socket.getdefaulttimeout()
    try:
        # torch.hub sets none: where a firewall swallows the connection it would wait for minutes.
        socket.setdefaulttimeout(30)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Straight to a name of our own: a download that breaks off leaves no file that looks whole.
        torch.hub.download_url_to_file(url, str(partial), hash_prefix=expected, progress=False)
        partial.replace(path)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise InputError(
            f"imagenet weights of {backbone} could not be downloaded ({_first_line(error)}): put "
            f"torchvision's {path.name} into {path.parent}, or give a state dict with "
            f"`--weights FILE_OR_FOLDER`, or start from `--weights random`"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_s)
        partial.unlink(missing_ok=True)
    return path


def _backbone_state(
    backbone: Backbone, state: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Check a torchvision state dict against the network and return the backbone's part of it."""
    with torch.device("meta"):  # names, types, and shapes: no values, no random numbers
        network = build_network(backbone.name)
    expected = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith(HEAD_MODULE[backbone.name])
    }
    given = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(HEAD_MODULE[backbone.name])
    }
    wrong = {
        "missing": sorted(expected.keys() - given.keys()),
        "foreign": sorted(given.keys() - expected.keys()),
        "of another shape": sorted(
            name
            for name in expected.keys() & given.keys()
            if expected[name].shape != given[name].shape
        ),
    }
    if any(wrong.values()):
        found = ", ".join(
            f"{len(names)} keys {kind} (first: {names[0]})"
            for kind, names in wrong.items()
            if names
        )
        raise InputError(
            f"weights {path} must be a state dict of torchvision's {backbone.name}: {found}"
        )
    # Half-precision files are cast: the network is float32.
    return from_torchvision(
        backbone, {name: tensor.to(expected[name].dtype) for name, tensor in given.items()}
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
