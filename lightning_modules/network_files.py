"""A trained network written in three formats, and what the files compute once read back."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_modules.backbones import build_network
from lightning_modules.bundled_mixture import mixed_logits
from lightning_modules.bundled_network import BundledNetwork
from lightning_modules.classifier import ImageClassifier
from lightning_modules.stages import HEAD_MODULE
from lightning_modules.state_dicts import to_torchvision
from lightning_modules.weights import IMAGENET_MEAN, IMAGENET_STD

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]

# What each classifier counts, and the classifier; one, or several whose probabilities are mixed.
Members = Sequence[tuple[float, ImageClassifier]]

_BATCH_SIZE = 32


class Mixture(nn.Module):
    """Several networks whose probabilities are mixed, as the exported files do it: in float32.

    Args:
        networks: From grey intensities to logits.
        weights: What each counts, summing to 1.
    """

    weights: Tensor

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))

    def forward(self, intensities: Tensor) -> Tensor:
        """Return the logarithms of mixed probabilities ``(B, C)``, which are logits too."""
        logits = [network(intensities) for network in self.networks]
        return mixed_logits(logits, self.weights)


def network_of(members: Members) -> nn.Module:
    """Return one network of one or several classifiers, in eval mode."""
    networks = [BundledNetwork(module.backbone, module.head) for _, module in members]
    if len(networks) == 1:
        return networks[0].eval()
    return Mixture(networks, [weight for weight, _ in members]).eval()


def write_network(members: Members, image_size_px: int, folder: Path) -> None:
    """Write classifiers as ``model.safetensors``, ``model.pt2``, and ``model.onnx``.

    The first holds torchvision's names and no normalisation, of several classifiers each under
    ``members.0.`` and so on. The others take grey intensities ``(B, 1, H, W)``, float32 in [0, 1],
    for any B, and normalise and mix by themselves.

    Args:
        members: On the CPU, in eval mode; their tensors are laid out anew, their values stay.
        image_size_px: Height and width of the images.
        folder: Where to.
    """
    state = {}
    for number, (_, module) in enumerate(members):
        prefix = f"members.{number}." if len(members) > 1 else ""
        for name, tensor in to_torchvision(module.backbone, module.head).items():
            # Trials share their frozen stages' tensors, which a file of tensors may not.
            state[prefix + name] = tensor.contiguous().clone()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    program = write_onnx(network_of(members), image_size_px, folder / "model.onnx")
    with _silent():
        torch.export.save(program, folder / "model.pt2")


def write_onnx(network: nn.Module, image_size_px: int, path: Path) -> torch.export.ExportedProgram:
    """Write a network as one ONNX file; return the program it was made of.

    Args:
        network: From grey intensities to logits, in eval mode; its tensors are laid out anew.
        image_size_px: Height and width of the images.
        path: Where to.
    """
    network = network.to(memory_format=torch.contiguous_format)
    example = torch.zeros(2, 1, image_size_px, image_size_px)
    shapes = {"intensities": {0: torch.export.Dim("batch")}}
    with _silent():
        program = torch.export.export(network, (example,), dynamic_shapes=shapes)
        _forget_source(program.graph_module)
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            input_names=["intensities"],
            output_names=["logits"],
        )
        # By default the weights would go into a second file.
        assert onnx_program is not None  # noqa: S101  it is with dynamo=True; narrows the type
        onnx_program.save(path, external_data=False)
    return program


def module_logits(members: Members, images: Images) -> Logits:
    """Return the classifiers' own logits ``(B, C)`` of uint8 images ``(B, H, W)``."""
    if len(members) == 1:
        return _logits(members[0][1], images)
    return _logits(Mixture([m for _, m in members], [w for w, _ in members]), images)


def pt2_logits(path: Path, images: Images) -> Logits:
    """Return the logits by a ``model.pt2`` that this process has written.

    `torch.export.load` unpickles: it must never be given a file from outside.
    """
    with _silent():
        return _logits(torch.export.load(path).module(), images)


def safetensors_logits(
    path: Path, backbones: Sequence[tuple[float, str]], num_classes: int, images: Images
) -> Logits:
    """Return the logits by torchvision's own networks with the weights of ``model.safetensors``.

    Args:
        path: The file.
        backbones: The weight and the backbone of each member.
        num_classes: Logits.
        images: Shape ``(B, H, W)``, uint8.
    """
    state = safetensors.torch.load_file(path)
    networks = []
    for number, (_, backbone) in enumerate(backbones):
        prefix = f"members.{number}." if len(backbones) > 1 else ""
        own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        network = _Torchvision(backbone, num_classes, images.shape[-1], own).eval()
        networks.append(network.to(memory_format=torch.channels_last))  # twice as fast on a CPU
    if len(networks) == 1:
        return _logits(networks[0], images)
    return _logits(Mixture(networks, [weight for weight, _ in backbones]), images)


class _Torchvision(nn.Module):
    """torchvision's own network, given grey intensities."""

    def __init__(
        self, backbone: str, num_classes: int, image_size_px: int, state: dict[str, Tensor]
    ) -> None:
        super().__init__()
        with torch.device("meta"):  # random values would be drawn only to be overwritten
            self.network = build_network(backbone, image_size_px=image_size_px)
            head = self.network.get_submodule(HEAD_MODULE[backbone])
            assert isinstance(head, nn.Linear)  # noqa: S101  narrows the type; true for all
            own_head = nn.Linear(head.in_features, num_classes)
        self.network.set_submodule(HEAD_MODULE[backbone], own_head)
        self.network.to_empty(device="cpu")
        self.network.load_state_dict(state, strict=True)

    def forward(self, intensities: Tensor) -> Any:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.network((intensities.expand(-1, 3, -1, -1) - mean) / std)


def _logits(run: Callable[[Tensor], Tensor], images: Images) -> Logits:
    batches = torch.from_numpy(images).unsqueeze(1).split(_BATCH_SIZE)
    with torch.inference_mode():
        found = [run(batch.to(torch.float32) / 255) for batch in batches]
    return np.asarray(torch.cat(found).numpy())


def _forget_source(graph_module: torch.fx.GraphModule) -> None:
    """Take out where each operation stands in the source, which names folders of this machine."""
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporters' own deprecations and progress to themselves; parity is checked."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
