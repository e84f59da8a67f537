"""What a study holds, checked as it is read: anybody may have written the database.

A sweep's folder is handed around. Nothing in its study may lead a path out of the folder, steer a
terminal, or end in a traceback.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from optuna.trial import TrialState
from pydantic import NonNegativeInt, PositiveFloat, TypeAdapter, ValidationError

from lightning_modules.errors import InputError, printable
from lightning_modules.stages import BACKBONES
from search.study.recorded import CheckpointFile, Epoch, State, Trial
from search.study.storage import STORAGE_ERRORS, unreachable
from search.sweep import PARAM_LIMITS, Sweep, TrialParams

STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}

MAX_SEED = 2**63 - 1


class Facts(dict[str, Any]):
    """What holds for a whole sweep; one that is not there is said to be missing."""

    def __missing__(self, name: str) -> Any:
        raise InputError(
            f"a sweep's record must hold {name!r:.80}; it does not: restore study.db from a copy, "
            "or launch anew with `--name`"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attributes:
    """A trial's own attributes, beside those of its epochs."""

    params: TrialParams
    seed: NonNegativeInt
    view_seed: NonNegativeInt
    attempt: NonNegativeInt = 0
    reason: str = ""
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    number: NonNegativeInt
    mean: float
    low: float | None
    high: float | None
    probability_best: float
    rival: NonNegativeInt
    over_rival_mean: float | None
    over_rival_low: float | None
    over_rival_high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Confirmation:
    num_trials: NonNegativeInt
    winner: NonNegativeInt
    metric: str
    num_seeds: NonNegativeInt
    candidates: list[_Candidate]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    precisions: dict[str, Literal["32-true", "bf16-mixed"]]
    gpu_peak_bytes: dict[str, NonNegativeInt]
    gpu_total_bytes: NonNegativeInt


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cost:
    latency_ms: PositiveFloat
    size_mib: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class _KnownFacts:
    """The facts that are read, and of which types they are; there may be others."""

    classes: list[str] | None = None
    manifest_digest: str | None = None
    pack_digest: str | None = None
    skipped_images: list[str] | None = None
    weights: dict[str, dict[str, Any]] | None = None
    versions: dict[str, str] | None = None
    leakage: dict[Literal["pictures", "images"], NonNegativeInt] | None = None
    confirmation: _Confirmation | None = None
    measured: _Measured | None = None
    costs: dict[str, _Cost] | None = None


_EPOCH = TypeAdapter(Epoch)
_ATTRIBUTES = TypeAdapter(_Attributes)
_FACTS = TypeAdapter(_KnownFacts)


@contextlib.contextmanager
def reading(sweep: Sweep) -> Iterator[None]:
    """Say in one line what is wrong with a record that cannot be read.

    Raises:
        InputError: Instead of whatever the database, its driver, and Optuna raise on damage.
    """
    try:
        yield
    except InputError:
        raise
    except STORAGE_ERRORS as error:
        raise unreachable(sweep, error) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _damaged(sweep, error) from error
    except RecursionError as error:
        raise _damaged(sweep, error) from error


def read_facts(stored: Mapping[str, Any]) -> Facts:
    """Return a sweep's facts.

    Raises:
        ValueError: If one that is known is of another type.
    """
    # Strict as JSON is: lists may be tuples, and mappings classes, but no text a number.
    _FACTS.validate_json(json.dumps(dict(stored)), strict=True)
    facts = Facts(stored)
    if len(leakage := facts.get("leakage") or {}) == 1:
        raise ValueError(f"leakage is counted in {next(iter(leakage))} only")
    if (confirmation := facts.get("confirmation")) and not confirmation["candidates"]:
        raise ValueError("a confirmation has no candidates")
    measured = facts.get("measured") or {"precisions": {}}
    if unknown := set(measured["precisions"]) - set(BACKBONES):
        raise ValueError(f"{min(unknown)!r:.40} is no backbone")
    if facts.get("weights") is not None:
        facts["weights"] = Facts(facts["weights"])
    return facts


def read_trial(number: int, state: TrialState, attributes: Mapping[str, Any]) -> Trial:
    """Return a trial.

    Args:
        number: Its place in the sweep.
        state: Optuna's.
        attributes: Optuna's user attributes.

    Raises:
        ValueError: If they are not those of a trial.
    """
    names = sorted(name for name in attributes if name.startswith("epoch_"))
    epochs = tuple(_EPOCH.validate_json(attributes[name], strict=True) for name in names)
    if [epoch.epoch for epoch in epochs] != list(range(1, len(epochs) + 1)):
        raise ValueError(f"trial {number} has gaps between its epochs")
    for epoch in epochs:
        for file in (epoch.last, epoch.best):
            _check_inside(file)
    own = {name: value for name, value in attributes.items() if not name.startswith("epoch_")}
    found = _ATTRIBUTES.validate_json(json.dumps(own), strict=True)
    _check_params(found.params)
    if max(found.seed, found.view_seed, found.attempt) > MAX_SEED:
        raise ValueError(f"trial {number} has a seed above {MAX_SEED}")
    return Trial(
        number=number,
        params=found.params,
        seed=found.seed,
        view_seed=found.view_seed,
        state=STATES[state],
        epochs=tuple(
            dataclasses.replace(
                epoch, features=printable(epoch.features), ran_on=printable(epoch.ran_on)
            )
            for epoch in epochs
        ),
        attempt=found.attempt,
        reason=printable(found.reason),
        faults=tuple(map(printable, found.faults)),
    )


def _check_inside(file: CheckpointFile | None) -> None:
    """Refuse a checkpoint whose path would leave the sweep's folder."""
    if file is None:
        return
    path = PurePosixPath(file.path)
    if path.is_absolute() or ".." in path.parts or not path.parts or not file.path.isprintable():
        raise ValueError(f"a checkpoint lies in the sweep's folder, not at {file.path!r:.80}")


def _check_params(params: TrialParams) -> None:
    if params.backbone not in BACKBONES:
        raise ValueError(f"backbone is one of {', '.join(BACKBONES)}, not {params.backbone!r:.40}")
    for name, (low, high) in PARAM_LIMITS.items():
        if not low <= getattr(params, name) <= high:
            raise ValueError(f"{name} is not in [{low:g}, {high:g}]")


def _damaged(sweep: Sweep, error: BaseException) -> InputError:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}"
    else:
        reason = str(error) or type(error).__name__
    place = f"{sweep.folder / 'study.db'}" if sweep.study_url is None else "the study"
    return InputError(
        f"a sweep's record must be what was written; {place}: {printable(reason):.200}: restore it "
        "from a copy, or launch anew with `--name`"
    )
