"""What a file of torch must not hold: a hundred bytes that take all memory, or all time.

It is looked at before torch reads it, and nothing in it is run.
"""

import os
import pickletools
import zipfile
from typing import IO, Any

import torch

from lightning_modules.errors import InputError

TENSORS_ONLY = "must hold tensors only (no pickled objects)"

# All that a file of tensors and plain values calls. Of the rest that torch lets it call, some
# allocate as much as they are told to, or show what they were given in a message.
_CALLS = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch.storage UntypedStorage",
}

# A tuple of two of a tuple of two ...: Python goes through all of it to hash a key.
MAX_SPELT_OUT = 1_000_000

_NUM_OLD_PICKLES = 5  # at the head of a file from before torch 1.6

_MARK, _CALL = -1, -2


def refuse_bombs(file: IO[bytes]) -> None:
    """Refuse a file of torch that would take more memory or time than it has bytes.

    Args:
        file: At its start, where it is left.

    Raises:
        InputError: If it is compressed, is no such file, calls what tensors do not need, or holds
            tuples of tuples without end; the message does not name it.
        OSError: If it cannot be read.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    # By these torch tells the formats apart; an archive may begin anywhere for `zipfile`.
    if file.read(4) == b"PK\x03\x04":
        _check_archive(file, num_bytes)
    else:
        file.seek(0)
        for _ in range(_NUM_OLD_PICKLES):
            _check(file)
    file.seek(0)


def _check_archive(file: IO[bytes], num_bytes: int) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # torch stores its tensors as they are, and would inflate what is not.
            sizes = sum(entry.file_size for entry in entries)
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sizes > num_bytes:
                raise InputError("must not be compressed")
            # Else `zipfile` has found another directory than torch, which goes by its place alone.
            if min((entry.header_offset for entry in entries), default=0):
                raise InputError(TENSORS_ONLY)
            for entry in entries:
                # torch does not mind how names are written.
                if entry.filename.lower().endswith(".pkl"):
                    with archive.open(entry) as pickled:
                        _check(pickled)
    except zipfile.BadZipFile as error:
        raise InputError(TENSORS_ONLY) from error


def _check(pickled: IO[bytes]) -> None:
    """Go through one pickle."""
    stack = _Stack()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL" and not _is_needed(str(argument)):
                raise InputError(TENSORS_ONLY)
            if stack.follow(opcode, argument) > MAX_SPELT_OUT:
                raise InputError(TENSORS_ONLY)
    except (ValueError, IndexError) as error:
        raise InputError(TENSORS_ONLY) from error


def _is_needed(name: str) -> bool:
    module, _, member = name.partition(" ")
    is_kind = module == "torch" and (
        member.endswith("Storage") or isinstance(getattr(torch, member, None), torch.dtype)
    )
    return is_kind or name in _CALLS


class _Stack:
    """What a pickle has on its stack: how many items each tuple has, those of its own spelt out."""

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._memo: dict[int, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> int:
        """Follow an instruction; return the size of what is on top then.

        Raises:
            IndexError: If it takes more than there is.
            ValueError: If it calls what is no function or class.
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
            case "GLOBAL":
                stack.append(_CALL)
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(1 + sum(max(1, size) for size in taken))
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
                if opcode.name in ("REDUCE", "NEWOBJ") and taken[-1] != _CALL:
                    # torch would show it, however large it is.
                    raise ValueError("it calls what it has made")
                stack += [1] * len(opcode.stack_after)
        return stack[-1] if stack else 0
