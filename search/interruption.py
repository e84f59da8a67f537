"""Ctrl-C and SIGTERM: how a command ends by them, with everything that it started."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal ends the command.

    Args:
        number: The signal's.

    Attributes:
        exit_code: As a shell gives it: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def unwind_on_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does: folders are let go of, and Ray is shut down.

    Does nothing outside the main thread, where signals cannot be handled.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _unwind)


class Interruption:
    """Takes Ctrl-C and SIGTERM while trials run: the first is noted, a second one unwinds at once.

    Outside the main thread it takes none.

    Attributes:
        number: The signal's that came first; 0 if none did.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise Interrupted(self.number)
        self.number = number


def _unwind(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
