"""Where in an image a bundle's network looks: Grad-CAM and Integrated Gradients, by captum.

Two methods that err differently. Grad-CAM reads the last stage: one pass, but cells as large as
that stage's (32 px in most backbones, so 4 cells in an image of 64 px), and a gradient says what an
infinitely small change would do. Integrated Gradients adds up gradients at the pixels on the way
from an image that shows nothing to the image: every pixel has a value, they add up to the change of
the logit, and any backbone will do. What shows nothing is a blurred image: with the usual black, a
pixel's value is proportional to its brightness, and a dark lesion gets none. Occlusion in its place
was measured on one MobileNetV2: of the lesions of 240 phantoms of 64 px it pointed at 39 %, for its
patches were larger than these, and Integrated Gradients at 87 %. Whether a map tells anything is
tested in ``attribution_tests``.
"""

import math
from pathlib import Path

import kornia
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam
from torch import Tensor, nn

from lightning_modules.backbones import Backbone
from lightning_modules.bundle import load_bundle
from lightning_modules.bundled_network import BundledNetwork
from lightning_modules.errors import InputError
from lightning_modules.stages import HEAD_MODULE
from lightning_modules.state_dicts import from_torchvision, match_state_dict, read_state_dict

# Points on the way, at the nodes of Gauss and Legendre.
NUM_STEPS = 16

# Points in one pass, times images: bounds the memory.
MAX_IMAGES_A_PASS = 64


def load_network(folder: Path) -> BundledNetwork:
    """Rebuild a bundle's network from its safetensors file, without its sweep.

    Its logits are those of ``model.onnx`` up to rounding.

    Args:
        folder: What ``neurosweep export`` wrote.

    Raises:
        InputError: If the folder is no bundle, a file is not the one that was exported, or the
            weights are not those of the backbone and classes in ``config.json``.
    """
    bundle = load_bundle(folder)
    name = bundle.config.get("backbone")
    if name == "ensemble":
        raise InputError(
            f"explanations are of one network; {folder} holds several: export and explain one of "
            "its trials"
        )
    if not isinstance(name, str) or name not in HEAD_MODULE:
        raise InputError(
            f"config.json of {folder} must name a backbone, one of {', '.join(HEAD_MODULE)}; got "
            f"{name!r:.100}: export it again"
        )
    path = folder / "model.safetensors"
    state, size_px = read_state_dict(path), bundle.image_size_px
    backbone = Backbone(name, image_size_px=size_px)
    matched = match_state_dict(name, state, path, image_size_px=size_px)
    backbone.load_state_dict(from_torchvision(backbone, matched.state))
    prefix = f"{HEAD_MODULE[name]}."
    given = {
        key.removeprefix(prefix): tensor.to(torch.float32)
        for key, tensor in state.items()
        if key.startswith(prefix)
    }
    head = nn.Linear(backbone.num_features, len(bundle.classes))
    shapes = {key: tuple(tensor.shape) for key, tensor in given.items()}
    expected = {key: tuple(tensor.shape) for key, tensor in head.state_dict().items()}
    if shapes != expected:
        raise InputError(
            f"{path} must hold a linear head for {len(bundle.classes)} classes, {expected}; got "
            f"{shapes}: export it again"
        )
    head.load_state_dict(given)
    return BundledNetwork(backbone, head)


