import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.data.manifest import COLUMNS, Manifest
from lightning_modules.data.splits import assign_splits
from lightning_modules.errors import InputError


def made(labels: list[str], groups: list[str], root: Path = Path("/data")) -> Manifest:
    paths = [f"{i}.png" for i in range(len(labels))]
    columns = (paths, labels, groups, ["s"] * len(labels), [""] * len(labels))
    return Manifest(root, pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)), dtype="str"))


def test_given_splits_are_returned_unchanged() -> None:
    manifest = made(["a", "b"] * 3, [str(i) for i in range(6)])
    splits = ["train", "train", "val", "val", "test", "test"]
    complete = Manifest(manifest.root, manifest.frame.assign(split=splits))
    assert assign_splits(complete, val_fraction=0.2, test_fraction=0.2, seed=0) is complete


@pytest.mark.parametrize("split", ["train", "val"])
def test_given_splits_that_lack_a_class_are_an_error(split: str) -> None:
    manifest = made(["a", "a", "b"], ["1", "2", "3"])
    other = {"train": "val", "val": "train"}[split]
    frame = manifest.frame.assign(split=["train", "val", other])
    with pytest.raises(InputError, match=f"got no {split} image of 'b'; move a group of it to"):
        assign_splits(Manifest(manifest.root, frame), val_fraction=0.2, test_fraction=0, seed=0)


def test_a_hundred_groups_split_into_the_nearest_whole_folds() -> None:
    # test: every 5th of 100 groups = 20; val: 0.2 / 0.8 = every 4th of the other 80 = 20.
    manifest = made(["a", "b"] * 100, [str(i // 2) for i in range(200)])
    got = assign_splits(manifest, val_fraction=0.2, test_fraction=0.2, seed=3)
    assert Counter(got.frame["split"]) == {"train": 120, "val": 40, "test": 40}
    assert Counter(got.frame["label"][got.rows("val")]) == {"a": 20, "b": 20}


def test_single_image_groups_split_by_class_share() -> None:
    # A tenth of 90 a and 10 b is 9 and 1; so is, of the rest, a ninth (0.1 / 0.9).
    manifest = made(["a"] * 90 + ["b"] * 10, [str(i) for i in range(100)])
    got = assign_splits(manifest, val_fraction=0.1, test_fraction=0.1, seed=0)
    assert Counter(got.frame["label"][got.rows("test")]) == {"a": 9, "b": 1}
    assert Counter(got.frame["label"][got.rows("val")]) == {"a": 9, "b": 1}


def test_without_a_test_fraction_nothing_is_test() -> None:
    manifest = made(["a", "b"] * 20, [str(i) for i in range(40)])
    got = assign_splits(manifest, val_fraction=0.25, test_fraction=0, seed=0)
    assert Counter(got.frame["split"]) == {"train": 30, "val": 10}


def test_equal_seeds_give_equal_splits_and_others_do_not() -> None:
    manifest = made(["a", "b"] * 30, [str(i // 3) for i in range(60)])
    one, same, other = (
        assign_splits(manifest, val_fraction=0.2, test_fraction=0.2, seed=seed)
        for seed in (1, 1, 2)
    )
    assert one.digest == same.digest != other.digest
    assert set(manifest.frame["split"]) == {""}  # the argument stays as it was


def test_three_groups_of_a_rare_class_reach_all_three_splits() -> None:
    labels = ["common"] * 60 + ["rare"] * 3
    manifest = made(labels, [str(i // 2) for i in range(60)] + ["x", "y", "z"])
    got = assign_splits(manifest, val_fraction=0.1, test_fraction=0.1, seed=0)
    assert sorted(got.frame["split"][60:]) == ["test", "train", "val"]


def test_two_groups_a_class_are_enough_without_test() -> None:
    got = assign_splits(
        made(["a", "a", "b", "b"], list("1234")), val_fraction=0.1, test_fraction=0, seed=0
    )
    for label in "ab":
        assert set(got.frame["split"][got.frame["label"] == label]) == {"train", "val"}


@pytest.mark.parametrize(("test_fraction", "n_groups"), [(0.0, 1), (0.2, 2)])
def test_a_class_with_too_few_groups_is_named_and_counted(
    test_fraction: float, n_groups: int
) -> None:
    # Six images of "few", of which the groups are one or two.
    labels = ["many"] * 40 + ["few"] * 6
    groups = [str(i) for i in range(40)] + [f"f{i % n_groups}" for i in range(6)]
    with pytest.raises(InputError, match=rf"got {n_groups} group\(s\) of 'few'") as caught:
        assign_splits(made(labels, groups), val_fraction=0.2, test_fraction=test_fraction, seed=0)
    assert ("set test_fraction to 0" in str(caught.value)) == bool(test_fraction)


@pytest.mark.parametrize(
    ("val", "test"),
    [(0, 0.1), (0.6, 0), (-0.1, 0), (0.1, -0.1), (0.1, 0.6), (0.4, 0.4), (float("nan"), 0)],
)
def test_a_fraction_out_of_range_is_an_error(val: float, test: float) -> None:
    with pytest.raises(InputError, match=r"val_fraction lies in \(0, 0.5\]"):
        assign_splits(
            made(["a", "b"] * 9, [*"abcdefghijklmnopqr"]),
            val_fraction=val,
            test_fraction=test,
            seed=0,
        )


def test_a_seed_out_of_range_is_an_error() -> None:
    with pytest.raises(InputError, match="a seed lies in"):
        assign_splits(made(["a", "b"], ["1", "2"]), val_fraction=0.2, test_fraction=0, seed=-1)


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 11)), min_size=2, max_size=40),
    val_fraction=st.sampled_from([0.05, 0.15, 0.25, 0.3]),
    test_fraction=st.sampled_from([0, 0.1, 0.2, 0.4]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_no_group_lies_in_two_splits_and_every_row_in_one(
    rows: list[tuple[str, int]], val_fraction: float, test_fraction: float, seed: int
) -> None:
    manifest = made([label for label, _ in rows], [f"g{group}" for _, group in rows])
    got = None
    with contextlib.suppress(InputError):  # no promise here: groups are few, and classes share them
        got = assign_splits(
            manifest, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed
        )
    if got is None:
        return
    assert got.frame.drop(columns="split").equals(manifest.frame.drop(columns="split"))
    assert (got.frame.groupby("group_id")["split"].nunique() == 1).all()
    parts = [got.rows(split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
    for split in ("train", "val", "test")[: 3 if test_fraction else 2]:
        assert set(got.frame["label"][got.rows(split)]) == set(manifest.classes)


@given(
    n_groups=st.lists(st.integers(3, 8), min_size=2, max_size=4),
    images=st.integers(1, 3),
    seed=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_three_groups_of_each_class_always_suffice(
    n_groups: list[int], images: int, seed: int
) -> None:
    rows = [(f"c{c}", f"c{c}g{g}") for c, n in enumerate(n_groups) for g in range(n)] * images
    manifest = made([label for label, _ in rows], [group for _, group in rows])
    got = assign_splits(manifest, val_fraction=0.15, test_fraction=0.15, seed=seed)
    assert got.frame.groupby("label")["split"].nunique().tolist() == [3] * len(n_groups)
