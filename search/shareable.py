"""What may be said of a sweep to anybody: no folder, host, group, or address of whoever ran it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_modules.data.manifest import SPLITS
from search.space import Choice
from search.sweep import Sweep

# Settings that name places of the machine; the command line gives them anew.
_PLACES = ("storage", "study_url", "weights")


def count_images(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return images and groups of each split; never which."""
    parts = {split: frame[frame["split"] == split] for split in SPLITS}
    return {
        split: {"images": len(part), "groups": part["group_id"].nunique()}
        for split, part in parts.items()
    }


def settings_of(sweep: Sweep) -> dict[str, Any]:
    """Return the sweep file that launches it again, given the images and the weights."""
    settings = dataclasses.asdict(sweep)
    settings["space"] = {
        name: list(domain.choices) if isinstance(domain, Choice) else dataclasses.asdict(domain)
        for name, domain in sweep.space.items()
    }
    for name in _PLACES:
        settings.pop(name, None)
    if settings["data"].get("path") is not None:
        settings["data"]["path"] = "images"  # a required key; --data replaces it
    return settings


def weights_of(fact: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the initial weights came from: names of files, not of folders."""
    kept = {name: value for name, value in fact.items() if name not in ("passed_over", "path")}
    return {
        **kept,
        "origin": Path(fact["origin"]).name,
        "path": Path(fact["path"] or "").name,
        "num_passed_over": len(fact.get("passed_over", ())),
    }


def numbers_of(fact: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the counts of a fact, not what was counted: that may name patients."""
    return {
        name: value if isinstance(value, int | float) else len(value)
        for name, value in fact.items()
        if isinstance(value, int | float | list | tuple | dict)
    }
