"""One trial again, in this process: do its params, seeds, and images give what was recorded?"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from lightning_modules.feature_store import current_moment
from search.data import check_same_data
from search.study.origins import recorded_weights
from search.study.record import Record, encode_metrics
from search.study.recorded import CheckpointFile, Epoch, Trial
from search.study.sweep_files import LocalFiles, SweepFiles
from search.tuning.checkpoint import read_checkpoint
from search.tuning.checkpoint_files import is_whole
from search.tuning.shared_weights import local_weights
from search.tuning.trial import Run, fit_trial
from search.tuning.tuner import check_same_weights

# Times, which nothing determines.
TIMES = ("epoch_s",)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something that came out otherwise.

    Attributes:
        epoch: Counted from 1.
        what: The metric, or ``confusion``.
        recorded: Its value then; none if it was not finite, or had no value.
        replayed: Its value now.
    """

    epoch: int
    what: str
    recorded: Any
    replayed: Any


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of a replay.

    Attributes:
        trial: As recorded.
        num_compared: Values compared, of all epochs.
        differences: Those that differ.
        ran_on: Host, device, and precision, then and now.
        weights: What is to be said of the best epoch's weights.
        has_same_weights: Whether they are the recorded ones; none if the trial recorded none.
    """

    trial: Trial
    num_compared: int
    differences: tuple[Difference, ...]
    ran_on: tuple[str, str]
    weights: str
    has_same_weights: bool | None

    @property
    def is_equal(self) -> bool:
        """Whether everything came out as recorded, to the last bit."""
        return not self.differences and self.has_same_weights is not False


class _EnoughError(Exception):
    """As many epochs were run as are recorded."""


def replay_trial(
    record: Record,
    manifest: Manifest,
    pack: Pack,
    *,
    number: int,
    tell: Callable[[str], None],
) -> Replay:
    """Run one trial from its initial weights for as many epochs as are recorded, and compare.

    Nothing is taken from the node's store of features: all is computed. What it writes goes into a
    folder that is removed; the sweep is only read. On a CPU the same machine has the same result to
    the last bit; GPUs, other machines, and other versions of torch may round otherwise, and so may
    compiled stages, which depend on what their process compiled before.

    Args:
        record: The sweep's.
        manifest: Its images, split, as they are now.
        pack: The same, decoded.
        number: The trial's.
        tell: Given a line after each epoch.

    Raises:
        InputError: If there is no such trial, nothing of it is recorded, or images or weights are
            not those that the sweep was launched with.
    """
    trial = check_trial(record, number)
    facts = record.facts
    check_same_data(facts, manifest, pack)
    backbone = trial.params.backbone
    origin = recorded_weights(record)[backbone]
    check_same_weights(backbone, origin)
    sweep = record.sweep
    without_store = dataclasses.replace(sweep.resources, feature_cache_gib=0.0)
    was_on_gpu = " cuda" in trial.epochs[0].ran_on
    run = Run(
        sweep=dataclasses.replace(sweep, resources=without_store),
        manifest=manifest,
        pack=pack,
        weights={backbone: local_weights(origin)},
        precisions=facts["measured"]["precisions"],
        gpu_share=1.0 if was_on_gpu and torch.cuda.is_available() else 0.0,
        started=current_moment(),
        source_digest=None,
    )
    config = {
        "number": trial.number,
        "name": trial.name,
        "params": dataclasses.asdict(trial.params),
        "seed": trial.seed,
        "view_seed": trial.view_seed,
        "attempt": trial.attempt,
        "resume": None,
    }
    reports: list[dict[str, Any]] = []

    def take(report: dict[str, Any]) -> None:
        reports.append(report)
        tell(f"epoch {report['epoch']} of {len(trial.epochs)}")
        if len(reports) == len(trial.epochs):
            raise _EnoughError

    with tempfile.TemporaryDirectory(prefix="neurosweep-replay-") as scratch:
        files = LocalFiles(scratch)
        (files.folder / "trials").mkdir()  # workers make none, lest they write beneath a lost mount
        with _threads(sweep.resources.cpus_per_trial), contextlib.suppress(_EnoughError):
            fit_trial(config, run, files=files, report=take)
        told, has_same_weights = _compare_weights(sweep.files, trial, files, reports[-1]["best"])
    num_compared, differences = compare_epochs(trial.epochs, reports)
    return Replay(
        trial=trial,
        num_compared=num_compared,
        differences=tuple(differences),
        ran_on=(trial.epochs[-1].ran_on, reports[-1]["ran_on"]),
        weights=told,
        has_same_weights=has_same_weights,
    )


def check_trial(record: Record, number: int) -> Trial:
    """Return a trial that can be replayed.

    Raises:
        InputError: If there is none of that number, or no epoch of it is recorded.
    """
    if not 0 <= number < record.num_trials:
        raise InputError(
            f"TRIAL must be one of the {record.num_trials} trials of {record.sweep.name}, counted "
            f"from 0; got {number}: `neurosweep top {record.sweep.reference}` lists them"
        )
    trial = record.trial(number)
    if not trial.epochs:
        raise InputError(
            f"a trial must have recorded an epoch to be replayed; {trial.name} has none: take "
            f"another, `neurosweep top {record.sweep.reference}` lists them"
        )
    return trial


def compare_epochs(
    recorded: Sequence[Epoch], reports: Sequence[Mapping[str, Any]]
) -> tuple[int, list[Difference]]:
    """Return how many values were compared, and those that differ by as little as one bit.

    Args:
        recorded: Epochs as the record has them.
        reports: The same epochs as they were reported now.
    """
    num_compared = 0
    differences = []
    for epoch, report in zip(recorded, reports, strict=True):
        now = {**encode_metrics(report["metrics"]), "confusion": report["confusion"]}
        then = {**epoch.metrics, "confusion": epoch.confusion}
        for name in sorted((then.keys() | now.keys()) - set(TIMES)):
            num_compared += 1
            if then.get(name) != now.get(name):
                differences.append(
                    Difference(
                        epoch=epoch.epoch,
                        what=name,
                        recorded=then.get(name),
                        replayed=now.get(name),
                    )
                )
    return num_compared, differences


def compare_tensors(then: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are missing on a side, or not the same to the last bit."""
    return sorted(
        name
        for name in then.keys() | now.keys()
        if name not in then
        or name not in now
        or then[name].dtype != now[name].dtype
        or not torch.equal(then[name], now[name])
    )


