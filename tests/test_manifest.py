import hashlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.data import manifest as manifest_module
from lightning_modules.data.manifest import COLUMNS, Manifest, read_manifest
from lightning_modules.errors import InputError

MINI = (
    Path(os.environ.get("NEUROSWEEP_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    / "data/ci-mri5-mini"
)


def write_csv(folder: Path, text: str, *, files: bool = True) -> Path:
    """A manifest.csv, and an empty file for every cell of its first column."""
    path = folder / "manifest.csv"
    path.write_text(text, encoding="utf-8")
    if files:
        for line in text.splitlines()[1:]:
            file = folder / line.split(",")[0]
            if line.split(",")[0]:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def refused(path: Path, fragment: str, *, group_pattern: str | None = None) -> str:
    """The one-line message of the InputError that reading `path` must raise."""
    with pytest.raises(InputError, match=re.escape(fragment)) as caught:
        read_manifest(path, group_pattern=group_pattern)
    message = str(caught.value)
    assert "\n" not in message
    assert "\r" not in message
    return message


def made(labels: list[str], groups: list[str], root: Path = Path("/data")) -> Manifest:
    paths = [f"{i}.png" for i in range(len(labels))]
    columns = (paths, labels, groups, ["s"] * len(labels), [""] * len(labels))
    return Manifest(root, pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)), dtype="str"))


# Reading


def test_a_csv_is_read_as_text_with_columns_in_order_and_further_ones_kept(tmp_path: Path) -> None:
    text = "view,label,path,split,group_id,source\n007,b,x/1.png,train,01,s\nNA, a ,2.png,val,1,t\n"
    touch(tmp_path, "x/1.png", "2.png")
    got = read_manifest(write_csv(tmp_path, text, files=False))
    assert list(got.frame.columns) == [*COLUMNS, "view"]
    assert got.frame.to_numpy().tolist() == [
        ["x/1.png", "b", "01", "s", "train", "007"],
        ["2.png", "a", "1", "t", "val", "NA"],
    ]
    assert got.root == tmp_path.resolve()
    assert got.classes == ("a", "b")
    assert got.labels().tolist() == [1, 0]
    assert got.labels().dtype == np.int64
    assert got.rows("train").tolist() == [0]
    assert got.rows("val").tolist() == [1]
    assert got.rows("test").tolist() == []
    assert got.rows("val").dtype == np.int64


def test_missing_columns_get_their_defaults(tmp_path: Path) -> None:
    got = read_manifest(write_csv(tmp_path, "path,label\n1.png,a\n2.png,b\n"))
    assert got.frame.to_numpy().tolist() == [
        ["1.png", "a", "1.png", "unknown", ""],
        ["2.png", "b", "2.png", "unknown", ""],
    ]


def test_a_folder_with_a_manifest_reads_the_manifest(tmp_path: Path) -> None:
    write_csv(tmp_path, "path,label\n1.png,a\n2.png,b\n")
    assert read_manifest(tmp_path).digest == read_manifest(tmp_path / "manifest.csv").digest


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path,label\n1.png,a\n2.png,b\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_manifest(path).classes == ("a", "b")


def test_classes_named_none_and_na_are_classes(tmp_path: Path) -> None:
    got = read_manifest(write_csv(tmp_path, "path,label\n1.png,None\n2.png,NA\n3.png,null\n"))
    assert got.classes == ("NA", "None", "null")


def test_classes_count_in_the_order_of_their_code_points(tmp_path: Path) -> None:
    # In UTF-16 the bone (U+1F9B4) would come before the ligature (U+FB01).
    names = ["\ufb01", "é", "Z", "\U0001f9b4", "a", "10", "9"]
    rows = "".join(f"{i}.png,{name}\n" for i, name in enumerate(names))
    got = read_manifest(write_csv(tmp_path, f"path,label\n{rows}"))
    assert got.classes == ("10", "9", "Z", "a", "é", "\ufb01", "\U0001f9b4")
    assert [got.classes[index] for index in got.labels()] == names


def test_nan_in_split_means_unassigned(tmp_path: Path) -> None:
    got = read_manifest(write_csv(tmp_path, "path,label,split\n1.png,a,nan\n2.png,b,\n"))
    assert got.frame["split"].tolist() == ["", ""]


