"""What becomes of trials: every epoch and every ending, committed to the record as it arrives."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.tune import Callback, Stopper

from lightning_modules.errors import InputError, said_by
from search.cost_levels import CostLevels
from search.interruption import Interruption
from search.study.record import Record, encode_metrics
from search.study.recorded import CheckpointFile, Epoch, Trial
from search.study.storage import STORAGE_ERRORS, UnreachableError
from search.tuning.checkpoint_files import folder_of, remove_all_but
from search.tuning.faults import MAX_RESTARTS, Fault, read_fault
from search.tuning.node_health import NodeHealth
from search.tuning.patience import patiently
from search.tuning.scheduler import ResumableASHA

Result = TypeVar("Result")


class StudyRecorder(Callback):
    """Commits every epoch and every ending to the record as it arrives.

    A trial that fails before any trial of this run has reported may not be the one to blame: what
    becomes of it is settled by the first report, or by a second failure at the same place. Where
    there are several nodes, it is run again on another first: it may be the node that is to blame.

    Args:
        record: Written to.
        scheduler: Asked why a trial was stopped.
        tell: Given a line for the user now and then.

    Attributes:
        storage_error: What was said, once storage has given out; trials that end after that are
            left as they are, to be resumed.
        bug: What two trials failed with alike before any had reported; none if none did.
        open: The trials that were handed out and have not ended.
        again: The trials to hand out once more, since their worker was lost, or their node bad.
        nodes: How they do.
        deadline_s: When the time budget is used up, on the monotonic clock.
    """

    def __init__(
        self,
        record: Record,
        scheduler: ResumableASHA,
        *,
        tell: Callable[[str], None] = print,
    ) -> None:
        self._record = record
        self._scheduler = scheduler
        self._levels = CostLevels(record.costs)
        # Of the best few of each cost: the score, and the number turned round, so that the earlier
        # one wins.
        self._kept: list[list[tuple[float, int]]] = [[] for _ in range(len(self._levels))]
        self._unsettled: dict[int, Fault] = {}
        self._has_report = False
        self.storage_error = ""
        self.bug: Fault | None = None
        self._tell = tell
        self._trials: list[Any] = []
        self.open: set[int] = set()
        self.again: deque[int] = deque()
        self.nodes = NodeHealth()
        self.deadline_s = time.monotonic() + (record.sweep.search.time_budget_s or math.inf)

    def __getstate__(self) -> dict[str, Any]:
        """Stay out of Ray's snapshot, which is never read back."""
        return {}

    def is_over(self) -> bool:
        """Tell whether no trial is to be started any more."""
        return self.is_ending() or time.monotonic() > self.deadline_s

    def is_ending(self) -> bool:
        """Tell whether trials are to end where they stand, to be resumed later."""
        return bool(self.storage_error or self.bug)

    def store(self, action: Callable[[], Result]) -> Result | None:
        """Return what an action on record or files returns; none if storage fails for good.

        That is the end of the sweep. Storage that has vanished is waited for first.
        """
        errors = (OSError, UnreachableError, *STORAGE_ERRORS)
        try:
            return patiently(action, errors, tell=self._tell, reopen=self._record.reopen)
        except InputError as error:  # a damaged record, or one that another process writes by now
            self.storage_error = str(error)
        except errors as error:
            self.storage_error = said_by(error)
        return None

    def take_up(self) -> list[Trial]:
        """Bring the record in order after a kill; return the trials to run again.

        Checkpoints that should have gone go; what is there is asked for once.
        """
        unfinished: list[Trial] = []
        kept: dict[int, CheckpointFile | None] = {}
        for trial in self._record.trials():
            if trial.state == "running":
                unfinished.append(trial)
                continue
            kept[trial.number] = trial.epochs[-1].best if trial.epochs else None
            for number in self._superfluous(trial.number):
                kept[number] = None
        keep = {best.path for best in kept.values() if best is not None}
        in_use = {folder_of(trial.number) for trial in unfinished}
        files = self._record.sweep.files
        # A file that will not go is no reason to stop here; the next resume tries again.
        with contextlib.suppress(OSError):
            files.remove(
                name
                for name in files.names("trials")
                if name not in keep and name.rpartition("/")[0] not in in_use
            )
        return unfinished

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Remember the trials, whose workers may have to be ended."""
        self._trials = trials

    def end_workers(self) -> None:
        """End the workers where they stand; what they reported is recorded.

        Ray's own way waits for their epochs to end, and then for ten seconds more.
        """
        for trial in self._trials:
            if trial.temporary_state.ray_actor is not None:
                ray.kill(trial.temporary_state.ray_actor)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Commit an epoch, with the decision that the scheduler has just taken on it.

        If that ended the trial, its end is in the same commit.
        """
        if self.is_ending():
            return
        number = trial.config["number"]
        stopped = ""
        if result.get("done"):
            at_end = result["epoch"] >= self._record.sweep.training.max_epochs
            otherwise = "max_epochs" if at_end else "time_budget"
            stopped = self._scheduler.reasons.get(trial.trial_id, otherwise)
        epoch = Epoch(
            epoch=result["epoch"],
            metrics=encode_metrics(result["metrics"]),
            confusion=result["confusion"],
            last=_file(result["last"]),
            best=_file(result["best"]),
            stopped=stopped,
            features=result["features"],
            ran_on=result["ran_on"],
            micro_batch_size=result.get("micro_batch_size"),
        )
        self.store(lambda: self._record.add_epoch(number, epoch))
        if self.storage_error:
            return
        if stopped:
            self.open.discard(number)
            self._retain(number, epoch.best)
        self._has_report = True
        for node in self.nodes.note_report(number):
            self._tell(
                f"node    {node} is left alone from now on: what failed there runs elsewhere"
            )
        self.settle()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record why a trial failed, or have it run again if that was not its fault."""
        number = trial.config["number"]
        if self.is_ending() or number not in self.open:
            return
        self.open.discard(number)
        fault = read_fault(trial)
        if fault.kind == "storage":
            self.storage_error = fault.reason
        elif fault.kind == "worker":
            self.nodes.note_failure(fault.node, number)
            self._run_again(number, fault)
        elif fault.kind == "trial" and self.nodes.note_failure(fault.node, number):
            self._tell(f"node    {fault.node}: trial {number:05d} goes elsewhere; {fault.reason}")
            self._run_again(number, fault)
        elif fault.kind == "trial" and not self._has_report:
            alike = [other for other in self._unsettled.values() if other.place == fault.place]
            self.store(lambda: self._record.add_fault(number, fault.reason))
            self._unsettled[number] = fault
            if alike:
                self.bug = fault
        else:
            self._fail(number, fault.reason)

    def settle(self) -> None:
        """Record the failures that nothing but their own trials can be blamed for."""
        if self.bug is None:
            while self._unsettled and not self.is_ending():
                number, fault = self._unsettled.popitem()
                self._fail(number, fault.reason)

    def _run_again(self, number: int, fault: Fault) -> None:
        trial = self.store(lambda: self._record.trial(number))
        if trial is None:
            return
        num_lost = len(trial.faults)
        if num_lost >= MAX_RESTARTS:
            self._fail(number, f"{fault.reason}; so were {num_lost} others before")
        else:
            self.store(lambda: self._record.add_fault(number, fault.reason))
            self.again.append(number)

    def _fail(self, number: int, reason: str) -> None:
        self.store(lambda: self._record.finish(number, "failed", reason))
        if not self.storage_error:
            self._retain(number, None)

    def _retain(self, number: int, best: CheckpointFile | None) -> None:
        """Keep the checkpoint of the best few only: disk does not grow with the trials."""
        superfluous = self._superfluous(number)
        keep = [] if best is None or number in superfluous else [best.path]
        for other in {number, *superfluous}:
            # A file that will not go is no reason to lose the trial; the next resume tries again.
            with contextlib.suppress(OSError):
                remove_all_but(self._record.sweep.files, other, keep if other == number else [])

    def _superfluous(self, number: int) -> list[int]:
        """Rank a trial that has ended; return the trials that keep no checkpoint from now on."""
        sweep = self._record.sweep
        if self._record.state(number) == "failed":
            return [number]
        if number == 0:
            # The baseline's stays, whatever its rank: winners are compared with it.
            return []
        value = self._record.best_value(number)
        score = -math.inf if value is None else (value if sweep.mode == "max" else -value)
        kept = self._kept[self._levels.of(self._record.backbone(number))]
        kept.append((score, -number))
        if len(kept) <= sweep.search.keep_trials:
            return []
        worst = min(kept)
        kept.remove(worst)
        return [-worst[1]]


class EndOfSweep(Stopper):
    """Ends trials at their next report once time is over, and at once when the sweep is ending.

    Ray's own time budget takes running trials away without a word to searcher or callbacks.

    Args:
        recorder: Knows.
        interruption: Asked for signals that were lost.
    """

    def __init__(self, recorder: StudyRecorder, interruption: Interruption | None = None) -> None:
        self._recorder = recorder
        self._interruption = interruption or Interruption()

    def __getstate__(self) -> dict[str, Any]:
        """Stay out of Ray's snapshot, which is never read back."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tell whether a trial that has just reported is to stop."""
        return self._recorder.is_over()

    def stop_all(self) -> bool:
        """Tell whether everything is to stop, and make it quick.

        Raises:
            Interrupted: If the user ends the sweep.
        """
        self._interruption.check()
        if self._recorder.is_ending():
            self._recorder.end_workers()
        return self._recorder.is_ending()


def _file(given: dict[str, Any] | None) -> CheckpointFile | None:
    return None if given is None else CheckpointFile(**given)
