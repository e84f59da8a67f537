"""Changed files of every kind end well or in one line: some here, over 100,000 in the benchmark."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

NAMES = (
    "yaml", "manifest", "image", "dicom", "nifti", "config", "results", "onnx", "safetensors",
    "checkpoint", "record",
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return importlib.import_module("fuzz")


def test_every_kind_of_file_is_fuzzed(fuzz: ModuleType) -> None:
    assert sorted(fuzz.TARGETS) == sorted(NAMES)
    assert fuzz.TOTAL >= 100_000


def test_an_input_is_a_function_of_seed_and_number(fuzz: ModuleType, tmp_path: Path) -> None:
    files = fuzz.TARGETS["dicom"].prepare(tmp_path)
    made = [fuzz.changed("dicom", files, 0, number) for number in range(20)]
    assert made == [fuzz.changed("dicom", files, 0, number) for number in range(20)]
    assert len({*made, *(fuzz.changed("dicom", files, 1, number) for number in range(20))}) > 35


def test_a_finding_is_one(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no reader does is noticed: another error, several lines, a process that ends."""

    def broken(data: bytes, folder: Path) -> None:
        if data == fuzz.TARGETS["image"].prepare(folder)[0]:
            return
        raise ZeroDivisionError

    target = fuzz.TARGETS["image"]
    files = target.prepare(Path())[:1]
    monkeypatch.setitem(
        fuzz.TARGETS,
        "image",
        type(target)(inputs=1, prepare=lambda _: files, change=target.change, read=broken),
    )
    found = fuzz.fuzz_apart("image", 5, seed=0)
    assert list(found["findings"].values())[:1] == [0]
    assert sum(found["outcomes"].values()) == 5
    assert all("ZeroDivisionError" in what for what in found["findings"])


@pytest.mark.parametrize("name", NAMES)
def test_some_changed_files_end_well_or_in_one_line(fuzz: ModuleType, name: str) -> None:
    found = fuzz.fuzz_apart(name, 8 if name == "record" else 40, seed=1)
    assert found["findings"] == {}
    assert sum(found["outcomes"].values()) == found["inputs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_changed_files_end_well_or_in_one_line(fuzz: ModuleType, name: str) -> None:
    found = fuzz.fuzz_apart(name, fuzz.TARGETS[name].inputs // 40, seed=2)
    assert found["findings"] == {}
    assert found["slowest_s"] < fuzz.LIMIT_S
    assert found["peak_growth_mib"] < 1024
