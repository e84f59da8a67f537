"""A model card says what the bundle's files say, what nobody knows, and no patient's name."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.errors import InputError
from search.card.markdown import escape, table
from search.card.model_card import write_card

COUNTS = {
    "train": {"images": 20, "groups": 11},
    "val": {"images": 10, "groups": 7},
    "test": {"images": 8, "groups": 5},
}

CONFIG: dict[str, Any] = {
    "format": 2,
    "classes": ["stroke", "no_stroke"],
    "input": {"image_size_px": 64},
    "temperature": 1.5,
    "digests": {"model.onnx": "a" * 64},
    "backbone": "resnet50",
    "leakage": {},
    "trial": {"sweep": "brain", "number": 3, "seed": 4, "params": {"lr": 0.01, "batch_size": 8}},
    "metric": {
        "name": "val_macro_f1",
        "all": {"val_macro_f1": 0.812345, "val_loss": None, "epoch_s": 2.5},
        "confusion": [[4, 1], [2, 3]],
    },
    "search": {
        "space": {"lr": {"low": 0.001, "high": 0.1, "log": True}},
        "sampler": "gp",
        "num_trials": 16,
        "num_epochs": 90,
        "states": {"complete": 4, "pruned": 12},
        "chosen": "best",
    },
    "weights": {"origin": "imagenet", "digest": "b" * 64},
    "data": {
        "images": {"train": 20, "val": 10, "test": 8},
        "groups": {"train": 11, "val": 7, "test": 5},
        "classes": {"stroke": COUNTS, "no_stroke": COUNTS},
        "sources": {"soop": COUNTS},
        "classes_by_source": {"stroke": {"soop": 38}, "no_stroke": {"soop": 19, "other": 19}},
        "manifest_digest": "c" * 64,
        "split_digest": "d" * 64,
        "every_image_is_a_group": False,
    },
    "settings": {"name": "brain", "data": {"path": "images"}},
    "versions": {"torch": "2.15.0"},
}

SECTIONS = (
    "Use",
    "Data",
    "Search",
    "Validation results",
    "Calibration",
    "Test results",
    "Explanations",
    "Initial weights",
    "Files",
    "Limits",
    "Reproduction",
    "Reporting checklists",
)


def card_of(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return write_card(folder).read_text(encoding="utf-8")


def cells(card: str) -> list[list[str]]:
    rows = (line for line in card.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows]


def test_the_front_matter_is_hugging_faces_and_leaves_the_licence_open(tmp_path: Path) -> None:
    _, front, _ = card_of(tmp_path).split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["pipeline_tag"] == "image-classification"
    assert found["library_name"] == "neurosweep"
    assert found["license"] == "TO FILL"
    assert {"research-only", "resnet50", "medical-imaging"} <= set(found["tags"])


def test_every_section_is_there_in_order(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    found = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert tuple(found) == SECTIONS
    assert "Research use only, not a medical device." in card.split("## ")[0]


def test_counts_search_and_results_are_told(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    rows = cells(card)
    assert ["validation (tuning)", "10", "7"] in rows
    assert ["stroke", "20 (11)", "10 (7)", "8 (5)"] in rows
    assert ["soop", "20 (11)", "10 (7)", "8 (5)"] in rows
    assert ["stroke", "0", "38"] in rows  # sources in order: other, soop
    assert "Of one source only: stroke." in card
    assert ["lr", "0.001 to 0.1, log", "0.01"] in rows
    assert ["batch_size", "8"] in rows
    assert "Trials run: **16** (4 complete, 12 pruned), 90 epochs" in card
    assert "**Selection rule:** the best val_macro_f1 on validation images" in card
    assert ["val_macro_f1", "0.8123"] in rows
    assert ["val_loss", "not defined"] in rows
    assert ["no_stroke", "2", "3"] in rows
    assert "temperature **1.5**" in card
    assert "c" * 64 in card
    assert "d" * 64 in card


def test_what_nobody_knows_is_to_fill(tmp_path: Path) -> None:
    rows = {row[0]: row[-1] for row in cells(card_of(tmp_path))}
    assert rows["CLAIM 1-8"] == "TO FILL"
    assert rows["CLAIM 20"].startswith("group; whether a group is a patient: TO FILL")
    assert rows["licence"] == "TO FILL"
    assert rows["CLAIM 31"].startswith("TO FILL")
    # Each item of CLAIM has its row.
    items: set[int] = set()
    for name in rows:
        for part in name.split(";")[0].removeprefix("CLAIM").split(",") if "CLAIM" in name else ():
            first, _, last = part.strip().partition("-")
            items |= set(range(int(first), int(last or first) + 1))
    assert items == set(range(1, 45))


def test_images_without_groups_are_said_to_flatter(tmp_path: Path) -> None:
    card = card_of(tmp_path, data={**CONFIG["data"], "every_image_is_a_group": True})
    assert "Splits are disjoint by image only" in card
    assert dict((row[0], row[-1]) for row in cells(card))["CLAIM 20"].startswith("image only")


def test_leakage_stands_at_the_top(tmp_path: Path) -> None:
    card = card_of(tmp_path, leakage={"pictures": 17, "images": 40})
    assert "**Leakage.**" in card.split("## ")[0]
    assert "17 pictures, 40 images" in card.split("## ")[0].replace("\n> ", " ")
    assert "Leakage" not in card_of(tmp_path)


@pytest.mark.parametrize(
    ("chosen", "rule"),
    [
        ("confirmed", "the best mean val_macro_f1 on validation images over 5 fresh seeds"),
        ("by hand", "by hand, trial 3; others may be better"),
    ],
)
def test_the_selection_rule_is_the_one_that_was_followed(
    tmp_path: Path, chosen: str, rule: str
) -> None:
    confirmation = {
        "num_seeds": 5,
        "candidates": [{"number": 3, "mean": 0.8, "low": 0.75, "high": 0.85}],
    }
    search = {**CONFIG["search"], "chosen": chosen, "confirmation": confirmation}
    card = card_of(tmp_path, search=search)
    assert f"**Selection rule:** {rule}" in card
    assert "0.8 (0.75 to 0.85)" in card


FIGURES = {
    "num_images": 8,
    "macro_f1": {"value": 0.71, "low": 0.6, "high": 0.8},
    "mcc": {"value": 0.5, "low": None, "high": None},
    "curve": [1, 2, 3],
}


def test_evaluations_are_told_with_intervals_and_repeated_ones_marked(tmp_path: Path) -> None:
    assert "None yet: `neurosweep evaluate" in card_of(tmp_path)
    entries = [
        {"date": "2026-11-22", "as": "evaluated", "run": 1, "figures": FIGURES},
        {"date": "2026-11-23", "run": 2, "figures": FIGURES, "external": {"figures": FIGURES}},
    ]
    (tmp_path / "evaluations.json").write_text(json.dumps(entries))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "roc.png").touch()
    card = card_of(tmp_path)
    rows = cells(card)
    assert rows.count(["macro f1", "0.71", "0.6 to 0.8"]) == 3
    assert ["mcc", "0.5", ""] in rows
    assert not [row for row in rows if row[0] == "curve"]
    assert "2026-11-23" in card
    assert "run 2 on these images: no first look" in card
    assert "![roc.png](evaluation/roc.png)" in card
    assert dict((row[0], row[-1]) for row in rows)["CLAIM 28; TRIPOD+AI 12e"] == "Test results"


def test_explanations_are_told_but_no_group_and_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "explanation").mkdir()
    (tmp_path / "explanation" / "0-a.png").touch()
    (tmp_path / "secret.png").touch()
    overlays = ["0-a.png", "../secret.png", "gone.png", str(tmp_path / "secret.png")]
    explanation = {
        "images": [
            {"group": "0123456789", "image": "Doe.png", "files": {"grad_cam": {"overlay": name}}}
            for name in overlays
        ],
        "tests": {"grad_cam": {"deletion": {"area": 0.25, "curve": [0.1]}}},
    }
    (tmp_path / "explanation" / "explanation.json").write_text(json.dumps(explanation))
    card = card_of(tmp_path)
    assert ["grad cam, deletion, area", "0.25", ""] in cells(card)
    assert "![0-a.png](explanation/0-a.png)" in card
    assert card.count("](explanation/") == 1
    for hidden in ("secret", "gone", "0123456789", "Doe"):
        assert hidden not in card


@pytest.mark.parametrize("value", [None, [], 5, "x", {}, {"": []}, [[1]], {"space": [1]}])
@pytest.mark.parametrize(
    "key", sorted(CONFIG.keys() - {"format", "classes", "input", "temperature"})
)
def test_a_card_is_written_of_whatever_a_description_lacks(
    tmp_path: Path, key: str, value: Any
) -> None:
    if key == "digests" and not isinstance(value, dict):
        pytest.skip("refused before")
    card = card_of(tmp_path, **{key: value})
    assert [line[3:] for line in card.splitlines() if line.startswith("## ")] == list(SECTIONS)


@pytest.mark.parametrize("value", [None, 5, {}, {"a": 1}, [1, None], [{"figures": [1]}], [{}]])
def test_a_card_is_written_of_whatever_results_hold(tmp_path: Path, value: Any) -> None:
    (tmp_path / "explanation").mkdir()
    for name in ("evaluations.json", "explanation/explanation.json"):
        (tmp_path / name).write_text(json.dumps(value))
    assert "## Limits" in card_of(tmp_path)


def test_results_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path) -> None:
    card_of(tmp_path)
    path = tmp_path / "evaluations.json"
    for content in (b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"evaluations\.json must be what was written"):
            write_card(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "config.json")
    with pytest.raises(InputError, match="no plain file"):
        write_card(tmp_path)


def test_a_card_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    card_of(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to(tmp_path / "target")
    with pytest.raises(InputError, match="is a link: remove it"):
        write_card(tmp_path)
    assert not (tmp_path / "target").exists()


def test_names_cannot_be_markup(tmp_path: Path) -> None:
    hostile = "<script>|`x`[a](http://h) # B"
    sources = {"sources": {hostile: COUNTS}, "classes_by_source": {hostile: {hostile: 1}}}
    card = card_of(tmp_path, data={**CONFIG["data"], **sources}, backbone=hostile)
    body = card.split("---\n", 2)[2]
    assert "<script>" not in body.replace("\\<", "")
    assert escape("a|b\n*c*\x1b") == r"a\|b \*c\*"
    assert table(["a"], []) == "None."
    assert table(["a", "b"], [[1, "x|y"]]) == "| a | b |\n|---|---|\n| 1 | x\\|y |"
