"""Train, val, and test: every row of a manifest in one of them, and every group in one only."""

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from lightning_modules.data.manifest import Manifest, Rows
from lightning_modules.errors import InputError


def assign_splits(
    manifest: Manifest, *, val_fraction: float, test_fraction: float, seed: int
) -> Manifest:
    """Split by group, keeping the classes' shares; leave a manifest that has splits as it is.

    Folds are whole, so a fraction becomes the nearest 1/n of rows (0.15: a seventh), and more
    where a class has fewer than n groups. The same frame and seed give the same splits.

    Args:
        manifest: With a split in every row, or in none.
        val_fraction: Share of rows for val, in (0, 0.5].
        test_fraction: Share of rows for test, 0 or in (0, 0.5]; train keeps at least val's share.
        seed: In [0, 2**32).

    Returns:
        A manifest in which every class occurs in train and val, and in test if there is one.

    Raises:
        InputError: If a fraction is out of range, or a class has too few groups.
    """
    frame, classes = manifest.frame, manifest.classes
    if (frame["split"] != "").all():
        for split in ("train", "val"):
            for label in sorted(set(classes) - set(frame["label"][frame["split"] == split])):
                raise InputError(
                    f"every class must occur in train and val; got no {split} image of {label!r}; "
                    f"move a group of it to {split}, or empty the split column"
                )
        return manifest
    _check_fractions(val_fraction, test_fraction, seed)

    labels = manifest.labels()
    groups = pd.factorize(frame["group_id"])[0].astype(np.int64)
    n_groups = _groups_a_class(labels, groups, len(classes))
    everything = np.arange(len(frame), dtype=np.int64)
    tests: Iterable[Rows] = ()
    if n_groups.min() >= (3 if test_fraction else 2):
        # Without a test split, the one candidate is a fold of no rows.
        tests = (everything[:0],)
        if test_fraction:
            tests = _held_out(labels, groups, test_fraction, seed, spare=2)
    for test in tests:
        rest = np.setdiff1d(everything, test)
        share = val_fraction / (1 - test_fraction)
        for val in _held_out(labels[rest], groups[rest], share, seed, spare=1):
            split_of = np.full(len(frame), "train", dtype=object)
            split_of[test], split_of[rest[val]] = "test", "val"
            column = pd.Series(split_of, index=frame.index, dtype="str")
            return Manifest(manifest.root, frame.assign(split=column))
    rarest = int(n_groups.argmin())
    raise InputError(
        f"every class must occur in train{', val and test' if test_fraction else ' and val'}, "
        f"each time with other groups; got {n_groups[rarest]} group(s) of {classes[rarest]!r}, the "
        f"fewest; add groups of it{', set test_fraction to 0' if test_fraction else ''} or leave "
        "the class out"
    )


def _check_fractions(val_fraction: float, test_fraction: float, seed: int) -> None:
    fits = 0 < val_fraction <= 0.5 and 0 <= test_fraction <= 0.5
    if not fits or 2 * val_fraction + test_fraction > 1 + 1e-9:  # 1e-9: 0.1 + 0.2 is not 0.3
        raise InputError(
            "val_fraction lies in (0, 0.5], test_fraction is 0 or in (0, 0.5], and train keeps at "
            f"least val's share; got {val_fraction} and {test_fraction}; try 0.15 and 0.15"
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed lies in [0, 2**32); got {seed}; choose one there")


def _groups_a_class(labels: Rows, groups: Rows, n_classes: int) -> Rows:
    pairs = np.unique(np.stack([labels, groups]), axis=1)
    return np.bincount(pairs[0], minlength=n_classes).astype(np.int64)


def _held_out(
    labels: Rows, groups: Rows, fraction: float, seed: int, *, spare: int
) -> Iterator[Rows]:
    """Yield row sets to hold out: every class in them, and in at least `spare` groups of the rest.

    The fold whose worst class comes nearest to the fraction is first. A fold that lacks a class
    is passed over; where all do, there are more folds than the rarest class has groups, and
    fewer are tried.
    """
    # Imported here: it takes a second, and a manifest with splits does without.
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    n_classes, n_groups = int(labels.max()) + 1, len(np.unique(groups))
    fewest = int(_groups_a_class(labels, groups, n_classes).min())
    wanted = max(2, round(1 / fraction))
    for n_folds in dict.fromkeys((wanted, max(2, min(wanted, fewest)), 2)):
        if n_folds > min(n_groups, int(np.bincount(labels).max())):
            continue  # scikit-learn refuses it
        # With one image a group both kinds say the same, and grouping takes 40 us a row and fold.
        one_each = n_groups == len(groups) and n_folds <= fewest
        kind = StratifiedKFold if one_each else StratifiedGroupKFold
        splitter = kind(n_splits=n_folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings():  # of classes with fewer rows than folds: looked at below
            warnings.simplefilter("ignore", UserWarning)
            folds = [held for _, held in splitter.split(labels, labels, groups)]
        totals = np.bincount(labels)
        shares = [np.bincount(labels[held], minlength=n_classes) / totals for held in folds]
        misses = [float(np.abs(share - fraction).max()) for share in shares]
        for i in sorted(range(n_folds), key=misses.__getitem__):
            held = folds[i]
            rest = np.setdiff1d(np.arange(len(labels)), held)
            left = _groups_a_class(labels[rest], groups[rest], n_classes)
            if left.min() >= spare and shares[i].min() > 0:
                yield held
