"""What a node finds when it looks at itself, and how the nodes' findings are shown."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.data.phantom import PhantomSettings
from lightning_modules.errors import InputError
from search.sweep import DataSettings, ResourceSettings, Sweep
from search.tuning import nodes, survey
from search.tuning.nodes import table_of, wait_for_node
from search.tuning.survey import Finding, Question, check_joined_node, look, source_digest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Question:
    """What a node is asked that has everything: two images, no pack, a megabyte to decode."""
    folder, images = tmp_path / "sweep", tmp_path / "images"
    folder.mkdir()
    images.mkdir()
    for name in ("1.png", "2.png"):
        (images / name).write_bytes(b"x")
    (folder / ".probe").mkdir()
    (folder / ".probe" / "driver").write_text("nonce")
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))
    return Question(
        location=str(folder),
        probe=".probe",
        content="nonce",
        images_root=images,
        images=("1.png", "2.png"),
        pack=tmp_path / "cache" / "absent.npy",
        pack_bytes=2**20,
    )


def test_a_node_that_has_everything_has_no_trouble(question: Question) -> None:
    found = look(question, "node")
    assert {name: finding.trouble for name, finding in found.items()} == {
        "storage": "",
        "images": "",
        "cache": "",
    }
    assert found["storage"].text == "writes"
    assert found["images"].text == "read"
    assert (probe_of(question) / "node").read_text() == "nonce"


def probe_of(question: Question) -> Path:
    return Path(question.location) / question.probe


def test_a_storage_that_is_missing_or_another_is_trouble(
    question: Question, tmp_path: Path
) -> None:
    absent = dataclasses.replace(question, location=str(tmp_path / "absent"))
    assert "does not see" in look(absent, "node")["storage"].trouble
    (probe_of(question) / "driver").write_text("of another sweep")
    assert "another folder of that name" in look(question, "node")["storage"].trouble
    assert not (probe_of(question) / "node").exists()


def test_a_storage_that_takes_nothing_is_trouble(question: Question) -> None:
    (probe_of(question) / "node").mkdir()  # in the way: a file cannot take its place
    finding = look(question, "node")["storage"]
    assert finding.text == "read only"
    assert "cannot write" in finding.trouble


def test_images_that_are_missing_are_counted_by_file_name(question: Question) -> None:
    assert question.images_root is not None
    (question.images_root / "2.png").unlink()
    finding = look(question, "node")["images"]
    assert "cannot read 1 of 2 images" in finding.trouble
    assert "(2.png)" in finding.trouble
    # None is needed where the node sees the pack, or makes phantoms.
    question.pack.parent.mkdir(exist_ok=True)
    question.pack.touch()
    assert look(question, "node")["images"] == Finding(text="pack")
    simulated = dataclasses.replace(question, images_root=None)
    assert look(simulated, "node")["images"] == Finding(text="simulated")


def test_a_cache_without_room_or_permission_is_trouble(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = dataclasses.replace(question, pack_bytes=2**60)
    assert "1073741824.0: make room" in look(huge, "node")["cache"].trouble  # GiB
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "file"))
    assert "set NEUROSWEEP_CACHE" in look(question, "node")["cache"].trouble


def test_gpus_that_torch_does_not_see_are_trouble(
    question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        assert "CUDA_VISIBLE_DEVICES" not in options["env"]
        return subprocess.CompletedProcess([], 0, stdout="NVIDIA H100|NVIDIA H100\n")

    monkeypatch.setattr(survey.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    two = dataclasses.replace(question, num_gpus=2)
    assert look(two, "node")["device"] == Finding(text="NVIDIA H100")
    four = dataclasses.replace(question, num_gpus=4)
    assert "torch sees 2 GPUs where Ray has 4" in look(four, "node")["device"].trouble


def digest_in(folder: Path) -> str:
    program = "from search.tuning.survey import source_digest; print(source_digest())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


@pytest.mark.slow
def test_the_digest_is_of_the_source_wherever_it_lies(tmp_path: Path) -> None:
    for package in ("search", "lightning_modules"):
        shutil.copytree(ROOT / package, tmp_path / package)
    assert digest_in(tmp_path) == source_digest()
    with (tmp_path / "lightning_modules" / "scores.py").open("a") as file:
        file.write("\n")
    assert digest_in(tmp_path) != source_digest()


def test_a_node_that_joins_later_must_have_the_code_and_see_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have the driver's code"):
        check_joined_node(str(tmp_path), "0" * 64)
    with pytest.raises(InputError, match="must see the sweep's files"):
        check_joined_node(str(tmp_path), source_digest())
    (tmp_path / "sweep.yaml").touch()
    check_joined_node(str(tmp_path), source_digest())


def test_the_table_says_what_is_missing_where() -> None:
    def node(number: int, **resources: float) -> dict[str, Any]:
        return {
            "NodeManagerAddress": f"10.0.0.{number}",
            "NodeManagerHostname": f"gpu-{number}",
            "Resources": resources,
        }

    fine = {
        "code": Finding(text="same"),
        "storage": Finding(text="writes"),
        "images": Finding(text="read"),
        "cache": Finding(text="90 GiB free"),
        "device": Finding(text="H100"),
    }
    other = {"code": Finding(text="torch 2.14.0", trouble="it has torch 2.14.0: install the same")}
    rows = [
        (node(1, CPU=0.0), None),
        (node(2, CPU=16.0, GPU=1.0), fine),
        (node(3, CPU=16.0, GPU=1.0), other),
    ]
    assert table_of(rows) == [
        "node            has            code              storage  images  cache        device",
        "10.0.0.1 gpu-1  0 CPU          no trial fits",
        "10.0.0.2 gpu-2  16 CPU, 1 GPU  same              writes   read    90 GiB free  H100",
        "10.0.0.3 gpu-3  16 CPU, 1 GPU  NO: torch 2.14.0  -        -       -            -",
    ]


@pytest.fixture
def gpu_sweep() -> Sweep:
    """A sweep whose trials take two cores and a quarter of a GPU."""
    return Sweep(
        name="s",
        data=DataSettings(phantom=PhantomSettings()),
        resources=ResourceSettings(cpus_per_trial=2, gpus_per_trial=0.25),
    )


@pytest.mark.parametrize(("num_refusals", "wait_s"), [(2, 60.0), (99, 0.01)])
def test_a_node_is_asked_for_once_waited_for_and_the_request_taken_back(
    gpu_sweep: Sweep, monkeypatch: pytest.MonkeyPatch, num_refusals: int, wait_s: float
) -> None:
    refusals = [InputError("no node has both")] * num_refusals
    requests: list[Any] = []

    def whole_resources(sweep: Sweep) -> dict[str, float]:
        if refusals:
            raise refusals.pop()
        return {"cpu": 2.0, "gpu": 0.25}

    monkeypatch.setattr(nodes, "whole_resources", whole_resources)
    monkeypatch.setattr(nodes, "request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(nodes, "POLL_S", 0.01)
    told: list[str] = []
    if num_refusals == 2:
        wait_for_node(gpu_sweep, wait_s, told.append)
    else:
        with pytest.raises(InputError, match="no node has both"):
            wait_for_node(gpu_sweep, wait_s, told.append)
    # Ray knows whole GPUs only when it chooses what to start.
    assert requests == [[{"CPU": 2, "GPU": 1}], []]
    assert len(told) == 1


def test_a_cluster_that_does_not_grow_is_refused_at_once(
    gpu_sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole_resources(sweep: Sweep) -> dict[str, float]:
        raise InputError("no node has both")

    monkeypatch.setattr(nodes, "whole_resources", whole_resources)
    with pytest.raises(InputError):
        wait_for_node(gpu_sweep, 0.0, lambda line: pytest.fail(line))
