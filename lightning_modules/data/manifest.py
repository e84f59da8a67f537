"""Which images there are: path, class, group (patient), source, and split of each.

A manifest is untrusted input and often holds patients' names in its groups. Every check ends in
an `InputError` of one line. A group appears there only as the first ten digits of its sha256, and
an image as its file name and row: its folder may be named after a patient, too.
"""

import csv
import difflib
import hashlib
import io
import json
import math
import os
import posixpath
import re
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import regex

from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically

COLUMNS = ("path", "label", "group_id", "source", "split")
SPLITS = ("train", "val", "test")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

# Images that a sweep does not read: beside others they would be left out, and nobody would know.
OTHER_EXTENSIONS = (".dcm", ".nii", ".nii.gz", ".mha", ".nrrd", ".bmp", ".gif", ".webp")

MAX_ROWS = 10_000_000
MAX_CSV_BYTES = 2**30
MAX_LABEL_CHARACTERS = 100

# Of a CSV: pandas takes 4 KiB of memory and 0.1 ms for each column that its first rows have.
MAX_COLUMNS = 1000
MAX_HEAD_BYTES = 2**16

# Some patterns try every way to split a path up; others are searched in a thousandth of the second.
GROUP_TIMEOUT_S = 1.0
GROUP_TIMEOUT_A_PATH_S = 1e-4

# A hundred characters can say to repeat what is repeated a billion times.
MAX_PATTERN_CHARACTERS = 1000
MAX_REPETITIONS = 1000