def test_class_folders_are_read_sorted_and_without_hidden_or_other_files(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *("b/2.JPG", "b/deep/er/1.tiff", "a/3.jpeg", "a/1.png", "a/2.Tif"),
        *("a/.hidden.png", ".git/x.png", "a/.cache/y.png", "a/notes.txt", "README.md"),
    )
    got = read_manifest(tmp_path)
    assert got.frame["path"].tolist() == [
        *("a/1.png", "a/2.Tif", "a/3.jpeg", "b/2.JPG", "b/deep/er/1.tiff")
    ]
    assert got.frame["label"].tolist() == ["a", "a", "a", "b", "b"]
    assert got.frame["group_id"].tolist() == got.frame["path"].tolist()
    assert set(got.frame["source"]) == {"folder"}
    assert set(got.frame["split"]) == {""}


def test_the_group_is_the_first_capture_group_of_the_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "a/p01_s1.png", "a/p01_s2.png", "b/p02_s1.png")
    got = read_manifest(tmp_path, group_pattern=r"/(p\d+)_(s\d)")
    assert got.frame["group_id"].tolist() == ["p01", "p01", "p02"]


def test_the_pattern_serves_a_csv_without_groups(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path,label\nx/1-2.png,a\ny/3-4.png,b\n")
    assert read_manifest(path, group_pattern=r"(\d)-").frame["group_id"].tolist() == ["1", "3"]


def test_paths_are_normalised(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.png", "2.png")
    path = write_csv(tmp_path, "path,label\n./x//1.png,a\nx/../2.png,b\n", files=False)
    assert read_manifest(path).frame["path"].tolist() == ["x/1.png", "2.png"]


def test_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path,label\n1.png,a\n2.png,b\n")
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to(tmp_path / "1.png")
    assert len(read_manifest(path).frame) == 2


def test_paths_start_beside_a_linked_manifest(tmp_path: Path) -> None:
    store, data = tmp_path / "store", tmp_path / "data"
    touch(data, "1.png", "2.png")
    store.mkdir()
    write_csv(store, "path,label\n1.png,a\n2.png,b\n", files=False)
    (data / "manifest.csv").symlink_to(store / "manifest.csv")
    assert read_manifest(data).root == data.resolve()


# Digest and writing


def test_the_digest_is_that_of_the_five_columns_and_nothing_else(tmp_path: Path) -> None:
    a = made(["a", "b"], ["g", "h"])
    # Worked out by hand: the five columns as JSON, one after the other.
    text = (
        '["path", ["0.png", "1.png"]]["label", ["a", "b"]]["group_id", ["g", "h"]]'
        '["source", ["s", "s"]]["split", ["", ""]]'
    )
    assert a.digest == hashlib.sha256(text.encode()).hexdigest()
    assert Manifest(tmp_path, a.frame.assign(view="x")).digest == a.digest
    for column in COLUMNS:
        assert Manifest(a.root, a.frame.assign(**{column: ["x", "y"]})).digest != a.digest


def test_a_written_manifest_reads_back_equal(tmp_path: Path) -> None:
    text = 'path,label,group_id,source,split,note\n1.png,ä,g"1,s,train,\n2.png,b,"h,2",s,val,x\n'
    first = read_manifest(write_csv(tmp_path, text))
    first.write(tmp_path / "manifest.csv")
    again = read_manifest(tmp_path)
    assert again.digest == first.digest
    pd.testing.assert_frame_equal(again.frame, first.frame)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.png", "2.png", "manifest.csv"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "m.csv").write_text("old")
    monkeypatch.setattr(manifest_module.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; free space"):
        made(["a"], ["g"]).write(tmp_path / "m.csv")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


# Mistakes

HEAD = "path,label,group_id,source,split\n"
BAD_CSV = {
    "missing path column": ("label,file\na,1\n", "needs the columns path and label, each once"),
    "semicolons": ("path;label\n1.png;a\n", "got 'path;label'; name them in the first line"),
    "column twice": ("path,label,label\n1.png,a,b\n", "each once; got 'path', 'label', 'label.1'"),
    "empty file": ("", "a CSV file in UTF-8, or a folder; got No columns to parse"),
    "only a header": (HEAD, "at least two classes; got no rows; add"),
    "more cells than the header": (
        "path,label\n1.png,a,x\n2.png,b,y\n",
        "as many cells as the header; got more in the first; quote",
    ),
    "uneven rows": ("path,label\n1.png,a\n2.png,b,y\n", "got Error tokenizing data"),
    "empty label": ("path,label\n1.png,a\n2.png,\n", "needs a label; got 1 empty cell(s), the fi"),
    "blank label": ("path,label\n1.png,a\n2.png,  \n", "needs a label; got 1 empty cell(s)"),
    "nan label": ("path,label\n1.png,a\n2.png,nan\n", "first in row 2; fill them in"),
    "empty path": (
        "path,label\n,a\n2.png,b\n",
        "needs a path; got 1 empty cell(s), the first in r",
    ),
    "empty group": (HEAD + "1.png,a,,s,\n2.png,b,,s,\n", "needs a group_id; got 2 empty cell(s)"),
    "unknown split": (HEAD + "1.png,a,g,s,valid\n2.png,b,h,s,val\n", "did you mean 'val'?"),
    "capital split": (HEAD + "1.png,a,g,s,Train\n2.png,b,h,s,val\n", "'Train'; did you mean 'tra"),
    "split partly given": (
        HEAD + "1.png,a,g,s,train\n2.png,b,h,s,\n",
        "every row has a split, or none has; got 1 of 2 without",
    ),
    "duplicate path": ("path,label\n1.png,a\n./1.png,b\n", "got '1.png' in rows 1 and 2"),
    "one class": ("path,label\n1.png,a\n2.png,a\n", "at least two classes; got 1: 'a'"),
    "slash in a label": ("path,label\n1.png,a/b\n2.png,b\n", "no '/'; got 'a/b'; rename"),
    "control character in a label": ("path,label\n1.png,a\x07\n2.png,b\n", r"got 'a\x07'"),
    "dots as a label": ("path,label\n1.png,..\n2.png,b\n", "got '..'; rename the class"),
    "long label": (f"path,label\n1.png,{'a' * 101}\n2.png,b\n", "a label has 1 to 100 printable"),
    "many columns": ("path,label" + ",x" * 999 + "\n1.png,a\n", "at most 1000 columns; got 1001"),
    "endless header": ("path,label" + "x" * 2**17, "header and first row have 65536 bytes"),
    "escape in a source": (HEAD + "1.png,a,g,\x1b[1m,\n2.png,b,h,s,\n", r"got '\x1b[1m'; rename"),
    "tab in a path": ("path,label\na\t.png,a\n2.png,b\n", r"control characters; got 'a\t.png'"),
}


@pytest.mark.parametrize(("text", "fragment"), BAD_CSV.values(), ids=BAD_CSV.keys())
def test_a_broken_csv_is_refused_in_one_line(tmp_path: Path, text: str, fragment: str) -> None:
    message = refused(write_csv(tmp_path, text), fragment)
    assert message.startswith(str(tmp_path / "manifest.csv"))


def test_a_first_row_without_end_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path,label\n" + "x" * 2**17, files=False)
    refused(path, "header and first row have 65536 bytes; got longer ones; shorten")


def test_a_newline_in_a_path_does_not_break_the_message(tmp_path: Path) -> None:
    path = write_csv(tmp_path, 'path,label\n"a\nb",a\n2.png,b\n', files=False)
    refused(path, r"got 'a\nb' in row 1; rename the files")


def test_a_label_of_100_characters_is_accepted(tmp_path: Path) -> None:
    assert read_manifest(write_csv(tmp_path, f"path,label\n1.png,{'a' * 100}\n2.png,b\n")).classes


def test_a_group_in_two_splits_is_an_error_that_hides_its_name(tmp_path: Path) -> None:
    text = HEAD + "John/1.png,a,John Doe,s,train\nJohn/2.png,b,John Doe,s,test\n3.png,b,h,s,val\n"
    message = refused(write_csv(tmp_path, text), "a group (patient) lies in one split only; got 1 ")
    # sha256("John Doe") = 6cea57c2fb...
    assert "such as 6cea57c2fb with '1.png' in train, '2.png' in test; move" in message
    assert "John" not in message


def test_a_missing_manifest_is_an_error(tmp_path: Path) -> None:
    refused(tmp_path / "no.csv", "got nothing of the kind there; check the path")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    refused(tmp_path / "pipe.csv", "got nothing of the kind there")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00path", b"path,label\n\xe4,a\n", b'path,label\n"a'])
def test_what_is_not_a_csv_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.csv").write_bytes(data)
    refused(tmp_path / "m.csv", "a manifest is a CSV file in UTF-8")


def test_too_many_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "MAX_ROWS", 2)
    text = "path,label\n1.png,a\n2.png,b\n"
    assert len(read_manifest(write_csv(tmp_path, text)).frame) == 2
    refused(write_csv(tmp_path, text + "3.png,b\n"), "at most 2 rows; got more; split the data set")


def test_a_csv_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "m.csv").open("wb") as file:
        file.truncate(2**30 + 1)
    refused(tmp_path / "m.csv", "at most 1073741824 bytes; got 1073741825; split the data set")


@pytest.mark.parametrize("path", ["/etc/hosts", "../1.png", "x/../../1.png", ".."])
def test_a_path_that_leaves_the_root_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "1.png").touch()
    root = tmp_path / "root"
    root.mkdir()
    file = write_csv(root, f"path,label\n{path},a\n2.png,b\n", files=False)
    refused(file, "every path is relative and stays inside the manifest's folder, links followed")


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_that_leaves_the_root_is_refused(tmp_path: Path, linked: str) -> None:
    touch(tmp_path, "outside/1.png")
    root = tmp_path / "root"
    touch(root, "2.png", "x/3.png")
    if linked == "file":
        (root / "x/1.png").symlink_to(tmp_path / "outside/1.png")
    else:
        (root / "x/3.png").unlink()
        (root / "x").rmdir()
        (root / "x").symlink_to(tmp_path / "outside")
    file = write_csv(root, "path,label\nx/1.png,a\n2.png,b\n", files=False)
    refused(file, "links followed; got '1.png' in row 1; copy the images into the folder")


