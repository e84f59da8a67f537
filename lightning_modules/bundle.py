"""A trained classifier as a folder: weights in three formats, and what there is to know of it.

Reading one needs neither the sweep nor torch, and runs nothing that it holds but the operators of
its ONNX model. ``model.pt2`` is compared with its digest only: `torch.export.load` unpickles, so
open that file yourself, and only if you trust where it came from.
"""

import hashlib
import io
import json
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import safetensors

from lightning_modules.calibration import softmax
from lightning_modules.errors import InputError
from lightning_modules.files import check_header
from lightning_modules.onnx_session import open_session, run_session

FORMAT = 2

USE = "Research use only. Not a medical device."

MODEL_FILES = ("model.onnx", "model.pt2", "model.safetensors")
CONFIG_FILE = "config.json"

MAX_CONFIG_BYTES = 1 << 20
MAX_MODEL_BYTES = (1 << 31) - 1  # what protobuf, and so ONNX, can hold
MAX_IMAGE_SIZE_PX = 1024
MAX_CLASS_CHARACTERS = 100
MAX_CONFIG_DEPTH = 32

# What would steer a terminal, or cannot be written as UTF-8; tabs and ends of lines do neither.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

# Pixels a run: bounds the memory, whatever is asked for.
_BATCH_PIXELS = 16 * 224**2

