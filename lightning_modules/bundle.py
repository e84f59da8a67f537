"""A trained classifier as a folder: weights, an ONNX model, and what there is to know about it.

Reading one needs neither the sweep nor torch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from lightning_modules.data.decode import decode_file
from lightning_modules.errors import InputError
from lightning_modules.files import sha256_of

FORMAT = 1

MODEL_FILES = ("model.onnx", "model.safetensors")
CONFIG_FILE = "config.json"

MAX_CONFIG_BYTES = 1 << 20

Logits = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]

# Images a run: bounds the memory, whatever is asked for.
BATCH_SIZE = 32


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

    def logits(self, images: Images) -> Logits:
        """Return class logits.

        Args:
            images: Shape ``(B, H, W)``, uint8 grey, of the bundle's image size.

        Returns:
            Shape ``(B, C)``, float32.
        """
        intensities = images[:, None].astype(np.float32) / 255
        batches = [
            self.session.run(None, {"intensities": intensities[start : start + BATCH_SIZE]})[0]
            for start in range(0, len(images), BATCH_SIZE)
        ]
        return np.concatenate(batches) if batches else np.zeros((0, len(self.classes)), np.float32)

    def predict(self, paths: Sequence[Path]) -> Iterator[npt.NDArray[np.float64]]:
        """Yield each image file's class probabilities, shape ``(C,)``.

        Raises:
            InputError: If a file is not an image that can be read.
        """
        for start in range(0, len(paths), BATCH_SIZE):
            images = np.stack(
                [
                    _read_image(path, self.image_size_px)
                    for path in paths[start : start + BATCH_SIZE]
                ]
            )
            logits = self.logits(images).astype(np.float64)
            shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
            yield from shifted / shifted.sum(axis=1, keepdims=True)


def load_bundle(folder: Path) -> Bundle:
    """Open a bundle after checking that it is whole.

    Raises:
        InputError: If the folder is no bundle, is torn, or was written by a later version.
    """
    config = _read_config(folder / CONFIG_FILE)
    for name in MODEL_FILES:
        path = folder / name
        digest = config["digests"].get(name)
        if path.is_symlink() or not path.is_file() or sha256_of(path) != digest:
            raise InputError(
                f"a bundle's files must be the ones that were exported; {path} is missing or "
                "changed: export it again"
            )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions share no base class
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"model.onnx of {folder} must be an ONNX model; {reason}") from error
    names = [node.name for node in session.get_inputs()]
    if names != ["intensities"]:
        raise InputError(f"model.onnx of {folder} must take intensities; it takes {names}")
    bundle = Bundle(config=config, session=session)
    shapes = (*session.get_inputs()[0].shape[1:], *session.get_outputs()[0].shape[1:])
    expected = (1, bundle.image_size_px, bundle.image_size_px, len(bundle.classes))
    if shapes != expected:
        raise InputError(
            f"model.onnx of {folder} must have the image size and classes of {CONFIG_FILE}, "
            f"{expected}; it has {shapes}: export it again"
        )
    return bundle


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"a bundle must hold {CONFIG_FILE}; none in {path.parent}: give the folder that "
            "`neurosweep export` wrote"
        )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is larger than 1 MiB")
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ValueError(f"its format is {config['format']}, this version reads {FORMAT}")
        classes = config["classes"]
        is_named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if not is_named or not isinstance(config["digests"], dict):
            raise ValueError("classes or digests are not what was exported")
        if not 1 <= int(config["input"]["image_size_px"]) <= 4096:
            raise ValueError("image_size_px is not in [1, 4096]")
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise InputError(f"{path} must describe a bundle; {error!s:.200}") from error
    return dict(config)


def _read_image(path: Path, image_size_px: int) -> Images:
    try:
        return decode_file(path, image_size_px)[0]
    except FileNotFoundError as error:
        raise InputError(f"an image to classify must exist; nothing at {path}") from error
    except (OSError, InputError) as error:
        raise InputError(f"{path} must be a PNG, JPEG, or TIFF image; {error}") from error
