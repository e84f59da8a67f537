"""What a file of torch must not hold: a hundred bytes that take all memory, or all time.

It is looked at before torch reads it, and nothing in it is run.
"""

import os
import pickletools
import zipfile
from typing import IO, Any

from lightning_modules.errors import InputError

TENSORS_ONLY = "must hold tensors only (no pickled objects)"

# What torch lets a file of tensors call, and needs for none: a zeroed gigabyte in a hundred bytes,
# and text that doubles with each call.
_BOMBS = ("bytearray", "encode")

# A tuple of two of a tuple of two ...: Python goes through all of it to hash a key.
MAX_SPELT_OUT = 1_000_000

_NUM_OLD_PICKLES = 5  # at the head of a file from before torch 1.6

_MARK = -1


def refuse_bombs(file: IO[bytes]) -> None:
    """Refuse a file of torch that would take more memory or time than it has bytes.

    Args:
        file: At its start, where it is left.

    Raises:
        InputError: If it is compressed, is no such file, calls what allocates as much as it is
            told to, or holds tuples of tuples without end; the message does not name it.
        OSError: If it cannot be read.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # torch stores its tensors as they are, and would inflate what is not.
            sizes = sum(entry.file_size for entry in entries)
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sizes > num_bytes:
                raise InputError("must not be compressed")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as pickled:
                        _check(pickled)
    except zipfile.BadZipFile:
        file.seek(0)
        for _ in range(_NUM_OLD_PICKLES):
            _check(file)
    file.seek(0)


def _check(pickled: IO[bytes]) -> None:
    """Go through one pickle."""
    sizes = _TupleSizes()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL" and str(argument).rpartition(" ")[2] in _BOMBS:
                raise InputError(TENSORS_ONLY)
            if sizes.follow(opcode, argument) > MAX_SPELT_OUT:
                raise InputError(TENSORS_ONLY)
    except (ValueError, IndexError) as error:
        raise InputError(TENSORS_ONLY) from error


class _TupleSizes:
    """What a pickle has on its stack: how many items each tuple has, those of its own spelt out."""

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._memo: dict[int, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> int:
        """Follow an instruction; return the size of what is on top then.

        Raises:
            IndexError: If it takes more than there is.
        """
        stack = self._stack
        before = opcode.stack_before
        taken: list[int] = []
        if pickletools.markobject in before:
            while (size := stack.pop()) != _MARK:
                taken.append(size)
            before = before[: before.index(pickletools.markobject)]
        taken += [stack.pop() for _ in before]
        match opcode.name:
            case "MARK":
                stack.append(_MARK)
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(1 + sum(taken))
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo.get(int(argument), 1))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = taken[-1]
                stack.append(taken[-1])
            case "DUP":
                stack += [taken[-1]] * 2
            case _:
                stack += [1] * len(opcode.stack_after)
        return stack[-1] if stack else 0
