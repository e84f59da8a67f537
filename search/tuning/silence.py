"""Workers that say nothing for too long: stopped, stuck, or cut off. They are ended."""

import time
from typing import Any

import ray
from ray.tune import Callback

# An epoch may take this many times as long as the trial's longest so far, but this is the least:
# a worker waits for storage that has vanished, too.
MAX_RATIO = 10.0
LEAST_S = 300.0

# And this many times as long as any trial's longest: after epochs whose features others had stored,
# a trial may come to one that it has to compute itself.
MAX_RATIO_OF_ALL = 3.0

# Before a trial's first epoch nothing is known of it, and images may have to be decoded.
FIRST_EPOCH_S = 3600.0

# More than this between two looks is the driver's own silence: it was stopped, or waited.
LONGEST_LOOK_S = 1.0


class EndSilentWorkers(Callback):
    """Ends a worker whose trial has been silent for longer than its epochs explain.

    The trial then runs again as one whose worker was lost. What the old worker may still report
    reaches nobody, and its files bear the number of its attempt.
    """

    def __init__(self) -> None:
        self._silent_s: dict[str, float] = {}
        self._longest_s: dict[str, float] = {}
        self._longest_of_all_s = 0.0
        self._looked_s = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Start a trial's clock."""
        self._silent_s[trial.trial_id] = 0.0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Start a trial's clock anew."""
        silent_s = self._silent_s.get(trial.trial_id, 0.0)
        longest_s = self._longest_s.get(trial.trial_id, 0.0)
        self._longest_s[trial.trial_id] = max(silent_s, longest_s)
        self._longest_of_all_s = max(silent_s, self._longest_of_all_s)
        self._silent_s[trial.trial_id] = 0.0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Forget a trial that ended."""
        self._forget(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Forget a trial that failed."""
        self._forget(trial)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at the clocks."""
        now_s = time.monotonic()
        passed_s = min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._looked_s = now_s
        for trial in trials:
            if trial.trial_id in self._silent_s:
                self._silent_s[trial.trial_id] += passed_s
                actor = trial.temporary_state.ray_actor
                if actor is not None and self.is_too_long(trial.trial_id):
                    ray.kill(actor)
                    self._forget(trial)

    def is_too_long(self, trial_id: str) -> bool:
        """Tell whether a trial's silence is longer than its epochs explain."""
        allowed_s = FIRST_EPOCH_S
        if trial_id in self._longest_s:
            allowed_s = max(
                LEAST_S,
                MAX_RATIO * self._longest_s[trial_id],
                MAX_RATIO_OF_ALL * self._longest_of_all_s,
            )
        return self._silent_s[trial_id] > allowed_s

    def _forget(self, trial: Any) -> None:
        self._silent_s.pop(trial.trial_id, None)
        self._longest_s.pop(trial.trial_id, None)
