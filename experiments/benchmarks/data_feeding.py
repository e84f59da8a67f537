"""How fast do batches come out of a pack, beside a DataLoader that decodes the images?

    uv run python experiments/benchmarks/data_feeding.py --data MANIFEST.csv --out data_feeding.json

Two comparisons, each between equal batches: ``grey``, uint8 with one channel, as our training gets
it; ``rgb``, float in [0, 1] with three channels, as ``plain.py`` and most code loads it. The
decoding side is the better of a DataLoader without workers and with two. Every process has one
thread, as a trial with one core has. Also: what building the pack costs, and how much private
memory a further process adds that maps the pack and reads all of it while another has it mapped.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measurement import SHARED, provenance, ratio_interval, shown, tree_cpu_s
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.data.manifest import Manifest, read_manifest
from lightning_modules.data.pack import Pack, build_pack

Epoch = Callable[[], Iterator[Tensor]]


def build_pack_epochs(manifest: Manifest, pack: Pack, batch_size: int) -> Epoch:
    """Build epochs of training batches as a trial draws them: the images, uint8 grey."""
    from lightning_modules.data.datamodule import PackDataModule

    data = PackDataModule(manifest, pack, batch_size=batch_size, seed=0)
    loader = data.train_dataloader()
    numbers = itertools.count()

    def epoch() -> Iterator[Tensor]:
        data.train_order.set_epoch(next(numbers))
        for steps in loader:
            for batch in steps:
                assert batch.images is not None
                yield batch.images

    return epoch


def build_decoding_epochs(
    manifest: Path, image_size_px: int, batch_size: int, *, grey: bool, num_workers: int
) -> Epoch:
    """Build epochs of training batches that are decoded image by image."""
    # Late: the further processes, which start from this file, need neither Ray nor Kornia.
    from plain import Slices
    from torchvision.transforms import v2

    dataset = Slices(manifest, "train", image_size_px)
    if grey:
        dataset.transform = v2.Compose(
            [v2.Grayscale(1), v2.Resize((image_size_px, image_size_px)), v2.PILToTensor()]
        )
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return lambda: (images for images, _ in loader)


def as_rgb(epoch: Epoch) -> Epoch:
    """Build epochs of the same batches in float with three channels."""

    def widened() -> Iterator[Tensor]:
        for images in epoch():
            yield images.to(torch.float32).mul_(1 / 255).expand(-1, 3, -1, -1).contiguous()

    return widened


def time_epochs(epoch: Epoch, min_s: float) -> dict[str, float]:
    """Run whole epochs for at least ``min_s``."""
    start_s, start_cpu_s = time.perf_counter(), tree_cpu_s()
    done = batches = 0
    while time.perf_counter() - start_s < min_s:
        for images in epoch():
            done += len(images)
            batches += 1
    wall_s, cpu_s = time.perf_counter() - start_s, tree_cpu_s() - start_cpu_s
    return {
        "images_per_s": done / wall_s,
        "cpu_ms_per_image": 1000 * cpu_s / done,
        "images": done,
        "batches": batches,
    }


def compare(sides: dict[str, Epoch], *, pairs: int, min_s: float) -> dict[str, Any]:
    """Time all sides in turn, again and again; the ratio is to the fastest that decodes."""
    for epoch in sides.values():  # starts the workers, and brings the files into memory
        for _ in epoch():
            pass
    raw: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(pairs):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            raw[name].append(time_epochs(sides[name], min_s))
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in raw.items()
    }
    decoding = [name for name in sides if name != "pack"]
    best = max(decoding, key=lambda name: medians[name]["images_per_s"])
    both = list(zip(raw["pack"], raw[best], strict=True))
    return {
        "sides": medians,
        "best_decoding": best,
        "ratio_wall": ratio_interval(
            [pack["images_per_s"] / other["images_per_s"] for pack, other in both]
        ),
        "ratio_cpu": ratio_interval(
            [other["cpu_ms_per_image"] / pack["cpu_ms_per_image"] for pack, other in both]
        ),
        "raw": raw,
    }


def private_mib() -> float:
    """Return this process's memory that no other shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kib = sum(
        int(line.split()[1])
        for line in lines
        if line.startswith(("Private_Clean:", "Private_Dirty:"))
    )
    return kib / 1024


def read_all(pack: Pack, batch_size: int) -> None:
    """Gather every image once, a batch at a time, as training does."""
    from lightning_modules.data.datamodule import resident_images

    images = resident_images(pack, torch.device("cpu"), 1.0)
    for rows in torch.arange(len(images)).split(batch_size):
        images[rows]


def _measure_reader(pack: Pack, batch_size: int, results: Any) -> None:
    """Run in a further process: what mapping and reading the whole pack adds to it."""
    import lightning_modules.data.datamodule  # noqa: F401  (its own memory is not the pack's)

    torch.set_num_threads(1)
    before_mib = private_mib()
    read_all(pack, batch_size)
    results.put({"before_mib": before_mib, "after_mib": private_mib()})


def measure_memory(pack: Pack, batch_size: int, processes: int) -> dict[str, Any]:
    """Start processes one after another while this one has the pack mapped and read."""
    images = pack.images()
    images.max()  # every page, in this process too
    context = multiprocessing.get_context("spawn")
    measured = []
    for _ in range(processes):
        results = context.Queue()
        process = context.Process(target=_measure_reader, args=(pack, batch_size, results))
        process.start()
        measured.append(results.get(timeout=300))
        process.join()
    added = [one["after_mib"] - one["before_mib"] for one in measured]
    return {
        "pack_mib": images.nbytes / 2**20,
        "added_private_mib_median": statistics.median(added),
        "raw": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=SHARED / "data" / "dev-mri5" / "manifest.csv",
        help="manifest with splits",
    )
    parser.add_argument("--image-size-px", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--min-s", type=float, default=1.0, help="a side and pair")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    options.data = options.data.resolve()
    torch.set_num_threads(1)

    record = provenance("torch", "torchvision", "pillow", "numpy", "pytorch-lightning")
    with tempfile.TemporaryDirectory(prefix="bench-") as cache:
        start_s = time.perf_counter()
        pack, manifest = build_pack(
            read_manifest(options.data),
            image_size_px=options.image_size_px,
            cache_dir=Path(cache),
        )
        record["build_pack_s"] = time.perf_counter() - start_s
        for kind in ("grey", "rgb"):
            from_pack = build_pack_epochs(manifest, pack, options.batch_size)
            sides = {"pack": from_pack if kind == "grey" else as_rgb(from_pack)}
            for workers in (0, 2):
                sides[f"decode_{workers}_workers"] = build_decoding_epochs(
                    options.data,
                    options.image_size_px,
                    options.batch_size,
                    grey=kind == "grey",
                    num_workers=workers,
                )
            result = compare(sides, pairs=options.pairs, min_s=options.min_s)
            record[kind] = result
            print(f"\n{kind}: images/s, CPU ms an image")
            for name, side in result["sides"].items():
                print(f"  {name:18}{side['images_per_s']:12.0f}{side['cpu_ms_per_image']:9.4f}")
            print(f"  pack over {result['best_decoding']}: {shown(result['ratio_wall'])}")
            print(f"  CPU: {shown(result['ratio_cpu'])}")
            sys.stdout.flush()
        record["memory"] = measure_memory(pack, options.batch_size, processes=3)
    print(f"\nbuilding the pack, {len(manifest.frame)} images: {record['build_pack_s']:.2f} s")
    print(
        f"a further reader of {record['memory']['pack_mib']:.0f} MiB adds "
        f"{record['memory']['added_private_mib_median']:.2f} MiB of its own"
    )
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
