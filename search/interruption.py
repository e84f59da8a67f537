"""Ctrl-C and SIGTERM: how a command ends by them, with everything that it started."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal ends the command.

    Args:
        number: The signal's.

    Attributes:
        exit_code: As a shell gives it: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Interruption:
    """Has Ctrl-C and SIGTERM unwind the main thread, wherever it stands, and remembers them.

    An exception that comes while Python cleans up an object is lost: whoever works in a loop asks
    ``check`` now and then.
    """

    def __init__(self) -> None:
        self._number = 0

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals for a while; outside the main thread, where none can be, do nothing.

        Raises:
            Interrupted: When one came.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._take) for number in numbers}
        try:
            yield
        except KeyboardInterrupt:
            self.check()  # Ray makes a plain one of whatever comes while it waits
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Unwind if a signal came.

        Raises:
            Interrupted: With the signal that came first.
        """
        if self._number:
            raise Interrupted(self._number)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        self.check()
