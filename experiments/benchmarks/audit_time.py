"""How long does an audit take, and how much memory?

    uv run python experiments/benchmarks/audit_time.py --images 20000 --out audit_time.json

Phantoms of four slices a patient are drawn first, which is not counted. The clock runs from the
start of ``neurosweep audit`` to its exit, imports and decoding included, with an empty cache.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measurement import ENVIRONMENT, REPOSITORY, provenance, run_command

from lightning_modules.data.phantom import PhantomSettings, write_phantoms

SLICES_PER_PATIENT = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--image-size-px", type=int, default=128)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / "audit_time.json"
    )
    options = parser.parse_args()
    settings = PhantomSettings(
        num_patients=options.images // SLICES_PER_PATIENT,
        slices_per_patient=SLICES_PER_PATIENT,
        image_size_px=options.image_size_px,
    )
    with tempfile.TemporaryDirectory(prefix="audit-time-") as scratch:
        folder = Path(scratch)
        manifest = write_phantoms(settings, folder / "phantoms")
        facts = provenance("torch", "scipy", "pillow")
        cost = run_command(
            [sys.executable, "-m", "search.cli", "audit", str(manifest)],
            env=ENVIRONMENT | {"NEUROSWEEP_CACHE": str(folder / "cache")},
            log=folder / "log",
            cwd=REPOSITORY,
        )
        said = (folder / "log").read_text()
    if cost.returncode:
        sys.exit(said)
    result = {
        **facts,
        "num_images": settings.num_patients * SLICES_PER_PATIENT,
        "image_size_px": options.image_size_px,
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "peak_rss_gib": cost.peak_rss_gib,
    }
    print(said)
    print(f"{cost.wall_s:.0f} s, {cost.cpu_s:.0f} s of CPU, {cost.peak_rss_gib:.2f} GiB")
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
