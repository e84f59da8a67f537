"""What went wrong in a trial, read from what Ray says of it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from search.study.sweep_files import StorageError, StorageRefusedError
from search.tuning.patience import STORAGE_FAULTS, StorageGoneError

# How often a trial is started again whose worker was lost.
MAX_RESTARTS = 3

# Exceptions that are the storage's fault, whatever they say.
STORAGE_ERRORS = tuple(
    kind.__name__ for kind in (StorageError, StorageRefusedError, StorageGoneError)
)

# What becomes of a node that is gone is no sign of how it does when it is there.
NODE_GONE = "its node went away"

# In the line that heads an exception, and in Ray's account of an actor.
_NODE = re.compile(r"\bip(?:=|: )([^\s,)]+)")
_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+)', re.MULTILINE)


class AlikeFailuresError(RuntimeError):
    """The first trials failed in the same way: the code is at fault, and not their params.

    Args:
        traceback: Of the last one.
    """

    def __init__(self, traceback: str) -> None:
        super().__init__("the first trials failed alike, before any epoch")
        self.add_note(traceback)
        self.traceback = traceback


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why a trial ended without being stopped.

    Attributes:
        kind: ``worker``: it died, was killed, or its node went away; ``storage``: it took no more;
            ``memory``: a single image did not fit; ``trial``: any other exception.
        reason: One line, for people.
        node: The address of where it happened; empty if that is not known.
        place: The exception's type and where it was raised; empty for a worker's.
        traceback: The exception's; empty for a worker's.
    """

    kind: Literal["worker", "storage", "memory", "trial"]
    reason: str
    node: str = ""
    place: str = ""
    traceback: str = ""


def read_fault(ray_trial: Any) -> Fault:
    """Return what Ray wrote down of a trial that has just failed."""
    path = ray_trial.error_file
    text = Path(path).read_text(errors="replace") if path else ""
    # Ray's own line comes first: "Failure # 1 (occurred at ...)".
    lines = re.sub(r"\x1b\[\d+m", "", text).splitlines()[1:]
    [node] = _NODE.findall("\n".join(lines))[:1] or [""]
    # It heads exceptions, and those alone, with the task that raised them.
    if not lines or "ray::" not in lines[0]:
        reason = _why_worker_died("\n".join(lines))
        return Fault(kind="worker", reason=reason, node="" if NODE_GONE in reason else node)
    traceback = "\n".join(lines[1:]).strip("\n")
    frames = list(_FRAME.finditer(traceback))
    after = traceback[frames[-1].end() :] if frames else traceback
    said = [line for line in after.splitlines()[bool(frames) :] if line[:1].strip()]
    reason = (said or ["it failed"])[0][:500]
    kind: Literal["storage", "memory", "trial"] = "trial"
    name, _, told = reason.partition(": ")
    if name.endswith(STORAGE_ERRORS):
        return Fault(kind="storage", reason=told, node=node, traceback=traceback)
    if any(fault in reason for fault in STORAGE_FAULTS):
        kind = "storage"
    elif _is_out_of_memory(reason):
        kind = "memory"
    place = f"{name} at {frames[-1]['file']}:{frames[-1]['line']}" if frames else name
    return Fault(kind=kind, reason=reason, node=node, place=place, traceback=traceback)


def _is_out_of_memory(reason: str) -> bool:
    name = reason.partition(":")[0]
    return name.endswith(("OutOfMemoryError", "MemoryError")) or "allocate memory" in reason


def _why_worker_died(text: str) -> str:
    """Return Ray's account of a worker's death in a few words."""
    for sign, reason in (
        ("running low on memory", "killed, since its node ran out of memory"),
        ("was killed by `ray.kill`", "killed, since it was silent for too long"),
        ("node has died", NODE_GONE),
        ("node was terminated", NODE_GONE),
        ("its owner has died", NODE_GONE),
        ("placement group", NODE_GONE),
    ):
        if sign in text:
            return f"worker lost: {reason}"
    [code] = re.findall(r"Worker exit detail: (.{1,80}?)\.", text)[:1] or ["it died"]
    return f"worker lost: {code[0].lower() + code[1:]}"
