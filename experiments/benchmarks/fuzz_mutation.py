"""Changes to valid files, by bytes and by structure, each a function of a random generator."""

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What breaks readers: ends of ranges, other types, paths, escapes, what looks like a number.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    255,
    65_536,
    2**31,
    2**63,
    10**300,
    -(10**400),
    0.5,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a",
    "1e400",
    "1:2:3",
    "../../x",
    "/etc/passwd",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "a" * 5000,
    "1" * 5000 + "x",
    "=",
    "<<",
    "2026-01-01",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"": {}},
)
NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, -1)
WIDTHS = {1: "b", 2: "h", 4: "i", 8: "q"}


def change_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return a file with one to four changes: bits, numbers, parts lost, repeated, or swapped."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        size = len(changed)
        # Headers decide more than what follows.
        place = rng.randrange(min(size, rng.choice((64, 512, size or 1))) or 1)
        length = rng.choice((1, 2, 4, 8, 32, 256))
        kind = rng.randrange(8)
        if kind == 0 and size:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif kind in (2, 3):
            width = rng.choice(tuple(WIDTHS))
            number = rng.choice(NUMBERS) % 2 ** (8 * width)
            packed = number.to_bytes(width, rng.choice(("little", "big")))
            changed[place : place + width] = packed
        elif kind == 4:
            del changed[place : place + length]
        elif kind == 5:
            changed[place:place] = changed[place : place + length] * rng.choice((1, 2, 50))
        elif kind == 6:
            changed[place:place] = rng.randbytes(length)
        else:
            cut = rng.randrange(len(other) or 1)
            changed = changed[:place] + other[cut : cut + rng.choice((length, len(other)))]
    if not rng.randrange(20):
        del changed[rng.randrange(len(changed) or 1) :]
    return bytes(changed)


def change_document(document: Any, rng: random.Random) -> Any:
    """Return nested mappings and lists with one to three values, keys, or levels changed."""
    changed = [copy.deepcopy(document)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        container, key = rng.choice(places)
        kind = rng.randrange(10)
        if kind < 6:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 6 and container is not changed:
            del container[key]
        elif kind == 7 and isinstance(container, dict):
            container[rng.choice(("../x", "a" * 300, "\x1b", "", str(key) + " "))] = container[key]
        elif kind == 8:
            other_container, other_key = rng.choice(places)
            container[key] = copy.deepcopy(other_container[other_key])
        else:
            for _ in range(rng.choice((1, 10, 60, 400))):
                container[key] = rng.choice(([container[key]], {"a": container[key]}))
    return changed[0]


def to_json(document: Any) -> bytes:
    """Return JSON, with what Python adds to it: numbers that are none, half pairs."""
    return json.dumps(document).encode()


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file whose header was changed as a document, its length made right."""
    (length,) = struct.unpack("<Q", data[:8])
    header = to_json(change_document(json.loads(data[8 : 8 + length]), rng))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _places(container: Any) -> Any:
    keys = container if isinstance(container, dict) else range(len(container))
    for key in list(keys):
        yield container, key
        if isinstance(container[key], dict | list):
            yield from _places(container[key])


Mutate = Callable[[bytes, bytes, random.Random], bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of file.

    Attributes:
        inputs: How many of 110,500 are its.
        prepare: Returns valid files, and leaves in a folder what reading them needs.
        change: Returns a changed file of a valid one and another.
        read: Reads one in that folder, as a command would.
    """

    inputs: int
    prepare: Callable[[Path], Sequence[bytes]]
    change: Mutate
    read: Callable[[bytes, Path], object]


def either(*kinds: Mutate) -> Mutate:
    """Return what changes a file in one of several ways."""
    return lambda data, other, rng: rng.choice(kinds)(data, other, rng)


def by_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return change_bytes(data, other, rng)


def by_header(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return change_safetensors(data, rng)


def by_values(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return to_json(change_document(json.loads(data), rng))