def untrained_network(network: BundledNetwork, intensities: Tensor, *, seed: int) -> BundledNetwork:
    """Return a network of the same shape with random weights, a function of the seed.

    BatchNorm's statistics are those of some images and their mirror images: as PyTorch starts them,
    activations of MobileNetV2 fade from stage to stage until no pixel makes a difference.

    Args:
        network: Whose shape it has.
        intensities: Shape ``(B, 1, H, W)``, float grey in [0, 1].
        seed: Of the weights.
    """
    trained = network.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Backbone(trained.name, image_size_px=trained.image_size_px)
        head = nn.Linear(network.head.in_features, network.head.out_features)
    untrained = BundledNetwork(backbone, head)
    layers = [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None  # the mean over all that is seen
        layer.reset_running_stats()
        layer.train()
    with torch.no_grad():
        untrained(torch.cat([intensities, intensities.flip(3)]))
    return untrained.eval()


def grad_cam(network: BundledNetwork, intensities: Tensor, targets: Tensor) -> Tensor:
    """Return Grad-CAM of the last stage: what speaks for a class there and, negative, against it.

    The published method shows the positive part alone; to compare maps the rest is of use, too. For
    a head that is linear in the mean of the last stage's channels it is the class activation map,
    whose cells add up to the logit less its bias.

    A transformer's stages pass tokens on, and the patch tokens of the last one do not reach the
    head. Its Grad-CAM is of what the last stage is given, patch tokens laid out as the patches lie.

    Args:
        network: In eval mode.
        intensities: Shape ``(B, 1, H, W)``, float grey in [0, 1].
        targets: Shape ``(B,)``, int64: the class to explain of each image.

    Returns:
        Shape ``(B, h, w)``, float: one value a cell of the stage.

    Raises:
        InputError: If the last stage has neither height and width nor a square of patch tokens.

    References:
        Selvaraju et al., "Grad-CAM", 2017, https://arxiv.org/abs/1610.02391. On the last feature
        map of transformers: Gildenblat et al., pytorch-grad-cam,
        https://github.com/jacobgil/pytorch-grad-cam.
    """
    last_stage = network.backbone.stages[-1]
    # Parameters are frozen: without this there would be no gradient anywhere.
    inputs = intensities.detach().requires_grad_(True)
    with torch.inference_mode(False), torch.enable_grad():
        if _passes_tokens(network, intensities[:1]):
            layout = _TokenLayout()
            handle = last_stage.register_forward_pre_hook(lambda _, given: (layout(given[0]),))
            try:
                maps = _grad_cam_of(network, layout.map, inputs, targets)
            finally:
                handle.remove()
        else:
            maps = _grad_cam_of(network, last_stage, inputs, targets)
    return maps[:, 0].detach()


def _grad_cam_of(network: nn.Module, layer: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    maps: Tensor = LayerGradCam(network, layer).attribute(inputs, target=targets)
    return maps


def _passes_tokens(network: BundledNetwork, intensities: Tensor) -> bool:
    """Tell whether stages pass tokens ``(B, N, D)`` on, by what the last one returns."""
    shapes: list[tuple[int, ...]] = []
    handle = network.backbone.stages[-1].register_forward_hook(
        lambda _, __, output: shapes.append(tuple(output.shape))
    )
    try:
        with torch.no_grad():
            network(intensities)
    finally:
        handle.remove()
    (shape,) = shapes
    side = math.isqrt(max(0, shape[1] - 1))
    if len(shape) == 3 and side * side == shape[1] - 1:
        return True
    if len(shape) != 4:
        raise InputError(
            "Grad-CAM needs a last stage with height and width, or with one class token and a "
            f"square of patch tokens; {network.backbone.name} has {shape[1:]}: use "
            "integrated_gradients"
        )
    return False


class _TokenLayout(nn.Module):
    """Passes tokens through unchanged, by way of a map ``(B, D, h, w)`` that captum can watch."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        class_token, patches = tokens[:, :1], tokens[:, 1:]
        side = math.isqrt(patches.shape[1])
        laid_out = self.map(patches.transpose(1, 2).unflatten(2, (side, side)))
        return torch.cat([class_token, laid_out.flatten(2).transpose(1, 2)], dim=1)


def integrated_gradients(network: nn.Module, intensities: Tensor, targets: Tensor) -> Tensor:
    """Return what each pixel, for not being the blurred image's, adds to a class's logit.

    All pixels together are the logit of the image less that of ``hide`` of it, but for the error of
    adding up 16 points: a tenth of it in the median, measured on phantoms. Neighbouring pixels may
    differ much and in sign.

    Args:
        network: From intensities to logits, in eval mode.
        intensities: Shape ``(B, 1, H, W)``, float grey in [0, 1].
        targets: Shape ``(B,)``, int64: the class to explain of each image.

    Returns:
        Shape ``(B, H, W)``, float; negative where the pixel speaks against the class.

    References:
        Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017,
        https://arxiv.org/abs/1703.01365. On baselines: Sturmfels et al., "Visualizing the Impact
        of Feature Attribution Baselines", 2020, https://doi.org/10.23915/distill.00022.
    """
    with torch.inference_mode(False), torch.enable_grad():
        found: Tensor = IntegratedGradients(network).attribute(
            intensities.detach().clone(),
            baselines=hide(intensities).clone(),
            target=targets,
            n_steps=NUM_STEPS,
            internal_batch_size=max(len(intensities), MAX_IMAGES_A_PASS),
        )
    return found[:, 0].detach()


def hide(intensities: Tensor) -> Tensor:
    """Return images in which nothing smaller than an eighth of the side can be made out.

    It takes the content away and leaves brightness, so that there is neither a hole nor a new edge
    to react to. A large lesion stays as a faint glow.

    Args:
        intensities: Shape ``(B, 1, H, H)``, float grey in [0, 1].

    References:
        Fong and Vedaldi, "Interpretable Explanations of Black Boxes by Meaningful Perturbation",
        2017, https://arxiv.org/abs/1704.03296, compare blur, noise, and a constant.
    """
    sigma_px = intensities.shape[-1] / 8
    kernel_px = 2 * math.floor(1.9 * sigma_px) + 1
    blurred: Tensor = kornia.filters.gaussian_blur2d(
        intensities, (kernel_px, kernel_px), (sigma_px, sigma_px), border_type="reflect"
    )
    return blurred


def enlarge(maps: Tensor, image_size_px: int) -> Tensor:
    """Return maps ``(B, h, w)`` at the size of the image, between their cells linearly."""
    size = (image_size_px, image_size_px)
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
