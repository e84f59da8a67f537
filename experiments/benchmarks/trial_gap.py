"""How long does a warm worker take from one real trial's end to the next one's first steps?

    uv run python experiments/benchmarks/trial_gap.py --out trial_gap.json

``scale.py`` has trials that sleep: what Ray and the record take. A real trial then builds its
module and Lightning's Trainer, too. Here one worker trains MobileNetV2 on simulated slices, some
trials of each depth, two epochs each. From when the last epoch is reported until Lightning hands
the next trial its first steps, on the worker's own clock; the features of its frozen stages are not
looked up yet. What a worker's first trial takes is left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measurement import provenance

DEPTHS = (0, 1, 3)
NUM_TRIALS = 24  # of each depth


def timed_trial(config: dict[str, Any], *, run: Any, log: str) -> None:
    """Train a trial, and note when each epoch begins its steps and when each is reported."""
    from types import SimpleNamespace

    from ray import tune

    from lightning_modules.classifier import ImageClassifier
    from search.tuning import trial

    def note(what: str) -> None:
        with Path(log).open("a") as file:
            file.write(json.dumps([config["number"], what, time.time()]) + "\n")

    def report(result: dict[str, Any]) -> None:
        note("report")
        tune.report(result)

    step = getattr(ImageClassifier, "untimed", ImageClassifier.training_step)

    def training_step(self: Any, *batch: Any) -> Any:
        note("step")
        return step(self, *batch)

    ImageClassifier.untimed = step  # type: ignore[attr-defined]  # of an earlier trial here
    ImageClassifier.training_step = training_step  # type: ignore[method-assign]
    trial.tune = SimpleNamespace(report=report)  # type: ignore[assignment]
    trial.train_trial(config, run=run)


def measure(depth: int, folder: Path) -> list[float]:
    """Return the gaps between the trials of one depth, in seconds."""
    from lightning_modules.feature_store import current_moment
    from lightning_modules.weights import find_weights
    from search.config import load_sweep
    from search.data import prepare_data
    from search.study.record import Record
    from search.tuning import tuner
    from search.tuning.trial import Run

    settings: dict[str, Any] = {
        "name": f"depth-{depth}",
        "storage": str(folder),
        "weights": "random",
        "params.unfreeze_depth": depth,
        "space": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "training.max_epochs": 2,
        "search.num_trials": NUM_TRIALS,
        "search.sampler": "random",
        "scheduler": None,
    }
    sweep = load_sweep(Path(__file__).parents[1] / "quickstart.yaml", settings)
    sweep.folder.mkdir(parents=True)
    manifest, pack = prepare_data(sweep)
    weights = find_weights(("random",), backbone="mobilenet_v2", seed=0)
    run = Run(
        sweep=sweep,
        manifest=manifest,
        pack=pack,
        weights={"mobilenet_v2": weights},
        precisions={"mobilenet_v2": "32-true"},
        gpu_share=0.0,
        started=current_moment(),
        source_digest=None,
    )
    log = folder / f"depth-{depth}.log"
    record = Record.create(sweep, {})
    with tuner.connected(None), record.being_written():
        trainable = tuner.tune.with_parameters(timed_trial, run=run, log=str(log))
        tuner.run_trials(
            record,
            tuner.tune.with_resources(trainable, {"cpu": 1.0, "gpu": 0.0}),
            max_concurrent_trials=1,
            is_local=True,
        )
    ended: dict[int, float] = {}
    began: dict[int, float] = {}
    for line in log.read_text().splitlines():
        number, what, at_s = json.loads(line)
        if what == "report":
            ended[number] = at_s
        else:
            began.setdefault(number, at_s)
    return [began[number + 1] - ended[number] for number in range(NUM_TRIALS - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = provenance("torch", "pytorch-lightning", "ray")
    with tempfile.TemporaryDirectory(prefix="gap-") as folder:
        for depth in DEPTHS:
            gaps_s = measure(depth, Path(folder))
            found[f"depth {depth}"] = {
                "median_ms": 1e3 * statistics.median(gaps_s),
                "range_ms": [1e3 * min(gaps_s), 1e3 * max(gaps_s)],
                "raw_s": gaps_s,
            }
            shown = ", ".join(f"{1e3 * gap_s:.0f}" for gap_s in sorted(gaps_s))
            print(f"depth {depth}: {1e3 * statistics.median(gaps_s):.0f} ms of {shown}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
