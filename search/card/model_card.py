"""A bundle's model card, ``README.md``: what it says is read from the bundle's own files.

Names of classes and sources are shown, and how many groups there are, never which. What the
software cannot know stands as ``TO FILL``.

The form is Hugging Face's, https://huggingface.co/docs/hub/model-cards, after Mitchell et al.,
"Model Cards for Model Reporting", 2019, https://arxiv.org/abs/1810.03993.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.bundle import MODEL_FILES, read_config
from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically
from search.card.checklists import TO_FILL, answer_items
from search.card.markdown import escape, mapping, number, say, table
from search.card.results import describe_evaluations, describe_explanation
from search.card.training import (
    describe_calibration,
    describe_data,
    describe_search,
    describe_validation,
    describe_weights,
)
from search.evaluation.log import LOG_FILE

CARD_FILE = "README.md"
EXPLANATION_FILE = "explanation/explanation.json"

MAX_RESULTS_BYTES = 16 * 2**20

Facts = Mapping[str, Any]


def write_card(bundle_folder: Path) -> Path:
    """Write the card of a bundle, over the one that is there.

    To be called again after an evaluation or an explanation, whose results it then holds.

    Args:
        bundle_folder: Holds ``config.json``, and where they were made ``evaluations.json`` and
            ``explanation/explanation.json``. The models are not looked at.

    Returns:
        The card.

    Raises:
        InputError: If a file is not what was written there, or the card cannot be written.
    """
    config = read_config(bundle_folder)
    found = _read_results(bundle_folder / LOG_FILE)
    entries = found if isinstance(found, list) else []
    evaluations = [entry for entry in entries if isinstance(entry, dict)]
    explanation = mapping({"": _read_results(bundle_folder / EXPLANATION_FILE)}, "")
    sections = (
        _front_matter(config),
        _head(config),
        describe_data(mapping(config, "data")),
        describe_search(config),
        describe_validation(config),
        describe_calibration(config),
        describe_evaluations(bundle_folder, evaluations),
        describe_explanation(bundle_folder, explanation),
        describe_weights(mapping(config, "weights")),
        _files(config),
        _limits(config),
        _reproduction(config),
        _checklists(config, is_evaluated=bool(evaluations), is_explained=bool(explanation)),
    )
    card = bundle_folder / CARD_FILE
    if card.is_symlink():
        raise InputError(f"a bundle's files are its own; {card} is a link: remove it")
    try:
        write_atomically(card, ("\n\n".join(sections) + "\n").encode("utf-8", "replace"))
        card.chmod(0o644)
    except OSError as error:
        raise InputError(f"a bundle's card must be written; {card}: {error.strerror}") from error
    return card


def _front_matter(config: Facts) -> str:
    tags = ("medical-imaging", "brain-mri", "transfer-learning", "onnx", "research-only")
    front = {
        "library_name": "neurosweep",
        "pipeline_tag": "image-classification",
        "license": TO_FILL,
        "tags": ["image-classification", *tags, str(config.get("backbone"))],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _head(config: Facts) -> str:
    trial, classes = mapping(config, "trial"), config["classes"]
    leakage = ""
    if counts := mapping(config, "leakage"):
        counted = ", ".join(f"{escape(count)} {escape(name)}" for name, count in counts.items())
        leakage = f"""

> **Leakage.** The sweep was launched although copies of pictures lie in two splits ({counted}).
> Every figure below, of validation and of test images, flatters."""
    return f"""# {say(trial, "sweep")}, trial {say(trial, "number")}: {say(config, "backbone")}

> **Research use only, not a medical device.** Not for diagnosis, triage, or any other decision on
> a patient.{leakage}

## Use

Tells {len(classes)} classes of brain MRI slices apart: {", ".join(map(escape, classes))}. An image
of anything else is given one of these names too, perhaps with a high probability. Intended users
are researchers who compare classifiers. Clinical purpose and setting: {TO_FILL}.

    neurosweep predict BUNDLE IMAGE... --format csv"""


def _files(config: Facts) -> str:
    parity, digests = mapping(config, "parity"), mapping(config, "digests")
    cost = mapping(config, "cost")
    differences = mapping(parity, "differences")
    rows = [[name, digests.get(name), number(differences.get(name))] for name in MODEL_FILES]
    return f"""## Files

{table(["file", "SHA-256", "largest difference of a logit"], rows)}

Cost: {number(cost.get("latency_ms"))} ms an image ({say(cost, "measured_on")}), \
{number(cost.get("size_mib"))} MiB as ONNX.

Differences are from the trained module, on {say(parity, "num_images")} validation images.
`model.onnx` and `model.pt2` take grey intensities `(B, 1, H, W)` in [0, 1] for any B;
`model.safetensors` has torchvision's names. `torch.export.load` unpickles: open `model.pt2` only
if you trust where it came from."""


def _limits(config: Facts) -> str:
    size_px = config["input"]["image_size_px"]
    found = config.get("members")
    num_runs = len(found) if isinstance(found, list) else 0
    runs = f"made of {num_runs} training runs" if num_runs else "one training run"
    return f"""## Limits

- It sees one grey slice of {size_px} x {size_px} px: no volume, other sequence, or clinical data.
- It was trained on the sources above; other scanners, sequences, and hospitals were not seen.
- It is {runs}: another seed gives other weights and other figures.
- Performance by age, sex, and ethnicity: {TO_FILL}."""


def _reproduction(config: Facts) -> str:
    settings = mapping(config, "settings")
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    block = "\n".join(f"    {line}" for line in text.splitlines())
    data = "" if mapping(mapping(settings, "data"), "phantom") else " --data MANIFEST"
    origin = mapping(config, "weights").get("origin")
    weights = origin if origin in ("imagenet", "random") else "FILE"
    trial = mapping(config, "trial")
    command = f"neurosweep export {say(trial, 'sweep')} bundle --trial {say(trial, 'number')}"
    if config.get("members"):
        method = say(mapping(config, "search"), "chosen")
        top = say(mapping(config, "search"), "ensemble_top")
        command = f"neurosweep ensemble {say(trial, 'sweep')} bundle --method {method} --top {top}"
    versions = mapping(config, "versions")
    of_all = {**versions, **mapping(versions, "exported_with")}
    rows = [[name, version] for name, version in of_all.items() if isinstance(version, str)]
    return f"""## Reproduction

With this as `sweep.yaml`, and the images with the digests above:

{block}

    neurosweep launch sweep.yaml{data} --weights {weights}
    {command}

{table(["package", "version"], rows)}"""


def _checklists(config: Facts, *, is_evaluated: bool, is_explained: bool) -> str:
    items = answer_items(config, is_evaluated=is_evaluated, is_explained=is_explained)
    rows = [[item.numbers, item.asks, item.answer] for item in items]
    return f"""## Reporting checklists

Items of CLAIM 2024 (Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300) and
TRIPOD+AI (Collins et al., BMJ 2024;385:e078378), in short. {TO_FILL} marks what no software knows.

{table(["items", "what is asked", "here"], rows)}"""


def _read_results(path: Path) -> Any:
    """Return what another command has left in the bundle; an empty list if it was not run."""
    if not path.exists() and not path.is_symlink():
        return []
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_RESULTS_BYTES:
            raise ValueError("it is no plain file of at most 16 MiB")
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} must be what was written there; {error!s:.200}") from error
