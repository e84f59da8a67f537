"""State dicts: reading them, and whose names and layouts they have.

A file is untrusted input: only tensors are read, and each name in it is checked before it is shown.
"""

import functools
import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models.vision_transformer import interpolate_embeddings

from lightning_modules.backbones import Backbone, build_network
from lightning_modules.errors import InputError
from lightning_modules.files import check_header
from lightning_modules.pickled_bombs import TENSORS_ONLY, refuse_bombs
from lightning_modules.stages import HEAD_MODULE, IMAGENET_SIZE_PX, PATCH_PX, STAGE_MODULES

State = dict[str, Tensor]

# Where training scripts keep the network, beside the optimizer and the epoch.
CONTAINERS = ("state_dict", "model_state_dict", "model")

MAX_NAME_CHARACTERS = 300

POSITIONS = "encoder.pos_embedding"

# ResNet-152 has 932 tensors, a self-supervised pair of networks twice as many.
MAX_TENSORS = 20_000
MAX_NAME_PARTS = 32

# Of images of 4096 px. A file may claim any shape in a few bytes: a value repeated.
MAX_PATCHES_A_SIDE = 256

# Counts batches and is read by nobody: old files, and converted ones, do not have it.
COUNTER = ".num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class Match:
    """What of a file became of a backbone.

    Attributes:
        state: The backbone's tensors under torchvision's names, of its types and shapes.
        prefix: What the file's names have before torchvision's, or before the numbers of
            ``nn.Sequential``.
        num_matched: How many tensors were taken from the file.
        missing: torchvision's names that the file does not have: of its head, or counters.
        ignored: The file's names that no backbone has: of other heads, projections, copies.
    """

    state: State
    prefix: str
    num_matched: int
    missing: tuple[str, ...]
    ignored: tuple[str, ...]


def read_state_dict(path: Path) -> State:
    """Read a state dict without unpickling anything but tensors.

    A training script's checkpoint is one, too, if its network is a state dict under one of the
    names ``CONTAINERS``; whatever lies beside is left out.

    Raises:
        InputError: If the file is missing, torn, or holds anything but a mapping of tensors.
    """
    if not path.is_file():
        raise InputError(f"weights must be a file; nothing at {path}")
    try:
        content: object
        if path.suffix == ".safetensors":
            check_header(path)
            content = safetensors.torch.load_file(path)
        else:
            with path.open("rb") as file:
                refuse_bombs(file)
                content = torch.load(file, map_location="cpu", weights_only=True)
    except InputError as error:
        raise InputError(f"weights {path} {error}; save `model.state_dict()`") from error
    except (OSError, safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"weights {path} cannot be read: {first_line(error):.200}") from error
    except Exception as error:  # torch raises pickle.UnpicklingError and bare ones of its own
        # Not torch's words: they advise to load the file all the same.
        raise InputError(f"weights {path} {TENSORS_ONLY}; save `model.state_dict()`") from error
    if isinstance(content, Mapping):
        inside = [content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)]
        content = inside[0] if inside else content
    if isinstance(content, Mapping) and len(content) > MAX_TENSORS:
        raise InputError(f"weights {path} must be one network; got {len(content)} tensors")
    if not isinstance(content, Mapping) or not all(
        _is_name(name) and _is_plain(value) for name, value in content.items()
    ):
        raise InputError(
            f"weights {path} must be a state dict (a flat mapping of names to tensors); save "
            "`model.state_dict()`"
        )
    return dict(content)


def match_state_dict(
    backbone: str, state: Mapping[str, Tensor], path: Path, *, image_size_px: int = IMAGENET_SIZE_PX
) -> Match:
    """Find a backbone's tensors in a state dict, whatever its names begin with.

    Names are torchvision's, or those of its children in ``nn.Sequential`` (``0.weight`` for
    ``conv1.weight``, as in RadImageNet's files), after any prefix (``module.``, ``encoder_q.``).
    Every weight must be there in its shape. Heads and projections are ignored; what looks like a
    further layer of the backbone is not: ResNet-50's names are all in a ResNet-152, too.

    Position embeddings for another number of patches are interpolated bicubically. Half-precision
    files are cast: the network is float32.

    Args:
        backbone: One of ``BACKBONES``.
        state: The file's.
        path: Named in errors.
        image_size_px: Height and width of the images, for ViT-B/16.

    Raises:
        InputError: If anything is missing, foreign, of another shape, or there twice.

    References:
        Mei et al., "RadImageNet", 2022, https://doi.org/10.1148/ryai.210315. Nguyen et al.,
        "LVM-Med", 2023, https://arxiv.org/abs/2306.11925.
    """
    network = _outline(backbone, image_size_px)
    own = network.state_dict()
    head = f"{HEAD_MODULE[backbone]}."
    expected = {name: tensor for name, tensor in own.items() if not name.startswith(head)}
    children = [name for name, _ in network.named_children()]
    layout = _layout_of(state, expected, children, path)
    own_names = {name: layout.own_name(name) for name in state}
    given = {own_name: state[name] for name, own_name in own_names.items() if own_name in expected}
    if POSITIONS in given:
        width = expected[POSITIONS].shape[-1]
        given[POSITIONS] = _resize_positions(given[POSITIONS], width, image_size_px)
    ignored = [name for name in state if own_names[name] not in expected]
    missing = [name for name in expected if name not in given and not name.endswith(COUNTER)]
    tops = {module.split(".")[0] for stage in STAGE_MODULES[backbone] for module in stage}
    wrong = {
        "missing": missing,
        "foreign": [
            name
            for name in ignored
            if not own_names[name].startswith(head)
            and (missing or own_names[name].split(".")[0] in tops)
        ],
        "of another shape": [n for n, tensor in given.items() if tensor.shape != expected[n].shape],
    }
    if any(wrong.values()):
        found = ", ".join(
            f"{len(names)} keys {kind} (first: {min(names)})"
            for kind, names in wrong.items()
            if names
        )
        raise InputError(
            f"weights {path} must be a state dict of torchvision's {backbone}: {found}"
        )
    return Match(
        state={
            name: given.get(name, torch.zeros(tensor.shape)).to(tensor.dtype)
            for name, tensor in expected.items()
        },
        prefix=layout.prefix,
        num_matched=len(given),
        missing=tuple(name for name in own if name not in set(own_names.values())),
        ignored=tuple(sorted(ignored)),
    )