_EMPTY = ("", "nan", "NaN")  # what pandas writes for a missing cell; "NA" and "None" are names
_NOT_IN_A_PATH = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, non-UTF-8

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)  # eq: comparing two frames gives a frame, not an answer
class Manifest:
    """The images of a sweep, in a fixed order: the row number is the sample's index everywhere.

    Attributes:
        root: Folder that relative paths start from, resolved.
        frame: `COLUMNS` first, then further columns, all as text; one row an image; never changed.
        is_listed: Whether a CSV lists them: of class folders there are no rows to look up.
    """

    root: Path
    frame: pd.DataFrame
    is_listed: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that occur, sorted by code point; a class index counts in this order."""
        return tuple(sorted(self.frame["label"].unique()))

    @property
    def digest(self) -> str:
        """Sha256 over `COLUMNS`: equal on every machine; says nothing about pixels."""
        hashed = hashlib.sha256()
        for column in COLUMNS:
            # JSON, so that no cell can imitate the boundary between two cells.
            hashed.update(json.dumps([column, self.frame[column].tolist()]).encode())
        return hashed.hexdigest()

    def name(self, row: int) -> str:
        """Return what an image is called to its owner: its folders may be named after a patient.

        Args:
            row: Counted from 0; shown counted from 1, or, of class folders, as the class.
        """
        cells = self.frame.iloc[row]
        where = f"row {row + 1}" if self.is_listed else f"class {cells['label']!r}"
        return f"{posixpath.basename(cells['path'])!r:.200} in {where}"

    def labels(self) -> Rows:
        """Return the class index of every row."""
        codes, _ = pd.factorize(self.frame["label"], sort=True)
        return np.asarray(codes, dtype=np.int64)

    def rows(self, split: str) -> Rows:
        """Return the row numbers of one split, ascending; empty where nothing is assigned to it."""
        return np.flatnonzero((self.frame["split"] == split).to_numpy()).astype(np.int64)

    def csv(self) -> bytes:
        """Return the frame as CSV; its paths are relative to `root`."""
        return self.frame.to_csv(index=False, lineterminator="\n").encode()

    def write(self, path: Path) -> None:
        """Write the frame as CSV, whole or not at all.

        Paths stay relative to `root`: written anywhere else, the file no longer finds its images.

        Raises:
            InputError: If the file cannot be written.
        """
        try:
            write_atomically(path, self.csv())
        except OSError as error:
            raise _broken(
                path,
                "a manifest needs a folder that can be written to",
                error.strerror,
                "free space or choose another folder",
            ) from error


def read_manifest(path: Path, *, group_pattern: str | None = None) -> Manifest:
    """Read and check a manifest; open no image.

    Args:
        path: A CSV file, a folder that holds `manifest.csv`, or a folder of class folders with
            images anywhere below them. Relative paths start from that folder.
        group_pattern: Regular expression searched in every relative path, where the manifest has
            no `group_id`: its first capture group is the group. Without it, each image is a
            group of its own.

    Returns:
        The manifest; a missing source is "unknown" (of class folders "folder"), a missing split "".

    Raises:
        InputError: On the first rule that the manifest breaks.
    """
    try:
        file = path / "manifest.csv" if (path / "manifest.csv").exists() else path
        # Not of a link's target: paths start beside the link.
        root = file.resolve() if file.is_dir() else file.parent.resolve()
        frame = _class_folders(root) if file.is_dir() else _read_csv(file)
    except OSError as error:
        got = error.strerror
        raise _broken(path, "a manifest is readable", got, "change its permissions") from error
    for column, default in (("source", "unknown"), ("split", "")):
        if column not in frame:
            frame[column] = default
    _check_cells(file, frame)
    frame["path"] = paths = _normal_paths(file, frame["path"].tolist())
    if "group_id" not in frame:
        frame["group_id"] = _groups(file, paths, group_pattern)
    elif group_pattern is not None:
        rule = "groups come from a group_id column or from group_pattern, not both"
        raise _broken(file, rule, "both", "drop one of them")
    _check_splits(file, frame)
    _check_files(file, root, paths)
    further = [column for column in frame.columns if column not in COLUMNS]
    return Manifest(root, frame[[*COLUMNS, *further]], is_listed=not file.is_dir())


def with_splits_of(manifest: Manifest, written: Path) -> Manifest:
    """Return a manifest with the groups and splits that were assigned to its images before.

    Args:
        manifest: As it is now.
        written: What `Manifest.write` wrote of it then.

    Raises:
        InputError: If the file is not there, or of other images.
    """
    frame = manifest.frame
    recorded = _read_cells(written)
    same = all(
        column in recorded and recorded[column].tolist() == frame[column].tolist()
        for column in ("path", "label")
    )
    if not same or not {"group_id", "split"} <= set(recorded.columns):
        rule = "the images are those that were written down at launch, with their labels"
        raise _broken(written, rule, "others", "restore them, or launch a new sweep")
    columns = {name: recorded[name].astype("str") for name in ("group_id", "split")}
    assigned = frame.assign(**columns)
    return Manifest(manifest.root, assigned)


def some_of(items: Sequence[str], limit: int = 10) -> str:
    """Return the first few items in one line, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def hashed(group: str) -> str:
    """Return what stands for a group in everything that is shown: it may be a patient's name."""
    return hashlib.sha256(group.encode()).hexdigest()[:10]


def _broken(file: Path, rule: str, got: object, remedy: str) -> InputError:
    return InputError(" ".join(f"{file}: {rule}; got {got}; {remedy}".split()))


def _class_folders(root: Path) -> pd.DataFrame:
    """Return one row an image below the class folders of `root`, sorted; leave out hidden names."""

    def unreadable(error: OSError) -> None:
        inside = Path(error.filename).relative_to(root).parts[:1]
        got = f"{error.strerror} in {inside[0]!r}" if inside else error.strerror
        raise _broken(root, "every class folder is readable", got, "change its permissions")

    paths: list[str] = []
    others: list[str] = []
    n_images: dict[str, int] = {}
    for name, folders, files in os.walk(root, onerror=unreadable):
        folder = Path(name)
        inside = folder.relative_to(root)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if links := [inside / f for f in folders if (folder / f).is_symlink()]:
            rule = "class folders and what they hold are folders, not links"
            remedy = "copy the images there, or list them in a manifest.csv"
            got = f"{len(links)} link(s) in class {links[0].parts[0]!r}"
            raise _broken(root, rule, got, remedy)
        shown = [f for f in files if not f.startswith(".")]
        images = [f for f in shown if f.lower().endswith(EXTENSIONS)]
        if inside.parts:
            others += [f for f in shown if f.lower().endswith(OTHER_EXTENSIONS)]
            n_images[inside.parts[0]] += len(images)
            paths += [(inside / f).as_posix() for f in images]
            continue
        n_images = dict.fromkeys(folders, 0)
        if images or not folders:
            rule = "images lie in one folder a class, or a manifest.csv lists them"
            got = f"{len(images)} image(s) beside {len(folders)} class folder(s)"
            raise _broken(root, rule, got, "move them, or write a manifest.csv")
    if others:
        rule = f"images in class folders are {', '.join(EXTENSIONS)}"
        got = f"{len(others)} that are not, such as {others[0]!r:.200}"
        raise _broken(root, rule, got, "export them as PNG, or move them elsewhere")
    if empty := [repr(label) for label, count in n_images.items() if not count]:
        rule = f"every class folder holds images ({', '.join(EXTENSIONS)})"
        raise _broken(root, rule, f"none in {some_of(empty)}", "add images or remove the folder")
    paths.sort()
    _check_characters(root, paths)  # before pandas, which fails on what is not UTF-8
    labels = [path.split("/", 1)[0] for path in paths]
    return pd.DataFrame({"path": paths, "label": labels, "source": "folder"}, dtype="str")