def test_loops_of_links_folders_and_pipes_are_not_files(tmp_path: Path) -> None:
    touch(tmp_path, "good.png", "folder/x")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    text = "path,label\ngood.png,a\nloop.png,b\nfolder,b\npipe.png,b\ngood.png/x,b\n"
    path = write_csv(tmp_path, text, files=False)
    refused(
        path,
        "got 4 of 5 that are not: 'loop.png' in row 2, 'folder' in row 3, 'pipe.png' in row 4, "
        "'x' in row 5; add",
    )


def test_files_that_do_not_exist_are_listed_at_once_up_to_ten(tmp_path: Path) -> None:
    text = "path,label\n" + "".join(f"{i:02d}.png,{'ab'[i % 2]}\n" for i in range(12))
    message = refused(
        write_csv(tmp_path, text, files=False), "got 12 of 12 that are not: '00.png' in row 1, "
    )
    assert "'09.png' in row 10 and 2 more; add the files" in message
    assert "10.png" not in message


def test_a_pattern_beside_a_group_column_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path, HEAD + "1.png,a,g,s,\n2.png,b,h,s,\n")
    refused(path, "not both; got both; drop one of them", group_pattern="(.)")


@pytest.mark.parametrize(
    ("pattern", "fragment"),
    [
        ("(p", "got '(p' (missing )"),
        (r"p\d", "put parentheses around the part that names the group"),
        (r"(p\d+)", "got none in 1 of 2: 'x.png'; widen the pattern"),
        (r"(p\d+)?", "got none in 2 of 2"),  # an optional group that takes no part
        ("(a{1000000000})", "1000 characters and 1000 repetitions; got '(a{1000000000})'; shorten"),
        (r"b/(x{2,1000}|y{9})", "1000 characters and 1000 repetitions"),
        (r"_(p\d{4})_20212022_", "got none in 2 of 2"),  # no repetition
        ("((a{100}){100})", "1000 characters and 1000 repetitions; got '((a{100}){100})'; shorten"),
        ("(" * 1001, "group_pattern has up to 1000 characters"),
    ],
)
def test_a_pattern_that_finds_no_group_is_refused(
    tmp_path: Path, pattern: str, fragment: str
) -> None:
    touch(tmp_path, "a/p1.png", "b/x.png")
    refused(tmp_path, fragment, group_pattern=pattern)


