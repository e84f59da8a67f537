"""The audit finds what was planted, and a launch is refused where copies lie in two splits."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from lightning_modules.data.audit import Audit, group_duplicates
from lightning_modules.data.duplicates import Duplicates
from lightning_modules.data.manifest import Manifest, read_manifest
from lightning_modules.data.phantom import PhantomSettings, write_phantoms
from lightning_modules.data.splits import assign_splits
from lightning_modules.errors import InputError
from search.audit import audit_folder
from search.cli import main
from search.config import load_sweep
from search.data import check_leakage, prepare_data
from search.sweep import Sweep


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Simulated slices of 25 patients, one each, with a manifest that has splits."""
    settings = PhantomSettings(num_patients=25, slices_per_patient=1, image_size_px=64)
    path = write_phantoms(settings, tmp_path / "phantoms")
    manifest = assign_splits(read_manifest(path), val_fraction=0.2, test_fraction=0.2, seed=0)
    manifest.write(path)
    return path.parent


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "manifest.csv", dtype=str, na_filter=False)


def write_rows(folder: Path, rows: pd.DataFrame) -> None:
    rows.to_csv(folder / "manifest.csv", index=False)


def plant(folder: Path, *, split: str, label: str | None = None) -> tuple[str, str]:
    """Put a mirrored copy of the first training image under a new name; return both names."""
    rows = rows_of(folder)
    original = rows[rows["split"] == "train"].iloc[0]
    copy = dict(original, path="copy.png", group_id="another", split=split)
    copy["label"] = label or original["label"]
    with Image.open(folder / original["path"]) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "copy.png")
    write_rows(folder, pd.concat([rows, pd.DataFrame([copy])]))
    return Path(original["path"]).name, "copy.png"


def files(manifest: Manifest, clusters: tuple[tuple[int, ...], ...]) -> list[set[str]]:
    return [{Path(manifest.frame["path"].iloc[row]).name for row in rows} for rows in clusters]


def test_a_copy_in_another_split_is_a_leak(folder: Path) -> None:
    pair = plant(folder, split="test")
    manifest, audit = audit_folder(folder)
    assert files(manifest, audit.leaks) == [set(pair)]
    assert audit.conflicts == ()


def test_a_copy_in_the_same_split_is_no_leak(folder: Path) -> None:
    plant(folder, split="train")
    audit = audit_folder(folder)[1]
    assert len(audit.duplicates.near) == 1
    assert audit.leaks == audit.conflicts == ()


def test_a_copy_under_another_label_is_a_conflict(folder: Path) -> None:
    rows = rows_of(folder)
    first = rows[rows["split"] == "train"].iloc[0]["label"]
    other = next(label for label in sorted(set(rows["label"])) if label != first)
    pair = plant(folder, split="train", label=other)
    manifest, audit = audit_folder(folder)
    assert files(manifest, audit.conflicts) == [set(pair)]


def test_files_that_cannot_be_read_are_listed_with_the_reason(folder: Path) -> None:
    rows = rows_of(folder)
    (folder / rows["path"][3]).write_bytes(b"junk")
    audit = audit_folder(folder)[1]
    assert audit.unreadable == {rows["path"][3]: "is not a PNG, JPEG or TIFF file"}
    assert audit.num_images == 24


def test_odd_files_are_outliers(folder: Path) -> None:
    rows = rows_of(folder)
    with Image.open(folder / rows["path"][0]) as image:
        image.resize((300, 300)).save(folder / rows["path"][0])  # 4.7 times the others
        image.resize((64, 40)).save(folder / rows["path"][1])  # aspect 1.6
    Image.new("L", (64, 64), 30).save(folder / rows["path"][2])
    audit = audit_folder(folder)[1]
    assert audit.outliers == {
        0: "300 x 300 px where 64 px are usual",
        1: "aspect 1.60 where 1.00 is usual",
        2: "nothing to see",
    }


