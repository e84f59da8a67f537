"""The live view: what is on the screen, at any size, in a real pseudo-terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest

from lightning_modules.data.phantom import PhantomSettings
from search.space import Float
from search.sweep import DataSettings, SchedulerSettings, SearchSettings, Sweep, TrainingSettings
from search.tuning.events import EpochDone, TrialEnded, TrialStarted
from search.tuning.forecast import Rung
from search.tuning.screen import Messages, Screen, compose, duration
from search.tuning.standing import Standing

SWEEP = Sweep(
    name="brain",
    data=DataSettings(phantom=PhantomSettings()),
    space={"lr": Float(low=1e-4, high=1e-2, log=True)},
    training=TrainingSettings(max_epochs=10),
    search=SearchSettings(num_trials=50),
    scheduler=SchedulerSettings(grace_period_epochs=3, reduction_factor=2),
)


def run_epoch(standing: Standing, number: int, value: float = 0.5) -> None:
    """A trial that starts and reports one epoch."""
    name, params = f"{number:05d}", {"lr": 0.001}
    standing.take(TrialStarted(trial=number, name=name, params=params, epochs_done=0))
    standing.take(
        EpochDone(
            trial=number, name=name, epoch=1, max_epochs=10, metric="val_macro_f1", value=value,
            best=value, metrics={}, next_rung=None, cutoff=None, features="from the cache",
            left_s=None,
        )
    )  # fmt: skip


def stop(standing: Standing, number: int) -> None:
    """ASHA's end of it."""
    standing.take(
        TrialEnded(
            event="stopped", trial=number, name=f"{number:05d}", reason="asha", epochs=3,
            metric="val_macro_f1", value=0.5, best=0.5, cutoff=0.6,
        )
    )  # fmt: skip


SIZES = [(80, 24), (120, 40), (60, 15), (40, 10), (300, 100)]


@pytest.fixture
def busy() -> Standing:
    """30 trials running, 20 ended."""
    standing = Standing(SWEEP)
    standing.rungs = (Rung(epoch=3, num_values=9, cutoff=0.61234),)
    for number in range(50):
        run_epoch(standing, number)
        if number < 20:
            stop(standing, number)
    return standing


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("num_messages", [0, 50])
def test_it_fills_the_screen_and_no_more(
    busy: Standing, width: int, height: int, num_messages: int
) -> None:
    lines = compose(busy, width, height, ["a warning"] * num_messages)
    assert len(lines) == height
    assert all("\n" not in line.plain and line.no_wrap for line in lines)


@pytest.mark.parametrize(("width", "height"), SIZES[:3])
def test_what_counts_is_there_at_any_size(busy: Standing, width: int, height: int) -> None:
    text = [line.plain[:width] for line in compose(busy, width, height, [])]
    assert "30 running · 0 waiting · 0 complete · 20 stopped · 0 failed" in text
    assert any(line.startswith("best 0.5000  00000, epoch 1") for line in text)
    assert any("ASHA stopped 20 of 20 trials" in line for line in text)
    assert any(re.match(r"features: 50 from the cache", line) for line in text)
    assert any(re.match(r"00020 +1/10 +0\.5000 .*0\.6123 at 3", line) for line in text)
    assert any(re.match(r"and \d+ more", line) for line in text)


def test_a_larger_terminal_shows_more_trials_and_their_params(busy: Standing) -> None:
    def rows(width: int, height: int) -> list[str]:
        lines = compose(busy, width, height, [])
        return [line.plain for line in lines if re.match(r"000\d\d +1/10", line.plain)]

    assert len(rows(120, 40)) > len(rows(80, 24)) > len(rows(60, 15)) > 0
    assert "lr 0.001" in rows(120, 40)[0]
    assert "lr 0.001" not in rows(80, 24)[0]


def test_what_was_printed_meanwhile_cannot_steer_the_terminal() -> None:
    shown: list[int] = []
    messages = Messages(lambda: shown.append(len(messages.lines)))
    print("a \x1b[2Jwarning", file=messages)
    print("begun", end="", file=messages)
    assert shown[-1] == 1  # at once
    assert messages.take() == ["a ?[2Jwarning", "begun"]
    assert messages.take() == []


def test_times_are_said_as_people_say_them() -> None:
    assert [duration(s) for s in (0.4, 89, 150, 7000, 200_000)] == [
        "0 s", "89 s", "2 min", "1 h 56 min", "2 d 7 h",
    ]  # fmt: skip