def test_a_pattern_too_deep_for_pythons_stack_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/p1.png", "b/x.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; torch's compiler, run before, raises it
    try:
        refused(
            tmp_path,
            "group_pattern is a regular expression with a capture group",
            group_pattern="(" * 500 + ")" * 500,
        )
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("name", ["scan.dcm", "scan.NII.GZ", "scan.webp"])
def test_images_that_a_sweep_does_not_read_are_not_left_out_in_silence(
    tmp_path: Path, name: str
) -> None:
    for path in ("a/0.png", "b/1.png", f"b/{name}", "b/.hidden.dcm", "preview.gif"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    refused(tmp_path, f"got 1 that are not, such as '{name}'; export them as PNG, or move them")


def test_an_image_is_called_by_its_row_or_by_its_class_folder(tmp_path: Path) -> None:
    for path in ("a/Jane Doe/0.png", "b/1.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert read_manifest(tmp_path).name(0) == "'0.png' in class 'a'"
    listed = write_csv(tmp_path, HEAD + "a/Jane Doe/0.png,a,g,s,\nb/1.png,b,h,s,\n", files=False)
    assert read_manifest(listed).name(0) == "'0.png' in row 1"


def test_a_group_pattern_that_tries_every_split_of_a_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2**60 ways to take the letters apart, none of which ends in a digit.
    monkeypatch.setattr("lightning_modules.data.manifest.GROUP_TIMEOUT_S", 0.05)
    touch(tmp_path, f"a/{'p' * 60}.png", "b/1.png")
    refused(tmp_path, "finds all groups within 0 s; got '((p|pp)+)", group_pattern=r"((p|pp)+)\d")


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.txt", "c/2.png")
    refused(tmp_path, "got none in 'b'; add images or remove the folder")


@pytest.mark.parametrize("names", [(), ("1.png",), ("a/1.png", "b/1.png", "2.png")])
def test_images_outside_class_folders_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    touch(tmp_path, *names)
    refused(tmp_path, "images lie in one folder a class, or a manifest.csv lists them; got ")


def test_a_single_class_folder_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png")
    refused(tmp_path, "at least two classes; got 1: 'a'")


def test_a_linked_class_folder_is_refused_rather_than_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "data/a/1.png", "data/b/2.png", "else/3.png")
    (tmp_path / "data/c").symlink_to(tmp_path / "else")
    refused(
        tmp_path / "data", "are folders, not links; got 1 link(s) in class 'c'; copy the images"
    )


def test_a_linked_image_that_leaves_the_class_folders_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "data/a/1.png", "data/b/2.png", "3.png")
    (tmp_path / "data/b/3.png").symlink_to(tmp_path / "3.png")
    refused(tmp_path / "data", "links followed; got '3.png'; copy the images into the folder")


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/2.png")
    try:
        (tmp_path / os.fsdecode(b"b/\xff.png")).touch()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    refused(tmp_path, r"paths are UTF-8 without control characters; got '\udcff.png'")


@given(data=st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_random_bytes_as_a_manifest_raise_nothing_but_input_errors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "random.csv"
    file.write_bytes(b"path,label\n" + data if len(data) % 2 else data)
    with pytest.raises(InputError) as caught:
        read_manifest(file)
    assert len(str(caught.value).splitlines()) == 1


# Real images


@pytest.mark.skipif(not MINI.is_dir(), reason="needs the project's shared data")
def test_the_mini_set_has_28_images_of_each_of_five_classes() -> None:
    manifest = read_manifest(MINI)
    assert len(manifest.frame) == 140
    assert np.bincount(manifest.labels()).tolist() == [28] * 5
    assert [len(manifest.rows(split)) for split in ("train", "val", "test")] == [80, 30, 30]