def _read_csv(file: Path) -> pd.DataFrame:
    """Return all cells of a CSV as text, blanks around them removed except in paths."""
    frame = _read_cells(file)
    for column in frame.columns:
        text = frame[column].astype("str")
        frame[column] = text if column == "path" else text.str.strip()
    return frame


def _read_cells(file: Path) -> pd.DataFrame:
    """Return all cells of a CSV as text; its columns are named, each once."""
    rule = "a manifest is a CSV file in UTF-8, or a folder"
    if not file.is_file():
        remedy = "check the path, or give your images with `--data`"
        raise _broken(file, rule, "nothing of the kind there", remedy)
    if (size := file.stat().st_size) > MAX_CSV_BYTES:
        limit = f"a manifest has at most {MAX_CSV_BYTES} bytes"
        raise _broken(file, limit, size, "split the data set")
    _check_head(file, rule)
    try:
        # na_filter=False: pandas would read the class "None" or "NA" as a missing cell.
        frame = pd.read_csv(
            file, dtype=str, na_filter=False, encoding="utf-8-sig", nrows=MAX_ROWS + 1
        )
    except (ValueError, OverflowError, MemoryError) as error:
        got = f"{error!s:.200}" or type(error).__name__
        raise _broken(file, rule, got, "save it again as CSV UTF-8") from error
    if len(frame) > MAX_ROWS:
        rule = f"a manifest has at most {MAX_ROWS} rows"
        raise _broken(file, rule, "more", "split the data set")
    if not isinstance(frame.index, pd.RangeIndex):  # pandas took surplus cells for an index
        rule = "every row has as many cells as the header"
        raise _broken(file, rule, "more", "quote cells that hold a comma")
    frame.columns = pd.Index([str(column).strip() for column in frame.columns])
    # pandas calls the second column of a name "name.1".
    twice = [c for c in COLUMNS if f"{c}.1" in frame or (frame.columns == c).sum() > 1]
    if twice or "path" not in frame or "label" not in frame:
        rule = "the header needs the columns path and label, each once"
        got = some_of([f"{column!r:.40}" for column in frame.columns])
        raise _broken(file, rule, got, "name them in the first line, separated by commas")
    return frame


def _check_head(file: Path, rule: str) -> None:
    """Check how many cells the first two rows have, by which pandas goes."""
    with file.open("rb") as opened:
        head = opened.read(MAX_HEAD_BYTES)
    text = head.decode("utf-8-sig", errors="replace")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if "".join(row).strip()]
    except csv.Error as error:
        raise _broken(file, rule, str(error), "save it again as CSV UTF-8") from error
    # The last of them may go on beyond what was read.
    if len(rows) < 3 and len(head) == MAX_HEAD_BYTES:
        got, remedy = "longer ones", "shorten the names of the columns"
        raise _broken(file, f"header and first row have {MAX_HEAD_BYTES} bytes", got, remedy)
    if rows and len(rows[0]) > MAX_COLUMNS:
        got, remedy = str(len(rows[0])), "leave out what is not needed"
        raise _broken(file, f"a manifest has at most {MAX_COLUMNS} columns", got, remedy)
    if len(rows) > 1 and len(rows[1]) > len(rows[0]):
        got, remedy = "more in the first", "quote cells that hold a comma"
        raise _broken(file, "every row has as many cells as the header", got, remedy)


