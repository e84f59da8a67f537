"""A running sweep on one screen of the terminal, whatever its size."""

import contextlib
import io
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from lightning_modules.errors import printable
from search.tuning.events import Event
from search.tuning.lines import ending, shown
from search.tuning.standing import RunningTrial, Standing

REDRAW_S = 0.5

# Whoever prints a thousand lines does not cause a thousand drawings.
NOTICE_S = 0.1

# Screens lower than this have no blank lines, and no hint.
ROOMY_LINES = 20

# From the one width on, running trials are shown with their params; below the other, without their
# best value.
WIDE_COLUMNS, NARROW_COLUMNS = 100, 72

MAX_MESSAGES = 200


class Screen:
    """Takes the whole terminal for as long as trials run, and gives it back as it was.

    It is drawn from Ray's loop, without a thread of its own. What anybody prints meanwhile is
    shown at the bottom, and printed to standard error afterwards.

    Args:
        standing: Shown.
    """

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        # Holds on to the terminal: standard output is put aside while the screen is up.
        self._console = Console(file=sys.stdout, highlight=False)
        self._live = Live(
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._messages = Messages(self._notice)
        self._aside = contextlib.ExitStack()
        self._drawn_s = 0.0
        self._noticed_s = 0.0

    def start(self) -> None:
        """Put the screen up."""
        self._aside.enter_context(contextlib.redirect_stdout(self._messages))
        self._aside.enter_context(contextlib.redirect_stderr(self._messages))
        self._live.start()
        self._draw()

    def show(self, event: Event) -> None:
        """Leave it to the next redraw: many events come at once."""

    def refresh(self) -> None:
        """Draw it again if it is time to; a terminal of another size is noticed here."""
        if time.monotonic() - self._drawn_s >= REDRAW_S:
            self._draw()

    def close(self) -> None:
        """Take the screen down, and print what was said meanwhile."""
        self._aside.close()
        self._live.stop()
        for line in self._messages.take():
            print(line, file=sys.stderr)

    def _notice(self) -> None:
        """Show a message at once: after Ctrl-C, Ray's loop is left and does not come by again."""
        in_loop = threading.current_thread() is threading.main_thread()
        if in_loop and time.monotonic() - self._noticed_s >= NOTICE_S:
            self._noticed_s = time.monotonic()
            self._draw()

    def _draw(self) -> None:
        if not self._live.is_started:
            return
        width, height = self._console.size
        lines = compose(self._standing, width, height, list(self._messages.lines))
        self._live.update(Group(*lines), refresh=True)
        self._drawn_s = time.monotonic()


class Messages(io.TextIOBase):
    """Stands in for standard output and error, and keeps the last lines.

    Args:
        on_line: Called after each write of a whole line.

    Attributes:
        lines: Whole lines, oldest first.
    """

    def __init__(self, on_line: Callable[[], None]) -> None:
        self._on_line = on_line
        self.lines: deque[str] = deque(maxlen=MAX_MESSAGES)
        self._begun = ""

    def write(self, text: str) -> int:
        """Keep whole lines, without blank ones."""
        *whole, self._begun = (self._begun + text).split("\n")
        self.lines.extend(printable(line.rstrip()) for line in whole if line.strip())
        if whole:
            self._on_line()
        return len(text)

    def take(self) -> list[str]:
        """Return what has been kept, and forget it."""
        taken = [*self.lines, *([self._begun] if self._begun.strip() else [])]
        self.lines.clear()
        self._begun = ""
        return taken


def compose(standing: Standing, width: int, height: int, messages: list[str]) -> list[Text]:
    """Return the screen's lines: no more than its height, each to be cut at its width.

    What there is always room for comes first: counts, time, the best. The rest is shared between
    the running trials, those that ended last, and messages.

    Args:
        standing: Shown.
        width: Columns.
        height: Lines.
        messages: What was printed meanwhile, oldest first.
    """
    is_roomy = height >= ROOMY_LINES
    blank = [Text()] if is_roomy else []
    head = [*_head(standing, width), *blank, *_best(standing, width), *blank]
    foot = [*blank, _asha(standing), _features(standing)]
    if is_roomy:
        foot.append(Text("Ctrl-C ends it; nothing recorded is lost", style="dim"))
    newest = messages[-(height // 10) :] if messages else []
    foot += [Text(line, style="yellow") for line in newest]
    room = height - len(head) - len(foot)
    middle = _running(standing, width, room)
    room -= len(middle)
    if room > len(blank) and standing.endings:
        last = list(standing.endings)[: room - len(blank)]
        columns = max(len(end.name) for end in last)
        middle += [*blank, *(Text.assemble(f"{e.name:<{columns}}  ", ending(e)) for e in last)]
    middle += [Text() for _ in range(height - len(head) - len(foot) - len(middle))]
    lines = [*head, *middle, *foot][:height]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return lines


def _head(standing: Standing, width: int) -> list[Text]:
    sweep, ended = standing.sweep, standing.ended
    way = "higher" if sweep.mode == "max" else "lower"
    title = Text.assemble((f"{sweep.name}  ", "bold"), f"{sweep.metric}, {way} is better")
    counts = Text(f"{len(standing.running)} running · {standing.num_waiting} waiting")
    counts.append(f" · {ended['complete']} complete", style="green")
    counts.append(f" · {ended['pruned']} stopped", style="yellow" if ended["pruned"] else "")
    counts.append(f" · {ended['failed']} failed", style="red" if ended["failed"] else "")
    epochs, left_s = standing.left()
    whole = standing.epochs + epochs
    told = f" {standing.epochs} of about {whole:.0f} epochs · {duration(standing.elapsed_s)}"
    told += "" if left_s is None else f" · about {duration(left_s)} left"
    bar_columns = max(6, min(40, width - len(told) - 1))
    filled = round(bar_columns * standing.epochs / max(1.0, whole))
    # Not dim, which some terminals do not know: the bar would look full.
    bar = Text.assemble(("━" * filled, "green"), ("━" * (bar_columns - filled), "bright_black"))
    return [title, counts, bar.append(told)]


def _best(standing: Standing, width: int) -> list[Text]:
    best = standing.best
    if best is None:
        return [Text("no epoch reported yet; workers take some seconds to start", style="dim")]
    first = Text("best ").append(shown(best.value), style="bold green")
    first.append(f"  {best.name}, epoch {best.epoch}")
    lines = [""]
    for pair in _pairs(best.params):
        if lines[-1] and len(lines[-1]) + len(pair) + 2 > width - 5:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + pair
    return [first, *(Text(f"     {line}") for line in lines)]


def _running(standing: Standing, width: int, room: int) -> list[Text]:
    """Return the running trials as a table, as many as there is room for."""
    trials = [standing.running[number] for number in sorted(standing.running)]
    if not trials or room < 2:
        return []
    has_best = width >= NARROW_COLUMNS
    name_columns = max(len(trial.name) for trial in trials)
    name_columns = min(max(name_columns, len("running")), width - (45 if has_best else 35))
    header = f"{'running':<{name_columns}}  {'epoch':>7}  {'now':>7}"
    header += f"  {'best':>7}" if has_best else ""
    lines = [Text(f"{header}  {'cut-off':>7} at epoch", style="bold")]
    fitting = trials if len(trials) < room else trials[: room - 2]
    for trial in fitting:
        lines.append(_row(standing, trial, name_columns, width))
    if len(fitting) < len(trials):
        lines.append(Text(f"and {len(trials) - len(fitting)} more", style="dim"))
    return lines


def _row(standing: Standing, trial: RunningTrial, name_columns: int, width: int) -> Text:
    sweep = standing.sweep
    name = trial.name
    if len(name) > name_columns:
        name = f"{name[: name_columns - 1]}…"
    epochs = f"{trial.epochs}/{sweep.training.max_epochs}"
    row = Text(f"{name:<{name_columns}}  {epochs:>7}  ")
    rungs = standing.rungs_of.get(str(trial.params.get("backbone")), standing.rungs)
    rung = next((rung for rung in rungs if rung.epoch > trial.epochs), None)
    cutoff = None if rung is None else rung.cutoff
    sign = 1 if sweep.mode == "max" else -1
    is_below = cutoff is not None and trial.value is not None
    is_below = is_below and sign * (trial.value or 0.0) < sign * (cutoff or 0.0)
    row.append(f"{shown(trial.value):>7}", style="yellow" if is_below else "")
    if width >= NARROW_COLUMNS:
        row.append(f"  {shown(trial.best):>7}")
    row.append(f"  {shown(cutoff):>7}" + ("" if rung is None else f" at {rung.epoch}"))
    if width >= WIDE_COLUMNS:
        row.append(" " * max(2, name_columns + 47 - len(row)))
        row.append("  ".join(_pairs({n: trial.params[n] for n in sweep.space})), style="dim")
    return row


def _asha(standing: Standing) -> Text:
    if standing.sweep.scheduler is None:
        return Text("no trial is stopped early", style="dim")
    if not standing.num_stopped:
        rungs = ", ".join(str(rung.epoch) for rung in standing.rungs)
        return Text(f"ASHA compares at epochs {rungs}" if rungs else "ASHA has nothing to compare")
    line = Text(f"ASHA stopped {standing.num_stopped} of {standing.num_ended} trials that ended")
    return line.append(f", which spared {standing.spared_epochs} epochs")


def _features(standing: Standing) -> Text:
    told = [f"{count} {outcome}" for outcome, count in standing.features.most_common()]
    return Text(f"features: {' · '.join(told) or '-'}")


def _pairs(params: dict[str, Any]) -> list[str]:
    return [
        f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in params.items()
    ]


def duration(seconds: float) -> str:
    """Return a time as people say it.

    Example:
        >>> [duration(seconds) for seconds in (0.4, 89, 150, 7000, 200_000)]
        ['0 s', '89 s', '2 min', '1 h 56 min', '2 d 7 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = int(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
