"""Files of weights: on this machine, from torchvision, and what is written beside them."""

import http.client
import os
import socket
from pathlib import Path

import torch
import torchvision

from lightning_modules.errors import InputError
from lightning_modules.files import sha256_of
from lightning_modules.state_dicts import first_line
from lightning_modules.strict_yaml import load_yaml

# The recipe of the published comparisons: torchvision's first weights, not the longer second one.
IMAGENET_WEIGHTS = {
    "mobilenet_v2": "MobileNet_V2_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "efficientnet_b0": "EfficientNet_B0_Weights.IMAGENET1K_V1",
    "resnet152": "ResNet152_Weights.IMAGENET1K_V1",
    "vgg16": "VGG16_Weights.IMAGENET1K_V1",
    "vit_b_16": "ViT_B_16_Weights.IMAGENET1K_V1",
}

# torchvision says no more of its files: "may have their own licenses or terms".
IMAGENET_LICENCE = "BSD-3-Clause (torchvision); trained on ImageNet, whose terms may apply"

SUFFIXES = (".safetensors", ".pth", ".pt")

# What is read of a file beside the weights, and kept of a line in it.
MAX_SIDECAR_BYTES = 1 << 16
MAX_SIDECAR_CHARACTERS = 500

# As in the files of https://reuse.software.
SPDX = "SPDX-License-Identifier:"


def local_file(attempt: str, backbone: str, base: Path) -> Path | None:
    """Return the file that one attempt means, downloaded if need be; none for ``random``.

    Args:
        attempt: ``imagenet``, ``random``, or the path of a file or folder.
        backbone: One of ``BACKBONES``.
        base: The folder that relative paths start from.

    Raises:
        InputError: If there is none, or it cannot be downloaded.
    """
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


def read_sidecars(path: Path) -> dict[str, str]:
    """Return what the user wrote beside a file of weights: its ``origin`` and ``licence``.

    ``FILE.yaml`` may have both, and ``FILE.license`` has the licence: the one that it names as
    ``SPDX-License-Identifier``, else its first line.

    Returns:
        One line of printable text each; what is not said is not there.

    Raises:
        InputError: If there is such a file, and it cannot be read.
    """
    said = {}
    licence_file = path.with_name(f"{path.name}.license")
    yaml_file = path.with_name(f"{path.name}.yaml")
    if licence_file.is_file():
        lines = [line.strip() for line in _read_sidecar(licence_file).splitlines() if line.strip()]
        named = [line.partition(SPDX)[2].strip() for line in lines if SPDX in line]
        said["licence"] = (named or lines or [""])[0]
    if yaml_file.is_file():
        try:
            document = load_yaml(_read_sidecar(yaml_file))
        except InputError as error:
            raise InputError(f"{yaml_file} must be YAML; {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{yaml_file} must be YAML; {first_line(error)}") from error
        if not isinstance(document, dict):
            raise InputError(
                f"{yaml_file} must be a mapping with origin, licence, or both; got a "
                f"{type(document).__name__}"
            )
        for key, name in (("origin", "origin"), ("license", "licence"), ("licence", "licence")):
            if isinstance(document.get(key), str):
                said[name] = document[key]
    # One line of printable text: it goes to terminals and into the model card.
    shown = {
        name: "".join(c for c in " ".join(text.split()) if c.isprintable())
        for name, text in said.items()
    }
    return {name: text[:MAX_SIDECAR_CHARACTERS] for name, text in shown.items() if text}


def imagenet_file(backbone: str) -> tuple[str, Path]:
    """Return torchvision's address of a backbone's weights, and where torch.hub keeps the file."""
    url: str = torchvision.models.get_weight(IMAGENET_WEIGHTS[backbone]).url
    return url, Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def _download_imagenet(backbone: str) -> Path:
    """Return torchvision's file in torch.hub's folder, downloaded and checked if not yet there."""
    url, path = imagenet_file(backbone)
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
            f"imagenet weights of {backbone} could not be downloaded ({first_line(error)}): put "
            f"torchvision's {path.name} into {path.parent}, or give a state dict with "
            f"`--weights FILE_OR_FOLDER`, or start from `--weights random`"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_s)
        partial.unlink(missing_ok=True)
    return path


def _read_sidecar(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise InputError(f"{path} must be below 64 KiB; is it about these weights?")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path} must be text in UTF-8; {first_line(error)}") from error