def _check_cells(file: Path, frame: pd.DataFrame) -> None:
    """Check empty cells, labels, and the number of classes; write missing splits as ""."""
    for column in ("path", "label", "group_id"):
        if column in frame and (empty := np.flatnonzero(frame[column].isin(_EMPTY))).size:
            got = f"{empty.size} empty cell(s), the first in row {empty[0] + 1}"
            raise _broken(file, f"every row needs a {column}", got, "fill them in")
    frame["split"] = frame["split"].where(~frame["split"].isin(_EMPTY), "")
    labels = sorted(set(frame["label"]))
    for label in labels:
        fits = len(label) <= MAX_LABEL_CHARACTERS and label.isprintable() and "/" not in label
        if not fits or label in (".", ".."):
            rule = f"a label has 1 to {MAX_LABEL_CHARACTERS} printable characters and no '/'"
            raise _broken(file, rule, f"{label!r:.120}", "rename the class")
    for source in sorted(set(frame["source"])):
        # It is shown in tables.
        if len(source) > MAX_LABEL_CHARACTERS or _NOT_IN_A_PATH.search(source):
            rule = (
                f"a source has at most {MAX_LABEL_CHARACTERS} characters, none a control character"
            )
            raise _broken(file, rule, f"{source!r:.120}", "rename it")
    if len(labels) < 2:
        got = f"{len(labels)}: {labels[0]!r}" if labels else "no rows"
        rule = "a classifier needs at least two classes"
        raise _broken(file, rule, got, "add images of another class")


def _named(file: Path, paths: Sequence[str], rows: Sequence[int]) -> str:
    """Return the file names of some rows, counted from 0, without their folders."""
    # Of class folders there are no rows that one could look up.
    where = "" if file.is_dir() else " in row {}"
    return some_of(
        [f"{posixpath.basename(paths[row])!r:.200}{where.format(row + 1)}" for row in rows]
    )


def _check_characters(file: Path, paths: list[str]) -> None:
    if bad := [row for row, path in enumerate(paths) if _NOT_IN_A_PATH.search(path)]:
        rule = "paths are UTF-8 without control characters"
        raise _broken(file, rule, _named(file, paths, bad), "rename the files")


def _refuse_outside(file: Path, paths: Sequence[str], outside: list[int]) -> None:
    if outside:
        rule = "every path is relative and stays inside the manifest's folder, links followed"
        remedy = "copy the images into the folder, or move the manifest up"
        raise _broken(file, rule, _named(file, paths, outside), remedy)


def _normal_paths(file: Path, paths: list[str]) -> list[str]:
    """Return paths without "." and "..": relative, inside the root as written, each once."""
    _check_characters(file, paths)
    normal = [posixpath.normpath(path) for path in paths]
    outside = [r for r, p in enumerate(normal) if p.startswith(("/", "../")) or p == ".."]
    _refuse_outside(file, normal, outside)
    first: dict[str, int] = {}
    for row, path in enumerate(normal):
        if (earlier := first.setdefault(path, row)) != row:
            got = f"{posixpath.basename(path)!r} in rows {earlier + 1} and {row + 1}"
            raise _broken(file, "every path is listed once", got, "remove one of them")
    return normal


