"""Garbage is looked for rarely while modules are imported, and as ever once trials run."""

import subprocess
import sys

PROBE = """
import gc
from search.garbage import collect_as_ever, collect_rarely

rounds = []
gc.callbacks.append(lambda phase, info: rounds.append(phase == "start"))
collect_rarely()
kept = [[] for _ in range(50_000)]
print(sum(rounds))
collect_as_ever()
rounds.clear()
print(gc.get_freeze_count() > 50_000)
kept = [[] for _ in range(50_000)]
print(sum(rounds) > 50)
"""


def test_a_process_that_begins_is_looked_through_rarely_and_what_it_made_is_passed_over() -> None:
    # In a process of its own: what is frozen in this one would stay so.
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["0", "True", "True"], run.stderr