def to_torchvision(backbone: Backbone, head: torch.nn.Linear) -> State:
    """Return the state dict that torchvision's own network with this head would have.

    VGG16's fits the network that ``build_network`` builds: one linear layer, and a mean before it.
    """
    state = {}
    names = list(backbone.torchvision_names())
    for name, tensor in backbone.state_dict().items():
        ours, theirs = next(pair for pair in names if name.startswith(pair[0]))
        state[theirs + name.removeprefix(ours)] = tensor
    for name, tensor in head.state_dict().items():
        state[f"{HEAD_MODULE[backbone.name]}.{name}"] = tensor
    return state


def from_torchvision(backbone: Backbone, state: Mapping[str, Tensor]) -> State:
    """Return the backbone's part of a torchvision state dict under the backbone's own names."""
    ours_of = {theirs: ours for ours, theirs in backbone.torchvision_names()}
    prefixes = tuple(ours_of)
    return {
        ours_of[prefix] + name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }


def filled_backbone(
    backbone: str, match: Match, *, image_size_px: int = IMAGENET_SIZE_PX
) -> Backbone:
    """Build a backbone that holds what was matched, copied.

    Args:
        backbone: The one that ``match`` was made for.
        match: By ``match_state_dict``.
        image_size_px: The one that ``match`` was made for.
    """
    with torch.device("meta"):  # random values would be drawn only to be overwritten
        built = Backbone(backbone, image_size_px=image_size_px)
    built.to_empty(device="cpu")
    built.load_state_dict(from_torchvision(built, match.state))
    return built


def digest_of(module: torch.nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers: names, types, shapes, values."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


@functools.cache
def _outline(backbone: str, image_size_px: int) -> torch.nn.Module:
    """Return torchvision's network as names, types, and shapes, without values. Shared."""
    with torch.device("meta"):
        return build_network(backbone, image_size_px=image_size_px)


@dataclass(frozen=True)
class _Layout:
    """How a file names a network's tensors.

    Attributes:
        prefix: What its names begin with; others are no part of the network.
        child_of: torchvision's names of the numbered children; empty where they have their names.
    """

    prefix: str
    child_of: Mapping[str, str]

    def own_name(self, name: str) -> str:
        """Return torchvision's name of one of the file's names; "" if it is no part of it."""
        if not name.startswith(self.prefix):
            return ""
        name = name.removeprefix(self.prefix)
        if not self.child_of:
            return name
        number, _, rest = name.partition(".")
        return f"{self.child_of[number]}.{rest}" if number in self.child_of else ""


def _layout_of(
    names: Iterable[str], expected: Iterable[str], children: Sequence[str], path: Path
) -> _Layout:
    """Return the layout under which most names are a network's: the plain one if few are.

    Raises:
        InputError: If the file holds the whole network several times.
    """
    weights = {name for name in expected if not name.endswith(COUNTER)}
    numbered = {str(number): child for number, child in enumerate(children)}
    matches: Counter[tuple[str, bool]] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(min(len(parts), MAX_NAME_PARTS)):
            prefix = "".join(f"{part}." for part in parts[:start])
            for is_numbered in (False, True):
                layout = _Layout(prefix, numbered if is_numbered else {})
                matches[prefix, is_numbered] += layout.own_name(name) in weights
    best = [key for key, count in matches.items() if 2 * count > len(weights)]
    whole = sorted(key for key in best if matches[key] == len(weights))
    if len(whole) > 1:
        shown = " and ".join(prefix or "no prefix" for prefix, _ in whole)
        raise InputError(
            f"weights {path} must hold one network; got {len(whole)} of that kind, under {shown}: "
            "save the state dict of one of them"
        )
    prefix, is_numbered = max(best, key=lambda key: matches[key], default=("", False))
    return _Layout(prefix, numbered if is_numbered else {})


def _resize_positions(positions: Tensor, width: int, image_size_px: int) -> Tensor:
    """Return position embeddings for images of a size; what cannot be resized stays as it is."""
    fits = positions.ndim == 3 and len(positions) == 1 and positions.shape[2] == width
    num_patches = positions.shape[1] - 1 if fits else 0
    side = math.isqrt(max(0, num_patches))
    if side**2 != num_patches or not 1 <= side <= MAX_PATCHES_A_SIDE:
        return positions
    state = OrderedDict({POSITIONS: positions.float()})
    resized: Tensor = interpolate_embeddings(image_size_px, PATCH_PX, state)[POSITIONS]
    return resized


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_NAME_CHARACTERS


def _is_plain(value: object) -> bool:
    """Tell whether a value is a tensor with its numbers in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; its type's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
