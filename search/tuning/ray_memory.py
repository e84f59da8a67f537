"""Keeps Ray Tune's controller from growing with the number of trials."""

from typing import Any


def forget_finished(controller: Any) -> None:
    """Make Tune's controller let go of the trials that have ended.

    It keeps every trial of an experiment, its config, and its last result for a snapshot that a
    sweep never reads back, goes through all of them at every step, and writes and reads files of
    each at the end (Ray issue 64231). There is no public way to say so: these are the places that
    held one in Ray 2.60.0 (``tune/execution/tune_controller.py``). In a Ray where they are called
    otherwise, trials are kept, as Ray would.

    Args:
        controller: Ray's ``TuneController``, or its wrapper for schedulers.
    """
    controller = getattr(controller, "_tune_controller", controller)
    trials = getattr(controller, "_trials", None)
    if not isinstance(trials, list):
        return
    # Ray wants to see one trial in the end.
    ended = [trial for trial in trials if trial.is_finished()][:-1]
    if not ended:
        return
    gone = set(ended)
    trials[:] = [trial for trial in trials if trial not in gone]
    for name in ("_live_trials", "_stopped_trials", "_failed_trials", "_trials_to_cache"):
        holder = getattr(controller, name, None)
        if isinstance(holder, set):
            holder -= gone
    metadata = getattr(controller, "_trial_metadata", None)
    if isinstance(metadata, dict):
        for trial in ended:
            metadata.pop(trial.trial_id, None)
