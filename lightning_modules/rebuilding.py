"""A bundle's network rebuilt in torch, from its safetensors file and ``config.json`` alone."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.bundle import Bundle, load_bundle
from lightning_modules.bundled_mixture import Bundled, BundledMixture
from lightning_modules.bundled_network import BundledNetwork
from lightning_modules.calibration import softmax
from lightning_modules.errors import InputError
from lightning_modules.stages import HEAD_MODULE
from lightning_modules.state_dicts import filled_backbone, match_state_dict, read_state_dict

# The largest difference of a probability between a mixture and model.onnx, on images of noise.
# Rounding makes one of 1e-5; a share that is wrong by less changes no map to speak of.
TOLERANCE = 0.01

_NUM_NOISE_IMAGES = 4


def load_network(folder: Path) -> Bundled:
    """Rebuild a bundle's network, without its sweep.

    Its logits are those of ``model.onnx`` up to rounding.

    Args:
        folder: What ``neurosweep export`` or ``neurosweep ensemble`` wrote.

    Raises:
        InputError: If the folder is no bundle, a file is not the one that was exported, or the
            weights are not those of the backbones and classes in ``config.json``.
    """
    bundle = load_bundle(folder)
    path = folder / "model.safetensors"
    name = bundle.config.get("backbone")
    if name != "ensemble":
        return _network(name, read_state_dict(path), bundle, path)
    backbones, weights = _members(bundle, folder)
    states: dict[str, dict[str, Tensor]] = {
        f"members.{number}": {} for number in range(len(backbones))
    }
    num_others = 0
    for key, tensor in read_state_dict(path).items():
        parts = key.split(".", 2)
        own = states.get(".".join(parts[:2]))
        if own is None or len(parts) < 3:
            num_others += 1
        else:
            own[parts[2]] = tensor
    if num_others:
        raise InputError(
            f"{path} must hold the tensors of the {len(states)} members in config.json, under "
            f"members.0 to members.{len(states) - 1}; got {num_others} others: export it again"
        )
    # One after the other: each has its tensors in the file before the next takes any memory.
    members = [
        _network(backbone, own, bundle, path)
        for backbone, own in zip(backbones, states.values(), strict=True)
    ]
    mixture = BundledMixture(members, weights)
    _check_shares(mixture, bundle, folder)
    return mixture


def _members(bundle: Bundle, folder: Path) -> tuple[list[object], list[float]]:
    """Return what ``config.json`` says are the members' backbones, and the share of each."""
    listed = bundle.config.get("members")
    backbones: list[object] = []
    weights: list[float] = []
    for member in listed if isinstance(listed, list) else ():
        found = member if isinstance(member, dict) else {}
        params, weight = found.get("params"), found.get("weight")
        backbones.append(params.get("backbone") if isinstance(params, dict) else None)
        weights.append(float(weight) if isinstance(weight, int | float) else math.nan)
    if len(weights) < 2 or min(weights) <= 0 or not math.isclose(sum(weights), 1):
        raise InputError(
            f"config.json of {folder} must list two members or more, with weights above 0 that "
            f"sum to 1; got weights {weights!r:.100}: export it again"
        )
    return backbones, weights


def _network(
    name: object, state: Mapping[str, Tensor], bundle: Bundle, path: Path
) -> BundledNetwork:
    """Build one network of tensors with torchvision's names."""
    if not isinstance(name, str) or name not in HEAD_MODULE:
        raise InputError(
            f"config.json of {path.parent} must name a backbone, one of {', '.join(HEAD_MODULE)}; "
            f"got {name!r:.100}: export it again"
        )
    size_px = bundle.image_size_px
    matched = match_state_dict(name, state, path, image_size_px=size_px)
    backbone = filled_backbone(name, matched, image_size_px=size_px)
    given = {
        key: tensor.to(torch.float32)
        for key, tensor in _under(f"{HEAD_MODULE[name]}.", state).items()
    }
    head = nn.Linear(backbone.num_features, len(bundle.classes))
    shapes = {key: tuple(tensor.shape) for key, tensor in given.items()}
    expected = {key: tuple(tensor.shape) for key, tensor in head.state_dict().items()}
    if shapes != expected:
        raise InputError(
            f"{path} must hold a linear head for {len(bundle.classes)} classes, {expected}; got "
            f"{shapes}: export it again"
        )
    head.load_state_dict(given)
    return BundledNetwork(backbone, head)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, without it."""
    return {
        key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)
    }


def _check_shares(mixture: BundledMixture, bundle: Bundle, folder: Path) -> None:
    """Refuse shares that are not those of ``model.onnx``: no digest guards ``config.json``."""
    shape = (_NUM_NOISE_IMAGES, bundle.image_size_px, bundle.image_size_px)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with torch.inference_mode():
        logits = mixture(torch.from_numpy(images[:, None].astype(np.float32) / 255))
    difference = np.abs(softmax(logits.numpy()) - softmax(bundle.logits(images))).max()
    if not difference <= TOLERANCE:
        raise InputError(
            f"config.json of {folder} must list the members and weights that model.onnx mixes; "
            f"probabilities of the two differ by {difference:.3f}: export it again"
        )
