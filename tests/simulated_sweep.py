"""A sweep of simulated trials on a cluster: new, or gone on with. Run by ``test_nodes``.

    python simulated_sweep.py FOLDER ADDRESS [HOST]

Everything but the training is the product: record, searcher, scheduler, tuner. A trial writes real
checkpoint files and appends every epoch it runs to FOLDER/executed, in one write a line. On HOST
all of them fail; without one, a new sweep's first trials wait for each other, so that two nodes
take part however long a worker takes to start.
"""

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

# Ray's workers import this module by value: nothing heavy up here.
NUM_TRIALS = 6
MAX_EPOCHS = 5
EPOCH_S = 0.6
START_S = 60
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def simulate(config: dict[str, Any], folder: str, bad_host: str) -> None:
    """Report an epoch now and then, from where the last checkpoint was."""
    import socket

    from ray import tune

    if socket.gethostname() == bad_host:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    number, attempt, resume = config["number"], config["attempt"], config["resume"]
    trial_folder = Path(folder) / "trials" / f"{number:05d}"
    trial_folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(1 if resume is None else resume["last"]["epoch"] + 1, MAX_EPOCHS + 1):
        line = f"{number} {attempt} {epoch} {socket.gethostname()} {os.getpid()}\n"
        with (Path(folder) / "executed").open("a") as executed:
            executed.write(line)
        if not bad_host and attempt == 0 and number < 2:
            deadline_s = time.monotonic() + START_S
            while nodes_in(Path(folder)) < 2 and time.monotonic() < deadline_s:
                time.sleep(0.05)
        time.sleep(EPOCH_S)
        loss = 2 / epoch + 0.01 * number
        shown = dict.fromkeys(("train_loss", "val_loss"), loss) | dict.fromkeys(
            ("val_macro_f1", "val_accuracy"), 1 / (1 + loss)
        )
        files = {}
        for kind in ("last", "best"):
            path = trial_folder / f"{kind}-e{epoch:05d}-a{attempt}.ckpt"
            path.touch()
            files[kind] = {
                "path": str(path.relative_to(folder)),
                "digest": EMPTY,
                "epoch": epoch,
            }
        tune.report(
            {
                "epoch": epoch,
                **shown,
                "metrics": shown,
                "confusion": [],
                "features": "",
                "leak": "",
                "ran_on": socket.gethostname(),
                **files,
            }
        )


def nodes_in(folder: Path) -> int:
    """Return on how many nodes epochs were begun."""
    return len({line.split()[3] for line in (folder / "executed").read_text().splitlines()})


def main(folder: Path, address: str, bad_host: str = "") -> None:
    from lightning_modules.data.phantom import PhantomSettings
    from search.study.record import Record
    from search.sweep import DataSettings, SearchSettings, Sweep, TrainingSettings
    from search.tuning import tuner
    from search.tuning.resources import placement_of

    sweep = Sweep(
        name=folder.name,
        storage=str(folder.parent),
        metric="val_loss",
        data=DataSettings(phantom=PhantomSettings()),
        training=TrainingSettings(max_epochs=MAX_EPOCHS),
        search=SearchSettings(num_trials=NUM_TRIALS, sampler="random"),
        scheduler=None,
    )
    sweep.folder.mkdir(parents=True, exist_ok=True)
    is_new = not (sweep.folder / "study.db").is_file()
    record = Record.create(sweep, {}) if is_new else Record.open(sweep)
    # After `search`, which sets what Ray reads when it is imported.
    from ray import tune

    with tuner.connected(address), record.being_written():
        trainable = tune.with_parameters(simulate, folder=str(sweep.folder), bad_host=bad_host)
        tuner.run_trials(
            record,
            tune.with_resources(trainable, lambda config: placement_of({"CPU": 1.0}, config)),
            max_concurrent_trials=2,
            is_local=False,
        )


if __name__ == "__main__":
    gc.set_threshold(10_000)
    main(Path(sys.argv[1]), *sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # as the command begins and ends
