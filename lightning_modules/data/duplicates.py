"""Which images show the same picture: exactly, or brightened, sharpened, cropped, mirrored.

Slices of different brains are alike: thresholds on a perceptual hash, or on a plain correlation,
that find the copies of a slice join hundreds of strangers. So what all images of a set have in
common is taken out before they are compared: pictures are correlated by their local structure,
whitened by the set's own covariance.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

from lightning_modules.data.pack import Pack
from lightning_modules.files import write_atomically

Floats = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]
Clusters = tuple[tuple[int, ...], ...]

# Raise it with anything that changes a result: stored ones are then computed anew.
DUPLICATES_VERSION = 2

# The whitened correlation from which two images are one picture, and what is added to the
# covariance's eigenvalues as a share of their mean; the more, the fewer images there are to
# estimate it from. Both set on real slices and on altered copies of them.
SAME_AT = 0.42
SHRINKAGE = 0.1

# How far a copy's correlation exceeds the median of either image's with some others.
STANDS_OUT = 3.0
NUM_OTHERS = 512

# Local structure is taken at SIDE_PX; pictures are compared coarser, in square tiles, and in as
# many of the directions that they differ in most. Spreads below QUIET are no structure.
SIDE_PX = 64
TILE_PX = 6
NUM_TILES = 4
COARSE_PX = TILE_PX * NUM_TILES
NUM_COMPONENTS = 256
QUIET = 0.05

# What takes the mean of each tile, from either side.
TO_TILES = np.kron(np.eye(NUM_TILES), np.full((TILE_PX, 1), 1 / TILE_PX)).astype(np.float32)

# Rows of the matrix of all pairs that are in memory at a time.
BLOCK = 1024

# Up to as many images, what they are through each turn is kept from one pass to the next: 230 MB.
MAX_KEPT_ROWS = 3000

# Images that are turned at a time: so few stay in a core's own cache.
TURN_BLOCK = 128


@dataclass(frozen=True)
class Duplicates:
    """Which images show the same picture.

    Attributes:
        exact: Clusters of two or more rows with equal pixels.
        near: Clusters of two or more rows that show one picture; exact copies are in them.
    """

    exact: Clusters
    near: Clusters


@dataclass(frozen=True)
class Turn:
    """How a picture is looked at to find it in another: mirrored, then cropped.

    Attributes:
        upside_down: Mirrored top to bottom.
        sideways: Mirrored left to right.
        side: What is left of each side, as a share.
        left: What is cut off at the left, as a share.
        top: What is cut off at the top, as a share.
    """

    upside_down: bool
    sideways: bool
    side: float
    left: float
    top: float


def duplicates_of(
    pack: Pack, cache_dir: Path, progress: Callable[[int, int], None] | None = None
) -> Duplicates:
    """Find a pack's duplicates in the cache, or look for them and leave them there.

    Args:
        pack: The images.
        cache_dir: Where packs lie.
        progress: Called with steps done and steps in all.
    """
    path = cache_dir / f"duplicates-{DUPLICATES_VERSION}-{pack.image_size_px}px-{pack.digest}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_bytes())
        exact, near = (tuple(map(tuple, found[kind])) for kind in ("exact", "near"))
        return Duplicates(exact=exact, near=near)
    duplicates = find_duplicates(pack.images(), progress)
    with contextlib.suppress(OSError):  # it is only slower next time
        write_atomically(path, json.dumps(asdict(duplicates)).encode())
    return duplicates


def find_duplicates(
    images: Images, progress: Callable[[int, int], None] | None = None
) -> Duplicates:
    """Find images that show the same picture.

    All pairs are compared: time grows with the square of the number of images, some minutes for
    20,000. Not found are copies turned by anything but 180 degrees, or cropped by more than about a
    seventh of a side; nor images without structure, or that half of the set are copies of, unless
    their pixels are equal. Scans of one person in one position are found too: they are
    near, whoever made them.

    Args:
        images: Shape ``(N, S, S)``, uint8 grey, as a pack holds them.
        progress: Called with steps done and steps in all.

    Returns:
        Clusters, by first row. A copy of a copy is in the same one.
    """
    first_of: dict[bytes, int] = {}
    exact, near = _Joined(len(images)), _Joined(len(images))
    for row, image in enumerate(images):
        first = first_of.setdefault(hashlib.sha256(image.tobytes()).digest(), row)
        exact.join(first, row)
        near.join(first, row)
    rows = sorted(first_of.values())
    for a, b in similar_pairs(images, rows, progress):
        near.join(rows[a], rows[b])
    return Duplicates(exact=exact.clusters(), near=near.clusters())


def similar_pairs(
    images: Images, rows: list[int], progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[int, int]]:
    """Yield the pairs of positions in ``rows`` that show one picture; some come several times."""
    if len(rows) < 2:
        return
    structures = np.zeros((len(rows), SIDE_PX, SIDE_PX), np.float32)
    for start in range(0, len(rows), BLOCK):
        block = np.stack([_shrunk(images[row]) for row in rows[start : start + BLOCK]])
        structures[start : start + BLOCK] = local_structure(block)
    turns = list(all_turns())
    plain = _coarse(structures, turns[0])
    whitening = Whitening.of(plain)
    plain = whitening.apply(plain)
    # A blurred or odd image is a little like everything: a copy has to stand out from that.
    others = np.linspace(0, len(rows) - 1, min(len(rows), NUM_OTHERS)).astype(int)
    to_others = np.full((len(rows), len(others)), -1, np.float32)
    look: Callable[[Turn], Floats] = functools.partial(_turned, structures, whitening)
    if len(rows) <= MAX_KEPT_ROWS:
        look = functools.cache(look)
    for number, turn in enumerate(turns):
        turned = look(turn)
        np.maximum(to_others, turned @ plain[others].T, out=to_others)
        np.maximum(to_others, plain @ turned[others].T, out=to_others)
        if progress:
            progress(number + 1, 2 * len(turns))
    least = np.maximum(SAME_AT, STANDS_OUT * np.median(to_others, axis=1))
    least_of_all = least.min()
    for number, turn in enumerate(turns):
        turned = look(turn)
        for start in range(0, len(rows), BLOCK):
            likeness = (plain[start : start + BLOCK] @ turned.T).ravel()
            # Nearly all pairs fail the lower bar: the rest are looked at one by one.
            pairs = np.flatnonzero(likeness >= least_of_all)
            a, b = start + pairs // len(rows), pairs % len(rows)
            same = (likeness[pairs] >= np.maximum(least[a], least[b])) & (a != b)
            yield from zip(a[same].tolist(), b[same].tolist(), strict=True)
        if progress:
            progress(len(turns) + number + 1, 2 * len(turns))


def local_structure(pictures: Floats) -> Floats:
    """Return pictures without what brightness, contrast, and coil shading change.

    Each pixel's difference from its surroundings, in units of their standard deviation; about 0
    where there is nothing to see.

    Args:
        pictures: Shape ``(N, SIDE_PX, SIDE_PX)``, grey in [0, 255].

    Returns:
        The same shape.
    """
    wide = (0, 0.07 * SIDE_PX, 0.07 * SIDE_PX)
    fine = gaussian_filter(pictures, (0, 0.5, 0.5))
    difference = fine - gaussian_filter(fine, wide)
    spread = np.sqrt(gaussian_filter(difference**2, wide))
    # Grey levels of noise and JPEG artefacts in the dark around a head are no structure.
    quiet = 4.0 + 0.25 * spread.mean(axis=(1, 2), keepdims=True)
    return np.asarray(difference / (spread + quiet), dtype=np.float32)


def all_turns() -> Iterator[Turn]:
    """Yield every way in which a copy is looked for; what lies between two is near to both."""
    for upside_down in (False, True):
        for sideways in (False, True):
            yield Turn(upside_down, sideways, 1.0, 0.0, 0.0)
            for cut in (0.06, 0.12):
                places = (0.0, cut / 2, cut)
                for left in places:
                    for top in places:
                        yield Turn(upside_down, sideways, 1 - cut, left, top)


@dataclass(frozen=True, eq=False)
class Whitening:
    """What makes the coarse structures of a set uncorrelated, except where they are copies.

    Attributes:
        mean: Shape ``(D,)``.
        matrix: Shape ``(D, C)``.
    """

    mean: Floats
    matrix: Floats

    @classmethod
    def of(cls, coarse: Floats) -> "Whitening":
        """Estimate it.

        Args:
            coarse: Shape ``(N, D)``.
        """
        mean = coarse.mean(axis=0)
        centred = (coarse - mean).astype(np.float64)
        values, vectors = np.linalg.eigh(centred.T @ centred / len(coarse))
        shrinkage = SHRINKAGE + coarse.shape[1] / (20 * len(coarse))
        top = slice(-NUM_COMPONENTS, None)
        scale = np.sqrt(values[top].clip(0) + shrinkage * max(float(values.mean()), 1e-12))
        return cls(mean, np.asarray(vectors[:, top] / scale, dtype=np.float32))

    def apply(self, coarse: Floats) -> Floats:
        """Return whitened rows of length 1; of what is like everything else, or empty, shorter."""
        return _of_length_1(np.asarray((coarse - self.mean) @ self.matrix, dtype=np.float32))


def _turned(structures: Floats, whitening: Whitening, turn: Turn) -> Floats:
    """Return structures as seen through a turn, whitened."""
    return whitening.apply(_coarse(structures, turn))


def _coarse(structures: Floats, turn: Turn) -> Floats:
    """Return structures as seen through a turn, in rows of length 1; of nothing, 0."""
    across = _resampling(turn.sideways, turn.left, turn.side)
    down = _resampling(turn.upside_down, turn.top, turn.side)
    rows = np.empty((len(structures), COARSE_PX**2), np.float32)
    for start in range(0, len(structures), TURN_BLOCK):
        # Two products of matrices for many images at once, not a resize for each.
        block = structures[start : start + TURN_BLOCK]
        narrow = block.reshape(-1, SIDE_PX) @ across
        coarse = down.T @ narrow.reshape(-1, SIDE_PX, COARSE_PX)
        # Tile by tile, or a bright skull would outweigh what is in it.
        tiles = coarse.reshape(-1, NUM_TILES, TILE_PX, NUM_TILES, TILE_PX)
        tiles -= _tile_means(coarse)
        tiles /= np.sqrt(_tile_means(coarse**2)) + QUIET
        rows[start : start + TURN_BLOCK] = coarse.reshape(len(coarse), -1)
    return _of_length_1(rows)


def _tile_means(coarse: Floats) -> Floats:
    """Return the mean of each tile, ``(N, NUM_TILES, 1, NUM_TILES, 1)``."""
    return np.asarray((TO_TILES.T @ coarse @ TO_TILES)[:, :, None, :, None])


def _resampling(mirrored: bool, start: float, side: float) -> Floats:
    """Return what crops a line of pixels and makes it coarser, ``(SIDE_PX, COARSE_PX)``.

    Args:
        mirrored: Turn the line round first.
        start: What is cut off before, as a share.
        side: What is left, as a share.
    """
    every = Image.fromarray(np.eye(SIDE_PX, dtype=np.float32))
    box = (SIDE_PX * start, 0, SIDE_PX * (start + side), SIDE_PX)
    weights = np.asarray(every.resize((COARSE_PX, SIDE_PX), Image.Resampling.BILINEAR, box))
    return np.ascontiguousarray(weights[:: -1 if mirrored else 1])


def _of_length_1(rows: Floats) -> Floats:
    """Return rows as unit vectors; what is nearly nothing stays so."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-3), dtype=np.float32)


def _shrunk(image: Images) -> Floats:
    small = Image.fromarray(image).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32)


class _Joined:
    """Rows that belong together (a disjoint-set forest)."""

    def __init__(self, num_rows: int) -> None:
        self._above = list(range(num_rows))

    def root(self, row: int) -> int:
        """Return the first row of a row's cluster."""
        while self._above[row] != row:
            self._above[row] = self._above[self._above[row]]
            row = self._above[row]
        return row

    def join(self, one: int, other: int) -> None:
        """Make one cluster of two rows' clusters."""
        low, high = sorted((self.root(one), self.root(other)))
        self._above[high] = low

    def clusters(self) -> Clusters:
        """Return clusters of two or more rows."""
        members: dict[int, list[int]] = {}
        for row in range(len(self._above)):
            members.setdefault(self.root(row), []).append(row)
        return tuple(tuple(rows) for rows in members.values() if len(rows) > 1)
