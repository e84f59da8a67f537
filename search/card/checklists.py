"""Items of reporting guidelines, answered where the software knows and ``TO FILL`` where not.

CLAIM 2024: Tejani et al., "Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024
Update", https://doi.org/10.1148/ryai.240300. TRIPOD+AI: Collins et al., 2024,
https://doi.org/10.1136/bmj-2023-078378. What each asks is said in our words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TO_FILL = "TO FILL"


@dataclass(frozen=True)
class Item:
    """One or several items that one answer fits.

    Attributes:
        numbers: Which.
        asks: What is to be reported.
        answer: What a bundle says, or where it does.
    """

    numbers: str
    asks: str
    answer: str


def answer_items(
    config: Mapping[str, Any], *, is_evaluated: bool, is_explained: bool
) -> tuple[Item, ...]:
    """Return the items with their answers for a bundle.

    Args:
        config: The bundle's.
        is_evaluated: Whether it was scored on test images.
        is_explained: Whether maps were made and tested.
    """
    data, search = _facts(config.get("data")), _facts(config.get("search"))
    tested = "Test results" if is_evaluated else f"{TO_FILL} (neurosweep evaluate)"
    by_image = data.get("every_image_is_a_group")
    level = (
        f"image only; why not patient: {TO_FILL}"
        if by_image
        else f"group; whether a group is a patient: {TO_FILL}"
    )
    maps = (
        "Explanations: Grad-CAM and Integrated Gradients, tested by deletion, insertion, and "
        "random weights"
        if is_explained
        else f"{TO_FILL} (neurosweep explain)"
    )
    number = search.get("num_trials", "?")
    return (
        Item("CLAIM 1-8", "title, abstract, background, design, objectives", TO_FILL),
        Item(
            "CLAIM 9, 10, 35; TRIPOD+AI 20a",
            "preprocessing, subsets, numbers included and excluded",
            f"Data; {data.get('skipped_images', '?')} images could not be read; what was excluded "
            f"before: {TO_FILL}",
        ),
        Item("CLAIM 11-18", "sources, eligibility, reference standard, annotation", TO_FILL),
        Item("TRIPOD+AI 3, 14", "health context, fairness", TO_FILL),
        Item(
            "CLAIM 19; TRIPOD+AI 12a, 21",
            "how data were partitioned; number in each analysis, tuning included",
            "Data: split digest, images and groups of each split",
        ),
        Item("CLAIM 20", "level at which partitions are disjoint", level),
        Item("CLAIM 21", "sample size and how it was determined", TO_FILL),
        Item(
            "CLAIM 22-25; TRIPOD+AI 12c",
            "model, libraries, initial weights, training, tuning",
            f"Search ({number} trials), Initial weights, Reproduction",
        ),
        Item(
            "CLAIM 26, 27",
            "how the final model was selected; ensembles",
            "Search: selection rule",
        ),
        Item("CLAIM 28; TRIPOD+AI 12e", "metrics, calibration, comparison of models", tested),
        Item(
            "CLAIM 29, 37, 38; TRIPOD+AI 23a",
            "uncertainty; intervals, subgroups included",
            tested,
        ),
        Item("CLAIM 30; TRIPOD+AI 12d, 23b", "robustness; differences across sites", tested),
        Item("CLAIM 31", "explainability, and how it was validated", maps),
        Item(
            "CLAIM 32, 33",
            "internal and external testing",
            f"internal: {tested}; external: only if Test results say so",
        ),
        Item(
            "CLAIM 34, 36, 40-42, 44",
            "demographics, limits, ethics, registration, funding",
            TO_FILL,
        ),
        Item("CLAIM 39", "analysis of failures", maps),
        Item(
            "CLAIM 43; TRIPOD+AI 18f, 22",
            "availability of code and model",
            f"this bundle; where it is deposited: {TO_FILL}",
        ),
        Item(
            "TRIPOD+AI 13",
            "imbalance of classes, and recalibration after it",
            "Reproduction: data.class_balance; Calibration: temperature fitted afterwards",
        ),
        Item("TRIPOD+AI 19, 27", "involvement of patients and public; usability", TO_FILL),
    )


def _facts(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
