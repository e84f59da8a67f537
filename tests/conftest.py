"""What several test files use: data without image files, and the machine's limits."""

import hashlib
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from lightning_modules.data.manifest import COLUMNS, Manifest
from lightning_modules.data.pack import Pack

if TYPE_CHECKING:
    from search.sweep import Sweep

MakeData = Callable[..., tuple[Manifest, Pack]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run several files at a time, where no files are named.

    Fast tests on all cores, up to eight. Slow ones wait for processes that start, two at a time,
    and not more: each sweep takes all of the machine's cores, and gigabytes. Nor on a GPU, which
    tests fill on purpose.
    """
    num_cores = os.cpu_count() or 1
    if config.args_source == pytest.Config.ArgsSource.ARGS:
        return 0
    if config.option.markexpr.startswith("not slow"):
        return min(8, num_cores)
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return 0 if has_gpu else min(2, num_cores)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave soaks out, also of `-m ""`, unless they are asked for by name.

    Files with slow tests come first, so that no worker is left with a long one at the end.
    """
    if "soak" not in config.option.markexpr:
        soaks = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
    with_slow = {
        item.path
        for item in items
        if item.get_closest_marker("slow") or item.get_closest_marker("cluster")
    }
    items.sort(key=lambda item: item.path not in with_slow)


def pytest_configure(config: pytest.Config) -> None:
    """Keep away from the user's cache; both processes of a run share one."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="neurosweep-tests-", ignore_cleanup_errors=True)
        os.environ["NEUROSWEEP_CACHE"] = str(Path(folder.name) / "cache")
        config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors are tiny here: on a shared machine, threads that wait for each other only spin."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _migrations_are_read_once() -> Iterator[None]:
    """Optuna reads its ten migration scripts three times for each study, which never change."""
    if "optuna" not in sys.modules:  # no test of this run opens a study
        yield
        return
    from optuna.storages._rdb.storage import _VersionManager

    read = _VersionManager._create_alembic_script
    scripts: list[Any] = []

    def read_once(manager: Any) -> Any:
        if not scripts:
            scripts.append(read(manager))
        return scripts[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_VersionManager, "_create_alembic_script", read_once)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights, which is not part of the project."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("NEUROSWEEP_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no real images and weights at {folder}")
    return folder


@pytest.fixture
def device() -> str:
    """The name of a GPU, for tests that ask for one; they skip where there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture(scope="session")
def make_data(tmp_path_factory: pytest.TempPathFactory) -> MakeData:
    """Builds a manifest and its pack out of arrays; no image file is written or decoded.

    Takes the number of images a class in each split. Class c is noise around a grey of its own.
    """

    def make(
        train: tuple[int, ...] = (4, 3, 1),
        val: tuple[int, ...] = (2, 2, 1),
        test: tuple[int, ...] = (1, 1, 1),
        image_size_px: int = 32,
    ) -> tuple[Manifest, Pack]:
        rows = [
            (split, label)
            for split, counts in (("train", train), ("val", val), ("test", test))
            for label, count in enumerate(counts)
            for _ in range(count)
        ]
        # Mixed, so that a split is not a range of rows.
        rng = np.random.default_rng(0)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        frame = pd.DataFrame(
            [
                (f"{row}.png", f"class_{label}", f"patient_{row}", "synthetic", split)
                for row, (split, label) in enumerate(rows)
            ],
            columns=list(COLUMNS),
        )
        grey = np.array([40 + 60 * label for _, label in rows]).reshape(-1, 1, 1)
        noise = rng.integers(-30, 31, (len(rows), image_size_px, image_size_px))
        root = tmp_path_factory.mktemp("data")
        path = root / "pack.npy"
        np.save(path, np.clip(grey + noise, 0, 255).astype(np.uint8))
        return Manifest(root, frame), Pack(path, "0" * 64, image_size_px, {})

    return make


@pytest.fixture(scope="session")
def tiny_data(make_data: MakeData) -> tuple[Manifest, Pack]:
    """Three classes; 8 images to train on, 5 to validate, 3 locked."""
    return make_data()


def small_sweep(folder: Path, name: str, **search: Any) -> "Sweep":
    """A sweep of a learning rate whose trials are simulated: up to nine, of three epochs each."""
    from lightning_modules.data.phantom import PhantomSettings
    from search.space import Float
    from search.sweep import DataSettings, SearchSettings, Sweep, TrainingSettings

    return Sweep(
        name=name,
        storage=str(folder),
        metric="val_loss",
        data=DataSettings(phantom=PhantomSettings()),
        space={"lr": Float(low=1e-5, high=1.0, log=True)},
        training=TrainingSettings(max_epochs=3),
        search=SearchSettings(num_trials=9, sampler="random", **search),
        scheduler=None,
    )


TINY_SWEEP = """
name: tiny
data: {phantom: {num_patients: 25, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 0}
space: {lr: {low: 1.0e-4, high: 1.0e-1, log: true}}
training: {max_epochs: 3, precision: 32-true}
search: {num_trials: 4, max_concurrent_trials: 2}
scheduler: {grace_period_epochs: 1}
"""


@pytest.fixture(scope="session")
def tiny_sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a sweep named tiny that has run: four trials on simulated slices."""
    from search.cli import main

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "sweep.yaml").write_text(TINY_SWEEP)
    main(["launch", str(folder / "sweep.yaml"), "--storage", str(folder / "sweeps")])
    return folder / "sweeps"


@pytest.fixture
def make_bundle() -> Callable[..., Path]:
    """Writes a bundle for two classes, bright and dark images, into the current folder.

    Its logits are 4 m - 2 and 2 - 4 m, for a mean intensity of m. Takes what ``config.json`` says
    otherwise.
    """

    def make(**changes: Any) -> Path:
        from onnx import TensorProto, helper

        nodes = [
            helper.make_node("GlobalAveragePool", ["intensities"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["mean"]),
            helper.make_node("Gemm", ["mean", "weight", "bias"], ["logits"]),
        ]
        graph = helper.make_graph(
            nodes,
            "bundle",
            [helper.make_tensor_value_info("intensities", TensorProto.FLOAT, ["batch", 1, 32, 32])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
            [
                helper.make_tensor("weight", TensorProto.FLOAT, [1, 2], [4.0, -4.0]),
                helper.make_tensor("bias", TensorProto.FLOAT, [2], [-2.0, 2.0]),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        files = {
            "model.onnx": model.SerializeToString(),
            "model.pt2": b"unused",
            "model.safetensors": struct.pack("<Q", 2) + b"{}",
        }
        folder = Path("bundle")
        folder.mkdir(exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        config = {
            "format": 2,
            "temperature": 1.0,
            "classes": ["stroke", "no_stroke"],
            "input": {"image_size_px": 32},
            "digests": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            **changes,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