def _groups(file: Path, paths: list[str], group_pattern: str | None) -> list[str]:
    """Return the group of every path: the pattern's first capture group, or the path itself."""
    if group_pattern is None:
        return paths
    rule = "group_pattern is a regular expression with a capture group"
    # Of each {3} and {3,5}, however they are nested.
    counts = re.findall(r"\{(\d*)(?:,(\d*))?\}", group_pattern)
    repetitions = math.prod(max(1, *(int(number or 1) for number in pair)) for pair in counts)
    if len(group_pattern) > MAX_PATTERN_CHARACTERS or repetitions > MAX_REPETITIONS:
        limits = f"up to {MAX_PATTERN_CHARACTERS} characters and {MAX_REPETITIONS} repetitions"
        raise _broken(file, f"group_pattern has {limits}", f"{group_pattern!r:.200}", "shorten it")
    try:
        pattern = regex.compile(group_pattern)
    except (regex.error, RecursionError) as error:
        raise _broken(file, rule, f"{group_pattern!r:.200} ({error})", "correct it") from error
    if not pattern.groups:
        remedy = "put parentheses around the part that names the group"
        raise _broken(file, rule, f"{group_pattern!r:.200}", remedy)
    allowed_s = GROUP_TIMEOUT_S + len(paths) * GROUP_TIMEOUT_A_PATH_S
    deadline_s = time.monotonic() + allowed_s
    try:
        found = [
            pattern.search(path, timeout=max(1e-3, deadline_s - time.monotonic())) for path in paths
        ]
    except TimeoutError as error:
        rule = f"group_pattern finds all groups within {allowed_s:.0f} s"
        remedy = "repeat nothing that repeats itself, as in (a+)+"
        raise _broken(file, rule, f"{group_pattern!r:.200}", remedy) from error
    groups = [match.group(1) or "" if match else "" for match in found]
    if lost := [repr(posixpath.basename(p)) for p, g in zip(paths, groups, strict=True) if not g]:
        rule = "group_pattern finds a group in every relative path"
        got = f"none in {len(lost)} of {len(paths)}: {some_of(lost)}"
        raise _broken(file, rule, got, "widen the pattern, or add a group_id column")
    return groups


def _check_splits(file: Path, frame: pd.DataFrame) -> None:
    """Check split names: in all rows or none, and no group in two splits."""
    names = set(frame["split"]) - {""}
    for name in sorted(names - set(SPLITS)):
        near = difflib.get_close_matches(name.lower(), SPLITS, n=1, cutoff=0.0)[0]
        rule = f"a split is one of {', '.join(SPLITS)}, or empty in all rows"
        raise _broken(file, rule, f"{name!r:.100}", f"did you mean {near!r}?")
    if names and (missing := int((frame["split"] == "").sum())):
        got = f"{missing} of {len(frame)} without"
        remedy = "fill them in, or empty the column to have splits assigned"
        raise _broken(file, "every row has a split, or none has", got, remedy)
    n_splits = frame.groupby("group_id", sort=False)["split"].nunique()
    if len(torn := n_splits[n_splits > 1]):
        group = str(torn.index[0])
        members = frame[frame["group_id"] == group].drop_duplicates("split")
        where = ", ".join(
            f"{posixpath.basename(path)!r} in {split}"
            for path, split in zip(members["path"], members["split"], strict=True)
        )
        got = f"{len(torn)} group(s) in several, such as {hashed(group)} with {where}"
        remedy = "move all images of a group into one split"
        raise _broken(file, "a group (patient) lies in one split only", got, remedy)


def _check_files(file: Path, root: Path, paths: list[str]) -> None:
    """Check that every path is a plain file inside the root, links followed.

    Folders are resolved once each, and files only where they are links: a million `resolve` calls
    take half a minute.
    """
    contained: dict[str, bool] = {}
    outside: list[int] = []
    missing: list[int] = []
    for row, path in enumerate(paths):
        folder = posixpath.dirname(path)
        try:
            if folder not in contained:
                contained[folder] = (root / folder).resolve().is_relative_to(root)
            inside, status = contained[folder], (root / path).lstat()
            if inside and stat.S_ISLNK(status.st_mode):
                target = (root / path).resolve()
                inside, status = target.is_relative_to(root), target.stat()
            if inside and not stat.S_ISREG(status.st_mode):
                missing.append(row)
        except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
            missing.append(row)
            continue
        if not inside:
            outside.append(row)
    _refuse_outside(file, paths, outside)
    if missing:
        got = f"{len(missing)} of {len(paths)} that are not: {_named(file, paths, missing)}"
        raise _broken(file, "every path is a file", got, "add the files or remove their rows")