def _compare_weights(
    then: SweepFiles, trial: Trial, now: SweepFiles, best: Mapping[str, Any] | None
) -> tuple[str, bool | None]:
    """Compare the best epoch's checkpoint: by tensors where it is kept, by its digest where not."""
    kept = trial.epochs[-1].best
    if kept is None or best is None:
        if kept is None and best is None:
            return "no epoch had weights worth keeping, then and now", None
        return f"a best epoch there was only {'then' if best is None else 'now'}", False
    made = CheckpointFile(**best)
    if made.epoch != kept.epoch:
        return f"the best epoch was {kept.epoch}, and is {made.epoch}", False
    if made.digest == kept.digest:
        return f"the weights of epoch {kept.epoch} are the same file, sha256 {kept.digest}", True
    if not is_whole(then, kept):
        return (
            f"the weights of epoch {kept.epoch} had sha256 {kept.digest[:12]}, and have "
            f"{made.digest[:12]}; the file is not kept, so there is no telling which tensors "
            "differ",
            False,
        )
    checkpoints = read_checkpoint(then, kept), read_checkpoint(now, made)
    then_tensors, now_tensors = (found["state_dict"] for found in checkpoints if found is not None)
    differing = compare_tensors(then_tensors, now_tensors)
    if differing:
        return (
            f"{len(differing)} of {len(then_tensors)} tensors of epoch {kept.epoch} differ, "
            f"{differing[0]} first",
            False,
        )
    return f"all {len(then_tensors)} tensors of epoch {kept.epoch} are equal, bit for bit", True


def print_replay(console: Console, replay: Replay) -> None:
    """Say what differs, if anything does."""
    trial, (then, now) = replay.trial, replay.ran_on
    if then != now:
        console.print(f"ran on {then}; replayed on {now}", soft_wrap=True)
    if replay.differences:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in ("epoch", "value", "recorded", "replayed", "difference"):
            table.add_column(header, overflow="fold")
        for difference in replay.differences:
            table.add_row(*_cells(difference))
        console.print(table)
    console.print(replay.weights, soft_wrap=True)
    if replay.is_equal:
        console.print(
            f"{trial.name}: {len(trial.epochs)} epochs, {replay.num_compared} values, all as "
            "recorded, bit for bit",
            soft_wrap=True,
        )
    else:
        console.print(
            f"{trial.name}: {len(replay.differences)} of {replay.num_compared} values of "
            f"{len(trial.epochs)} epochs differ",
            soft_wrap=True,
        )


def _cells(difference: Difference) -> tuple[str, ...]:
    then, now = difference.recorded, difference.replayed
    apart = ""
    if isinstance(then, float) and isinstance(now, float):
        apart = f"{now - then:+.2e}"
    shown = (
        repr(v) if isinstance(v, float) else "none" if v is None else str(v) for v in (then, now)
    )
    return (str(difference.epoch), difference.what, *shown, apart)


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Compute with as many threads as a trial has: sums are added up in another order with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