class Terminal:
    """A process on a pseudo-terminal, and what a person would see there."""

    def __init__(self, command: list[str], columns: int, lines: int, folder: Path) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.raw = b""
        self.controller, inner = pty.openpty()
        self.resize(columns, lines)
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment, cwd=folder
        )
        os.close(inner)
        self.stream = pyte.ByteStream(self.screen)
        self.lock = threading.Lock()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                got = os.read(self.controller, 65536)
            except OSError:  # the process has ended
                return
            with self.lock:
                self.raw += got
                self.stream.feed(got)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.controller, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def lines(self) -> list[str]:
        with self.lock:
            return [line.rstrip() for line in self.screen.display]

    def wait_for(self, pattern: str, timeout_s: float) -> list[str]:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            lines = self.lines()
            if any(re.search(pattern, line) for line in lines):
                return lines
            time.sleep(0.05)
        pytest.fail(f"no {pattern!r} on the screen:\n" + "\n".join(self.lines()))

    def end(self, timeout_s: float) -> int:
        code = self.process.wait(timeout_s)
        self.reader.join(5)
        return code

    def is_restored(self) -> bool:
        """Whether the other screen was left, and the cursor shown, after both were changed."""
        return (
            b"\x1b[?1049h" in self.raw
            and self.raw.rfind(b"\x1b[?1049l") > self.raw.rfind(b"\x1b[?1049h")
            and self.raw.rfind(b"\x1b[?25h") > self.raw.rfind(b"\x1b[?25l")
        )


SCRIPT = """
import runpy, select, sys, time
names = runpy.run_path({this!r})
standing = names["Standing"](names["SWEEP"])
screen = names["Screen"](standing)
try:
    screen.start()
    print("a warning of a library", file=sys.stderr)
    names["run_epoch"](standing, 0)
    while True:
        time.sleep(0.05)
        screen.refresh()
        if select.select([sys.stdin], [], [], 0)[0]:
            raise RuntimeError("in the middle of it")
finally:
    screen.close()
"""


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-c", SCRIPT.format(this=__file__)]
    found = Terminal(command, 80, 24, tmp_path)
    yield found
    found.process.kill()
    found.process.wait()


@pytest.mark.slow
def test_a_terminal_may_be_resized_and_is_given_back_after_an_exception(terminal: Terminal) -> None:
    shown = terminal.wait_for(r"^00000 +1/10", 60)
    assert shown[0] == "brain  val_macro_f1, higher is better"
    assert shown[-2:] == ["Ctrl-C ends it; nothing recorded is lost", "a warning of a library"]
    for columns, lines in ((120, 40), (60, 15), (80, 24)):
        terminal.resize(columns, lines)
        time.sleep(1.5)
        deadline_s = time.monotonic() + 20
        while terminal.lines()[-1] != "a warning of a library" and time.monotonic() < deadline_s:
            time.sleep(0.5)
        shown = terminal.lines()
        assert len(shown) == lines
        assert shown[0] == "brain  val_macro_f1, higher is better"
        # Nothing of another size is left over.
        assert sum(line.startswith("00000 ") for line in shown) == 1
        assert sum(line.startswith("best ") for line in shown) == 1
        assert shown[-1] == "a warning of a library"
    os.write(terminal.controller, b"\n")
    assert terminal.end(30) == 1
    assert terminal.is_restored()
    after = terminal.raw[terminal.raw.rfind(b"\x1b[?1049l") :].decode()
    assert "a warning of a library" in after  # not lost with the screen
    assert "RuntimeError: in the middle of it" in after


def test_only_a_terminal_gets_a_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from search.tuning.lines import JsonLines, Lines
    from search.tuning.progress import view_for

    standing = Standing(SWEEP)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many CI systems set it
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(view_for(standing, as_json=False), Lines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert isinstance(view_for(standing, as_json=False), Screen)
    assert isinstance(view_for(standing, as_json=True), JsonLines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(view_for(standing, as_json=False), Lines)


@pytest.mark.slow
def test_a_sweep_in_a_terminal_is_one_screen_and_then_a_table(tmp_path: Path) -> None:
    # Not above: this file runs itself, where there is no conftest.
    from conftest import TINY_SWEEP

    # Long enough for many redrawings, two a second, between its first epoch and its last.
    longer = TINY_SWEEP.replace("max_epochs: 3", "max_epochs: 60")
    longer = longer.replace("{grace_period_epochs: 1}", "null")
    (tmp_path / "sweep.yaml").write_text(longer)
    command = [sys.executable, "-m", "search.cli", "launch", "sweep.yaml"]
    terminal = Terminal(command, 80, 24, tmp_path)
    try:
        terminal.wait_for(r"[12] running", 300)
        terminal.wait_for(r"^best 0\.\d{4}  0000", 300)
        assert terminal.end(600) == 0
    finally:
        terminal.process.kill()
    assert terminal.is_restored()
    shown = terminal.lines()
    assert any(line.startswith("4 trials, ") for line in shown)
    assert "Traceback" not in terminal.raw.decode()
    assert "Warning" not in terminal.raw.decode()
