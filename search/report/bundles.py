"""What a bundle's own files say of it, as far as a report shows it; all of it is untrusted."""

import base64
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.bundle import read_config
from lightning_modules.errors import InputError
from search.card.markdown import mapping
from search.evaluation.log import read_log
from search.study.record import Record

MAX_FILE_BYTES = 16 * 2**20
MAX_IMAGES = 12
MAX_IMAGE_BYTES = 2**20

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class BundleFindings:
    """One bundle.

    Attributes:
        name: Its folder's name.
        config: Its ``config.json``.
        log: Every evaluation, first to last.
        evaluation: The last one in full; empty if there is none of this very model.
        explanation: How its maps did in their tests; empty if there are none.
        overlays: PNG files as base64, by what they show; only if they were asked for.
    """

    name: str
    config: Mapping[str, Any]
    log: tuple[Mapping[str, Any], ...] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    explanation: Mapping[str, Any] = field(default_factory=dict)
    overlays: Mapping[str, str] = field(default_factory=dict)

    @property
    def trial(self) -> Mapping[str, Any]:
        """Which trial it was made of; of an ensemble the best one."""
        return mapping(self.config, "trial")

    @property
    def num_members(self) -> int:
        """How many trials an ensemble is made of; 0 of a bundle of one."""
        members = self.config.get("members")
        return len(members) if isinstance(members, list) else 0


def read_bundle(folder: Path, *, with_images: bool) -> BundleFindings:
    """Read what is to be shown of a bundle. No model is opened.

    Args:
        folder: The bundle.
        with_images: Take the overlays of its explanation, too: they show images of the data.

    Raises:
        InputError: If it is no bundle, or one of its files is not what was written there.
    """
    config = read_config(folder)
    evaluation = _read_json(folder / "evaluation" / "evaluation.json")
    model = mapping(config, "digests").get("model.onnx")
    if mapping(evaluation, "bundle").get("model_digest") != model:
        evaluation = {}
    explanation = _read_json(folder / "explanation" / "explanation.json")
    if mapping(explanation, "model").get("model.onnx") != model:
        explanation = {}
    overlays = _read_overlays(folder / "explanation", explanation) if with_images else {}
    return BundleFindings(
        name=folder.resolve().name,
        config=config,
        log=tuple(read_log(folder)),
        evaluation=evaluation,
        explanation=explanation,
        overlays=overlays,
    )


def is_made_of(bundle: BundleFindings, record: Record) -> bool:
    """Tell whether a bundle holds a trial of a sweep, with its seed, trained on its images."""
    number = bundle.trial.get("number")
    if type(number) is not int or not 0 <= number < record.num_trials:
        return False
    data, facts = mapping(bundle.config, "data"), record.facts
    return (
        bundle.trial.get("sweep") == record.sweep.name
        and bundle.trial.get("seed") == record.trial(number).seed
        and data.get("pack_digest") == facts.get("pack_digest")
        and data.get("manifest_digest") == facts.get("manifest_digest")
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("it is no plain file of at most 16 MiB")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(
            f"{path} must be what was written there; {error!s:.200}: make it again, or leave "
            "the bundle out"
        ) from error
    return found


def _read_overlays(folder: Path, explanation: Mapping[str, Any]) -> dict[str, str]:
    """Return overlays that lie in the folder itself and are PNG files: some of each kind."""
    images = explanation.get("images")
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for case in images if isinstance(images, list) else []:
        of_case = mapping({"": case}, "")
        by_kind.setdefault(str(of_case.get("kind")), []).append(of_case)
    found: dict[str, str] = {}
    # Not the first of all, which are right.
    for of_case in filter(None, itertools.chain(*itertools.zip_longest(*by_kind.values()))):
        files = mapping(of_case, "files")
        for method in files:
            path = folder / str(mapping(files, method).get("overlay"))
            if len(found) < MAX_IMAGES and path.parent == folder and (data := _read_png(path)):
                title = (
                    f"{len(found) + 1}. {of_case.get('kind')}: {of_case.get('label')}, predicted "
                    f"{of_case.get('explained_class')}, by {method}"
                )
                found[title.replace("_", " ")] = base64.b64encode(data).decode()
    return found


def _read_png(path: Path) -> bytes:
    """Return a PNG file's contents; nothing if it is none."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_IMAGE_BYTES:
        return b""
    data = path.read_bytes()
    return data if data.startswith(_PNG) else b""
