"""Initial weights where every node of a cluster finds them."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from lightning_modules.data.pack import default_cache_dir
from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically
from lightning_modules.weights import WeightOrigin
from search.study.sweep_files import OBJECT_STORAGE, files_at, is_object_storage
from search.sweep import Sweep

DIGEST = re.compile(r"[0-9a-f]{64}")


def share_weights(weights: Mapping[str, WeightOrigin], sweep: Sweep) -> dict[str, WeightOrigin]:
    """Copy each backbone's file of initial weights to the sweep's files; say where it is then."""
    files = sweep.files
    shared = dict(weights)
    for backbone, origin in weights.items():
        if origin.path is not None:
            name = f"weights/{backbone}{Path(origin.path).suffix}"  # two may be called best.pth
            files.write(name, Path(origin.path).read_bytes())
            place = f"{files.location}/{name}"
            shared[backbone] = dataclasses.replace(origin, path=place)
    return shared


def local_weights(origin: WeightOrigin) -> WeightOrigin:
    """Return weights as a file of this machine; copied here once if they are elsewhere.

    Raises:
        InputError: If the record that says where they are was not written by a sweep.
        FileNotFoundError: If they are not where they were put.
        StorageError: If the storage does not answer.
    """
    if origin.path is None or not is_object_storage(origin.path):
        return origin
    location, _, name = origin.path.rpartition("/")
    # A record may be a stranger's, and must not lead out of the cache.
    if not (OBJECT_STORAGE.fullmatch(location) and DIGEST.fullmatch(origin.digest)):
        raise InputError(
            "initial weights lie in a folder, at s3://..., or at gs://...; the record has another "
            "place, or no SHA-256 of them: restore it from a copy"
        )
    path = default_cache_dir() / "weights" / origin.digest / name
    if not path.is_file():
        with files_at(location).open(name) as file:
            content = file.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return dataclasses.replace(origin, path=str(path))