Logits = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]
Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Bundle:
    """A bundle, open for prediction.

    Attributes:
        config: The contents of ``config.json``.
        session: The ONNX model.
    """

    config: dict[str, Any]
    session: onnxruntime.InferenceSession

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return tuple(self.config["classes"])

    @property
    def image_size_px(self) -> int:
        """Height and width of the model's input."""
        return int(self.config["input"]["image_size_px"])

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities."""
        return float(self.config["temperature"])

    @property
    def batch_size(self) -> int:
        """Images that are computed at once, few where they are large."""
        return max(1, _BATCH_PIXELS // self.image_size_px**2)

    def logits(self, images: Images) -> Logits:
        """Return class logits, as they come out of the network: not calibrated.

        Args:
            images: Shape ``(B, H, W)``, uint8 grey, of the bundle's image size.

        Returns:
            Shape ``(B, C)``, float32, finite.

        Raises:
            InputError: If the model fails, or gives anything else.
        """
        batches = [np.zeros((0, len(self.classes)), np.float32)]
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            try:
                found = run_session(
                    self.session, batch[:, None].astype(np.float32) / np.float32(255)
                )
            except InputError as error:
                raise InputError(f"the bundle's model.onnx {error}") from error
            expected = (len(batch), len(self.classes))
            if found.dtype != np.float32 or found.shape != expected or not np.isfinite(found).all():
                raise InputError(
                    f"the bundle's model.onnx must give {expected} finite logits; it gives "
                    f"{found.dtype} {found.shape}, or some that are not finite: export it again"
                )
            batches.append(found)
        return np.concatenate(batches)

    def predict(self, images: Images) -> Probabilities:
        """Return calibrated class probabilities, shape ``(B, C)``, float64, of what `logits` takes.

        Raises:
            InputError: As `logits`.
        """
        return softmax(self.logits(images), self.temperature)


def load_bundle(folder: Path) -> Bundle:
    """Open a bundle after checking that it is whole.

    Digests tell a torn or mixed-up bundle from a whole one. They do not tell who made it.

    Raises:
        InputError: If the folder is no bundle, is torn, or was written by another version.
    """
    config = read_config(folder)
    models = {name: _read_model(folder / name, config["digests"].get(name)) for name in MODEL_FILES}
    path = folder / "model.safetensors"
    try:
        check_header(path)
        with safetensors.safe_open(path, framework="np"):
            pass  # it has checked every name, shape, and offset of the header
    except (safetensors.SafetensorError, InputError, OSError) as error:
        raise InputError(f"{path} must be a safetensors file; {error!s:.200}") from error
    path = folder / "model.onnx"
    try:
        session = open_session(models["model.onnx"])
    except InputError as error:
        raise InputError(f"{path} {error}: export it again") from error
    try:
        names = [node.name for node in session.get_inputs()]
        found = [node.shape[1:] for node in (*session.get_inputs(), *session.get_outputs())]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must have names in UTF-8: export it again") from error
    outputs = session.get_outputs()
    if names != ["intensities"] or len(outputs) != 1:
        raise InputError(
            f"{path} must turn intensities into logits; it takes {names!r:.100} and gives "
            f"{len(outputs)}: export it again"
        )
    bundle = Bundle(config=config, session=session)
    shapes = (*found[0], *found[1])
    expected = (1, bundle.image_size_px, bundle.image_size_px, len(bundle.classes))
    if shapes != expected:
        raise InputError(
            f"{path} must have the image size and classes of {CONFIG_FILE}, "
            f"{expected}; it has {shapes!r:.100}: export it again"
        )
    return bundle


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check a bundle's ``config.json``; no other file is opened.

    Raises:
        InputError: If there is none, or it does not describe a bundle of this version.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"a bundle must hold {CONFIG_FILE}; none in {folder}: give the folder that "
            "`neurosweep export` wrote"
        )
    try:
        with _open_plain(path, MAX_CONFIG_BYTES) as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES), parse_constant=_refuse_constant)
        _check_config(config)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} must describe a bundle; {reason:.200}: export it again"
        ) from error
    return dict(config)


def _check_config(config: dict[str, Any]) -> None:
    if config["format"] != FORMAT:
        raise ValueError(f"its format is {config['format']!r:.40}, this version reads {FORMAT}")
    classes = config["classes"]
    is_named = isinstance(classes, list) and all(
        isinstance(name, str) and name.isprintable() and 1 <= len(name) <= MAX_CLASS_CHARACTERS
        for name in classes
    )
    if not is_named or not classes or len(set(classes)) < len(classes):
        raise ValueError("classes are not different printable names")
    if not isinstance(config["digests"], dict):
        raise ValueError("digests are not one a file")
    size = config["input"]["image_size_px"]
    if type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE_PX:
        raise ValueError(f"image_size_px is not a whole number in [1, {MAX_IMAGE_SIZE_PX}]")
    temperature = config["temperature"]
    if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3:
        raise ValueError("temperature is not a number in [0.001, 1000]")
    _check_plain(config, depth=0)


def _check_plain(found: object, depth: int) -> None:
    """Refuse what nobody has written there and what reads it would fail on, or show."""
    if depth > MAX_CONFIG_DEPTH:
        raise ValueError(f"it is nested more than {MAX_CONFIG_DEPTH} deep")
    if isinstance(found, dict):
        for name, value in found.items():
            _check_plain(name, depth + 1)
            _check_plain(value, depth + 1)
    elif isinstance(found, list):
        for value in found:
            _check_plain(value, depth + 1)
    elif isinstance(found, str) and _CONTROL.search(found):
        raise ValueError(f"it holds text with control characters, {found!r:.80}")
    elif isinstance(found, int | float) and abs(found) > sys.float_info.max:
        raise ValueError("it holds a number beyond all others")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"it holds {text}")


def _read_model(path: Path, digest: object) -> bytes:
    """Return the contents of ``model.onnx``, and of the others nothing, if the digest is theirs."""
    broken = InputError(
        f"a bundle's files must be the ones that were exported; {path} is missing or "
        "changed: export it again"
    )
    try:
        with _open_plain(path, MAX_MODEL_BYTES) as file:
            # What was hashed is what is run: it is not read a second time.
            data = file.read() if path.suffix == ".onnx" else b""
            hashed = hashlib.sha256(data) if data else hashlib.file_digest(file, "sha256")
    except (OSError, ValueError) as error:
        raise broken from error
    if hashed.hexdigest() != digest:
        raise broken
    return data


def _open_plain(path: Path, max_bytes: int) -> io.BufferedReader:
    """Open a file that is no link, pipe, or device, and not larger than it may be.

    Raises:
        ValueError: If it is.
        OSError: If it cannot be opened; also if it is a link.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
        return file
    file.close()
    raise ValueError(f"it is not a plain file of at most {max_bytes} bytes")
