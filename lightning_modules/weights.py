"""Initial weights of a backbone: where they come from, and what exactly they are.

They are found once, before a sweep starts; trials get a local file and its digest. Finding files
is ``weight_files``'s, and what may stand in them ``state_dicts``'s.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lightning_modules.backbones import Backbone, freeze_below
from lightning_modules.errors import InputError
from lightning_modules.stages import IMAGENET_SIZE_PX
from lightning_modules.state_dicts import (
    digest_of,
    filled_backbone,
    match_state_dict,
    read_state_dict,
)
from lightning_modules.weight_files import IMAGENET_LICENCE, local_file, read_sidecars

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Names of a file that are recorded at most.
MAX_RECORDED_NAMES = 50


@dataclass(frozen=True, kw_only=True)
class WeightOrigin:
    """Where a backbone's initial weights came from.

    Attributes:
        origin: ``imagenet``, ``random``, or the path that the user gave.
        path: The local file that holds them; none for ``random``.
        digest: SHA-256 over the backbone's tensors (names, shapes, values), head left out; of
            ViT-B/16 as it is for images of 224 px.
        seed: What ``random`` weights were drawn from.
        passed_over: Why earlier attempts of a list could not be used.
        prefix: What the file's names have before torchvision's.
        num_matched: How many tensors the file gave.
        missing: torchvision's names that it does not have: the head's, or counters.
        num_ignored: How many of its names are no part of the backbone.
        ignored: The first of these, in alphabetical order.
        provenance: What the user says they are, in ``FILE.yaml``.
        licence: Of the weights, as far as it is known.
    """

    origin: str
    path: str | None
    digest: str
    seed: int
    passed_over: tuple[str, ...] = ()
    prefix: str = ""
    num_matched: int = 0
    missing: tuple[str, ...] = ()
    num_ignored: int = 0
    ignored: tuple[str, ...] = ()
    provenance: str | None = None
    licence: str | None = None

    @property
    def summary(self) -> str:
        """What was taken from the file, and under which licence, in one line; "" without a file."""
        if self.path is None:
            return ""
        parts = [f"{self.num_matched} tensors matched"]
        if self.prefix:
            parts[0] += f" under {self.prefix}"
        for count, kind, names in (
            (len(self.missing), "missing", self.missing),
            (self.num_ignored, "ignored", self.ignored),
        ):
            if count:
                parts.append(f"{count} {kind} (first: {names[0]})")
        if self.provenance:
            parts.append(self.provenance)
        return "; ".join([*parts, f"licence: {self.licence or 'not stated'}"])


def find_weights(
    spec: str | Sequence[str], *, backbone: str, seed: int, base: Path | None = None
) -> WeightOrigin:
    """Find the first usable initial weights, downloading them if that is what they are.

    Args:
        spec: ``imagenet`` (torchvision's own download), ``random``, the path of a state dict
            (``.pth``, ``.safetensors``) or of a folder that holds one whose name starts with the
            backbone's, or several of these, tried in order. Beside a file, ``FILE.yaml`` may say
            its ``origin`` and ``licence``, and ``FILE.license`` its licence alone.
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
            path = local_file(attempt, backbone, base or Path())
            found = WeightOrigin(
                origin=attempt,
                path=None if path is None else str(path),
                digest="",
                seed=seed,
                passed_over=tuple(failures),
            )
            return _described(found, backbone, path)
        except InputError as error:
            failures.append(str(error))
    raise InputError("; ".join(failures))


def load_weights(
    backbone: str, path: Path | None, *, seed: int, image_size_px: int = IMAGENET_SIZE_PX
) -> Backbone:
    """Build a backbone with the weights of a file, or with random ones if there is none.

    Args:
        backbone: One of ``BACKBONES``.
        path: A local file; none for random weights.
        seed: What random weights are drawn from.
        image_size_px: Height and width of the images. ViT-B/16's position embeddings, which
            ImageNet's weights have for 224 px, are interpolated bicubically to it.

    Raises:
        InputError: If the file is not a state dict of that network: keys that are foreign or
            missing, or shapes that differ, are named. The head's own keys may differ or be absent.
    """
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Backbone(backbone, image_size_px=image_size_px)
    state = read_state_dict(path)
    match = match_state_dict(backbone, state, path, image_size_px=image_size_px)
    return filled_backbone(backbone, match, image_size_px=image_size_px)


def initial_backbone(
    backbone: str,
    path: Path | None,
    *,
    seed: int,
    unfreeze_depth: int,
    image_size_px: int = IMAGENET_SIZE_PX,
) -> Backbone:
    """Return what ``load_weights`` does, frozen below a depth; read once a process.

    The frozen stages are the same modules each time, since nobody changes them; the others are
    copies of their own. Their weights are channels last.

    Args:
        backbone: One of ``BACKBONES``.
        path: A local file; none for random weights.
        seed: What random weights are drawn from.
        unfreeze_depth: Stages trained, counted from the head.
        image_size_px: Height and width of the images.

    Raises:
        InputError: As ``load_weights`` and ``freeze_below``.
    """
    initial = _initial(backbone, path, _version_of(path), seed, image_size_px)
    frozen = freeze_below(list(initial.stages), unfreeze_depth)
    memo: dict[int, object] = {id(stage): stage for stage in frozen}
    # deepcopy takes long for tensors, and for the dozen empty mappings of each module: they are
    # copied here.
    for stage in initial.stages[len(frozen) :]:
        memo |= {id(p): nn.Parameter(p.detach().clone()) for p in stage.parameters()}
        memo |= {id(buffer): buffer.clone() for buffer in stage.buffers()}
        mappings = (value for module in stage.modules() for value in vars(module).values())
        memo |= {id(value): type(value)() for value in mappings if value == {}}
    copied = copy.deepcopy(initial, memo)
    for stage in copied.stages[len(frozen) :]:
        stage.train()
    return copied


def initial_digest(
    backbone: str,
    path: Path | None,
    *,
    seed: int,
    num_stages: int,
    image_size_px: int = IMAGENET_SIZE_PX,
) -> str:
    """Return ``digest_of`` the first stages of the initial backbone; taken once a process."""
    return _initial_digest(backbone, path, _version_of(path), seed, num_stages, image_size_px)


def num_initial_backbones() -> int:
    """Return how many backbones this process keeps to copy from."""
    return _initial.cache_info().currsize


@functools.lru_cache(maxsize=4)
def _initial(
    backbone: str, path: Path | None, version: tuple[int, int], seed: int, image_size_px: int
) -> Backbone:
    initial = load_weights(backbone, path, seed=seed, image_size_px=image_size_px)
    return initial.to(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=64)
def _initial_digest(
    backbone: str,
    path: Path | None,
    version: tuple[int, int],
    seed: int,
    num_stages: int,
    image_size_px: int,
) -> str:
    initial = _initial(backbone, path, version, seed, image_size_px)
    return digest_of(initial.stages[:num_stages])


def _version_of(path: Path | None) -> tuple[int, int]:
    """Return what changes when a file does; a missing one is reported when it is read."""
    if path is None or not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _described(found: WeightOrigin, backbone: str, path: Path | None) -> WeightOrigin:
    """Complete where weights came from by what they are."""
    if path is None:
        initial = load_weights(backbone, None, seed=found.seed)
        return replace(found, digest=digest_of(initial))
    said = read_sidecars(path)
    match = match_state_dict(backbone, read_state_dict(path), path)
    licence = IMAGENET_LICENCE if found.origin == "imagenet" else said.get("licence")
    return replace(
        found,
        digest=digest_of(filled_backbone(backbone, match)),
        prefix=match.prefix,
        num_matched=match.num_matched,
        missing=match.missing,
        num_ignored=len(match.ignored),
        ignored=match.ignored[:MAX_RECORDED_NAMES],
        provenance=said.get("origin"),
        licence=licence,
    )
