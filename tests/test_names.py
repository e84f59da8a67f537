"""No message names a patient: no group, and no folder of an image, but file names and rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from lightning_modules.bundle import load_bundle
from lightning_modules.errors import InputError
from search.cli import main
from search.explanation.explain import _decode

SURNAME = "Featherstonehaugh"
SWEEP = "name: tiny\ndata: {path: images, image_size_px: 32}\nweights: random\n"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    rng = np.random.default_rng(0)
    rows = ["path,label,group_id,split"]
    for label in ("stroke", "no_stroke"):
        folder = Path("images") / label / f"{SURNAME}_Ann"
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (32, 32)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            split = ("train", "val", "test")[number % 3]
            path = f"{label}/{SURNAME}_Ann/{number}.png"
            rows.append(f"{path},{label},{SURNAME}-{label}-{split},{split}")
    Path("images/manifest.csv").write_text("\n".join(rows) + "\n")
    Path("sweep.yaml").write_text(SWEEP)


def patient(name: str) -> Path:
    return Path("images/stroke") / f"{SURNAME}_Ann" / name


def edit(old: str, new: str) -> None:
    manifest = Path("images/manifest.csv")
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new, 1))


def out_of_the_folder() -> None:
    edit(f"stroke/{SURNAME}_Ann/0.png", f"../{SURNAME}/0.png")


def missing() -> None:
    patient("0.png").unlink()


def damaged() -> None:
    patient("2.png").write_bytes(b"junk")


def unreadable() -> None:
    patient("2.png").unlink()
    patient("2.png").mkdir()


def linked() -> None:
    patient("0.png").unlink()
    patient("0.png").symlink_to("/etc/hostname")


def twice() -> None:
    edit(f"stroke/{SURNAME}_Ann/0.png", f"stroke/{SURNAME}_Ann/1.png")


def control() -> None:
    edit(f"{SURNAME}_Ann/0.png", f"{SURNAME}_Ann\x07/0.png")


def torn_group() -> None:
    edit(f"{SURNAME}-stroke-train", f"{SURNAME}-stroke-val")


def a_copy_in_two_splits() -> None:
    patient("1.png").write_bytes(patient("0.png").read_bytes())


def linked_folder() -> None:
    Path("images/manifest.csv").unlink()
    (Path("images/stroke") / f"{SURNAME}_Bea").symlink_to(patient("0.png").parent.resolve())


def no_classes() -> None:
    Path("images/manifest.csv").unlink()
    patient("0.png").rename(patient("0.png").with_name("\udcff.png"))


MISTAKES = [
    out_of_the_folder, missing, damaged, unreadable, linked, twice, control, torn_group,
    a_copy_in_two_splits, linked_folder, no_classes,
]  # fmt: skip


def said(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])
    found = capfd.readouterr()
    return found.out + found.err


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("command", ["launch", "audit", "evaluate"])
def test_a_mistake_in_the_images_names_no_patient(
    mistake: Callable[[], None],
    command: str,
    make_bundle: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    mistake()
    if command == "launch":
        found = said(capfd, "launch", "sweep.yaml")
    elif command == "evaluate":
        if mistake in (a_copy_in_two_splits,):
            pytest.skip("copies are looked for before a launch")
        found = said(capfd, "evaluate", make_bundle(), "--data", "images")
    else:
        if mistake in (damaged,):
            main(["audit", "images"])  # lists what it cannot read, and goes on
            found = "neurosweep" + capfd.readouterr().out
        else:
            found = said(capfd, "audit", "images")
    assert found
    assert SURNAME not in found


@pytest.mark.parametrize("name", ["2.png", "absent.png"])
def test_predict_and_explain_name_a_file_without_its_folder(
    name: str, make_bundle: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    damaged()
    found = said(capfd, "predict", make_bundle(), patient(name))
    assert name in found
    assert SURNAME not in found
    with pytest.raises(InputError) as caught:
        _decode(load_bundle(make_bundle()), [patient(name)])
    assert name in str(caught.value)
    assert SURNAME not in str(caught.value)


def test_what_the_system_says_names_no_folder(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(patient("0.png")))

    monkeypatch.setattr("search.audit.audit_folder", fails)
    line = said(capfd, "audit", "images").strip()
    assert line == "neurosweep: 0.png: Permission denied"