def test_a_rare_mode_is_an_outlier(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(202):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
        (image.convert("RGB") if number == 6 else image).save(path)
    manifest, audit = audit_folder(tmp_path / "images")
    [(row, why)] = audit.outliers.items()
    assert manifest.frame["path"][row] == "a/6.png"
    assert why == "mode RGB, as 0.5% of the images"


def test_images_are_counted_by_source_and_class(folder: Path) -> None:
    audit = audit_folder(folder)[1]
    # 25 patients over five classes in turn; tumours and "no tumour" are T1, the others FLAIR.
    assert audit.counts.loc["phantom_t1ce"].to_dict() == {
        "benign_tumor": 5,
        "malignant_tumor": 5,
        "no_stroke": 0,
        "no_tumor": 5,
        "stroke": 0,
    }


def test_the_floor_of_a_set_whose_source_says_the_class_is_1(tmp_path: Path) -> None:
    manifest, audit = labelled_noise(tmp_path, sources=("scanner_a", "scanner_b"))
    assert audit.macro_f1["source"] == 1.0
    labels = manifest.labels()[manifest.rows("val")]
    constant = np.full(len(labels), np.bincount(labels).argmax())
    expected = f1_score(labels, constant, average="macro", zero_division=0)
    assert audit.macro_f1["constant"] == pytest.approx(expected)
    assert audit.macro_f1["thumbnail"] < 0.8  # noise: nothing to learn


def test_the_floor_of_a_set_whose_thumbnails_say_the_class_is_1(tmp_path: Path) -> None:
    audit = labelled_noise(tmp_path, sources=("one", "one"), brighter=120)[1]
    assert audit.macro_f1["thumbnail"] == 1.0
    assert audit.macro_f1["source"] == audit.macro_f1["constant"]


def labelled_noise(
    folder: Path, *, sources: tuple[str, str], brighter: int = 0
) -> tuple[Manifest, Audit]:
    """Audit 60 images of noise in two classes, the second of which may be brighter."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        label = number % 2
        pixels = rng.integers(0, 100, (32, 32), dtype=np.uint8) + np.uint8(brighter * label)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = "train" if number < 40 else "val"
        rows.append((f"{number}.png", "ab"[label], sources[label], split))
    frame = pd.DataFrame(rows, columns=["path", "label", "source", "split"])
    frame.to_csv(folder / "manifest.csv", index=False)
    return audit_folder(folder)


def test_a_folder_without_classes_is_audited_for_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "3.png").read_bytes())
    manifest, audit = audit_folder(tmp_path)
    assert files(manifest, audit.duplicates.exact) == [{"3.png", "copy.png"}]
    assert audit.macro_f1 == {}


def grouped(groups: list[str], splits: list[str], near: tuple[tuple[int, ...], ...]) -> Manifest:
    frame = pd.DataFrame(
        {
            "path": [f"{row}.png" for row in range(len(groups))],
            "label": "a",
            "group_id": groups,
            "source": "s",
            "split": splits,
        }
    )
    return group_duplicates(Manifest(Path(), frame), Duplicates(exact=(), near=near))


def test_groups_that_share_a_picture_become_one() -> None:
    # 0 and 2 are copies, and 3 and 5: so A = B, C = D; E stands alone.
    manifest = grouped(list("AABCEDD"), [""] * 7, ((0, 2), (3, 5)))
    assert list(manifest.frame["group_id"]) == list("AAACECC")


def test_chains_of_groups_become_one() -> None:
    # A = B, C = D, and then B = C.
    manifest = grouped(list("ABCDE"), [""] * 5, ((0, 1), (2, 3), (1, 2)))
    assert len(set(manifest.frame["group_id"])) == 2
    assert manifest.frame["group_id"][4] == "E"


def test_a_group_in_train_and_test_goes_to_train_one_in_val_and_test_to_val() -> None:
    manifest = grouped(list("ABCDE"), ["train", "test", "val", "test", "test"], ((0, 1), (2, 3)))
    assert list(manifest.frame["split"]) == ["train", "train", "val", "val", "test"]


def test_grouping_by_command_writes_a_manifest_without_leaks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(folder, split="test")
    main(["audit", str(folder), "--group-duplicates", str(folder / "grouped.csv")])
    assert "neurosweep launch SWEEP.yaml --data" in capsys.readouterr().out
    written = read_manifest(folder / "grouped.csv")
    assert len(written.frame) == 26  # grouped, not deleted
    assert audit_folder(folder / "grouped.csv")[1].leaks == ()


def test_the_audit_ends_with_1_where_pictures_lie_in_several_splits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["audit", str(folder)])
    first, second = plant(folder, split="val")
    with pytest.raises(SystemExit) as caught:
        main(["audit", str(folder)])
    assert caught.value.code == 1
    assert f"{first} (train) = {second} (val)" in capsys.readouterr().out


def test_what_is_written_hashes_groups_and_leaves_folders_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(folder)
    rows["group_id"] = [f"Jane Doe {row}" for row in range(len(rows))]
    (folder / "Jane Doe").mkdir()
    rows["path"] = [str(Path("Jane Doe") / Path(path).name) for path in rows["path"]]
    for name, path in zip(rows_of(folder)["path"], rows["path"], strict=True):
        (folder / name).rename(folder / path)
    write_rows(folder, rows)
    plant(folder, split="test")
    with pytest.raises(SystemExit):
        main(["audit", str(folder), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "audit.json").read_text()
    assert "Jane" not in text + capsys.readouterr().out
    [[first, second]] = json.loads(text)["leaks"]
    train = rows.index[rows["split"] == "train"][0]
    assert first["group"] == hashlib.sha256(f"Jane Doe {train}".encode()).hexdigest()[:10]
    assert (first["row"], second["row"]) == (train + 1, 26)
    with Image.open(tmp_path / "out" / "leaks.png") as sheet:
        assert sheet.size == (2 * 132, 132)


def sweep_of(folder: Path, **data: object) -> Sweep:
    path = folder.parent / "sweep.yaml"
    path.write_text("name: s\nweights: random\ndata: {image_size_px: 64}\n")
    return load_sweep(path, {"data.path": str(folder), **data})


def test_a_launch_is_refused_where_the_manifest_tears_copies_apart(folder: Path) -> None:
    first, second = plant(folder, split="test")
    sweep = sweep_of(folder)
    with pytest.raises(InputError, match="must lie in one split") as caught:
        check_leakage(sweep, *prepare_data(sweep))
    assert f"{first} (train) = {second} (test)" in str(caught.value)


def test_leakage_that_is_allowed_is_counted(folder: Path) -> None:
    plant(folder, split="test")
    sweep = sweep_of(folder, **{"data.duplicates": "allow"})
    assert check_leakage(sweep, *prepare_data(sweep)) == {"pictures": 1, "images": 2}


def test_grouping_at_launch_moves_copies_together(folder: Path) -> None:
    plant(folder, split="test")
    sweep = sweep_of(folder, **{"data.duplicates": "group"})
    manifest, pack = prepare_data(sweep)
    assert manifest.frame["split"].iloc[-1] == "train"
    assert check_leakage(sweep, manifest, pack) == {}


def test_splits_made_here_keep_copies_together(folder: Path) -> None:
    rows = rows_of(folder)
    write_rows(folder, rows.drop(columns="split"))
    copies = []
    for number, path in enumerate(rows["path"]):
        with Image.open(folder / path) as image:
            image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(folder / f"copy{number}.png")
        label = rows["label"][number]
        copies.append({"path": f"copy{number}.png", "label": label, "group_id": f"c{number}"})
    write_rows(folder, pd.concat([rows_of(folder), pd.DataFrame(copies)]).fillna("s"))
    sweep = sweep_of(folder)
    manifest, pack = prepare_data(sweep)
    assert check_leakage(sweep, manifest, pack) == {}
    splits = manifest.frame["split"].to_numpy()
    assert (splits[:25] == splits[25:]).all()


def test_a_sweep_that_was_launched_keeps_the_groups_and_splits_that_it_recorded(
    folder: Path,
) -> None:
    rows = rows_of(folder)
    # A group that is its path, blank and all.
    (folder / rows["path"][0]).rename(folder / "a b .png")
    rows.loc[0, "path"] = "a b .png"
    write_rows(folder, rows.drop(columns=["split", "group_id"]))
    sweep = sweep_of(folder, storage=str(folder.parent))
    sweep.folder.mkdir()
    manifest, _ = prepare_data(sweep)
    manifest.write(sweep.folder / "manifest.csv")
    (sweep.folder / "sweep.yaml").touch()
    assert prepare_data(sweep)[0].digest == manifest.digest

    moved = manifest.frame.assign(split=manifest.frame["split"].iloc[::-1].tolist())
    Manifest(manifest.root, moved).write(sweep.folder / "manifest.csv")
    assert prepare_data(sweep)[0].frame["split"].tolist() == moved["split"].tolist()

    Manifest(manifest.root, moved.iloc[1:]).write(sweep.folder / "manifest.csv")
    with pytest.raises(InputError, match=r"manifest\.csv: the images are those .*; got others;"):
        prepare_data(sweep)


def test_copies_are_no_leak_where_splits_are_still_to_be_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(folder, split="test")
    write_rows(folder, rows_of(folder).drop(columns="split"))
    manifest, audit = audit_folder(folder)
    assert len(audit.duplicates.near) == 1
    assert audit.leaks == ()
    # What a launch of seed 0 would make of them.
    sweep = sweep_of(folder)
    assert list(prepare_data(sweep)[0].frame["split"]) == list(manifest.frame["split"])
    main(["audit", str(folder), "--group-duplicates", str(folder / "grouped.csv")])
    written = read_manifest(folder / "grouped.csv").frame
    assert set(written["split"]) == {""}
    assert written["group_id"].nunique() == 25
