"""Where in an image a bundle's network looks: Grad-CAM and Integrated Gradients.

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

import copy
import math
from collections.abc import Sequence

import kornia
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from lightning_modules.backbones import Backbone
from lightning_modules.bundled_mixture import Bundled
from lightning_modules.errors import InputError

# Points on the way, at the nodes of Gauss and Legendre.
NUM_STEPS = 16

# Points in one pass, times images: bounds the memory.
MAX_IMAGES_A_PASS = 64


def untrained_network(network: Bundled, intensities: Tensor, *, seed: int) -> Bundled:
    """Return a network of the same shape with random weights, a function of the seed.

    BatchNorm's statistics are those of some images and their mirror images: as PyTorch starts them,
    activations of MobileNetV2 fade from stage to stage until no pixel makes a difference.

    Args:
        network: Whose shape it has; of a mixture also the share of each member.
        intensities: Shape ``(B, 1, H, W)``, float grey in [0, 1].
        seed: Of the weights, no two members' alike.
    """
    untrained = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for member in untrained.members:
            trained, head = member.backbone, member.head
            backbone = Backbone(trained.name, image_size_px=trained.image_size_px)
            trained.load_state_dict(backbone.state_dict())
            head.load_state_dict(nn.Linear(head.in_features, head.out_features).state_dict())
    for layer in untrained.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all that is seen
            layer.reset_running_stats()
            layer.train()
    with torch.no_grad():
        untrained(torch.cat([intensities, intensities.flip(3)]))
    return untrained.eval()


def grad_cam(network: Bundled, intensities: Tensor, targets: Tensor) -> Tensor:
    """Return Grad-CAM of the last stage: what speaks for a class there and, negative, against it.

    The published method shows the positive part alone; to compare maps the rest is of use, too. For
    a head that is linear in the mean of the last stage's channels it is the class activation map,
    whose cells add up to the logit less its bias.

    A transformer's stages pass tokens on, and the patch tokens of the last one do not reach the
    head. Its Grad-CAM is of what the last stage is given, patch tokens laid out as the patches lie.

    Of a mixture it is the sum of the Grad-CAMs of the mixture's one logit at each member's last
    stage. A member has the share in it that its own answer has in the mixture's: where it does not
    see the class, or is certain of it, the mixture hardly depends on it. So it is not the mean of
    the maps that the members would have alone. Nor do its cells add up to the logit, which is the
    logarithm of a probability: what speaks for another class speaks against this one.

    Args:
        network: In eval mode.
        intensities: Shape ``(B, 1, H, W)``, float grey in [0, 1].
        targets: Shape ``(B,)``, int64: the class to explain of each image.

    Returns:
        Shape ``(B, h, w)``, float: one value a cell of the stage; of a mixture of the stage that
        has the most.

    Raises:
        InputError: If a last stage has neither height and width nor a square of patch tokens.

    References:
        Selvaraju et al., "Grad-CAM", 2017, https://arxiv.org/abs/1610.02391. On the last feature
        map of transformers: Gildenblat et al., pytorch-grad-cam,
        https://github.com/jacobgil/pytorch-grad-cam.
    """
    watched: list[Tensor] = []  # of each member in turn, (B, C, h, w) or tokens (B, 1 + h * w, C)

    def watch(values: Tensor) -> Tensor:
        # A new leaf: what lies below has no part in the gradient, and keeps nothing for it.
        watched.append(values.detach().requires_grad_(True))
        return watched[-1]

    def before(stage: nn.Module, given: tuple[Tensor]) -> tuple[Tensor] | None:
        return (watch(given[0]),) if given[0].ndim == 3 else None

    def after(stage: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor | None:
        return None if given[0].ndim == 3 else watch(output)

    with torch.inference_mode(False), torch.enable_grad():
        stages = [member.backbone.stages[-1] for member in network.members]
        handles = [stage.register_forward_pre_hook(before) for stage in stages]
        handles += [stage.register_forward_hook(after) for stage in stages]
        try:
            logits = network(intensities)
        finally:
            for handle in handles:
                handle.remove()
        for member, values in zip(network.members, watched, strict=True):
            _check_places(values, member.backbone.name)
        explained = logits.gather(1, targets[:, None]).sum()
        gradients = torch.autograd.grad(explained, watched)
    return _sum_of([_grad_cam_of(*pair) for pair in zip(watched, gradients, strict=True)])


def _check_places(values: Tensor, backbone: str) -> None:
    num_patches = values.shape[1] - 1
    is_square = values.ndim == 3 and num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches
    if values.ndim != 4 and not is_square:
        raise InputError(
            "Grad-CAM needs a last stage with height and width, or with one class token and a "
            f"square of patch tokens; {backbone} has {tuple(values.shape[1:])}: use "
            "integrated_gradients"
        )


def _grad_cam_of(values: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum over channels, each weighted with its mean gradient: ``(B, h, w)``."""
    if values.ndim == 3:
        values, gradient = _laid_out(values), _laid_out(gradient)
    return (gradient.mean(dim=(2, 3), keepdim=True) * values.detach()).sum(dim=1)


def _laid_out(tokens: Tensor) -> Tensor:
    """Return patch tokens ``(B, 1 + h * h, C)`` as the patches lie: ``(B, C, h, h)``."""
    patches = tokens[:, 1:].transpose(1, 2)
    side = math.isqrt(patches.shape[2])
    laid_out: Tensor = patches.unflatten(2, (side, side))
    return laid_out


def _sum_of(maps: Sequence[Tensor]) -> Tensor:
    """Add maps ``(B, h, w)`` at the size of the one with the most cells.

    What a cell says is dealt out to the finer cells by the area that they share. So every map keeps
    its sum, and is highest where it was; between cells interpolated it might do neither.
    """
    height, width = max((each.shape[1:] for each in maps), key=math.prod)
    dealt_out = [
        _shares(height, each.shape[1], each) @ each @ _shares(width, each.shape[2], each).T
        for each in maps
    ]
    return torch.stack(dealt_out).sum(dim=0)


def _shares(num_finer: int, num_cells: int, like: Tensor) -> Tensor:
    """Return which share of each cell of a line lies in each finer one: ``(num_finer, num_cells)``.

    The line is ``num_finer * num_cells`` long, so that all cells begin and end at whole numbers.
    """
    finer = torch.arange(num_finer, device=like.device)[:, None] * num_cells
    cells = torch.arange(num_cells, device=like.device) * num_finer
    overlap = torch.minimum(finer + num_cells, cells + num_finer) - torch.maximum(finer, cells)
    return overlap.clamp_min(0).to(like.dtype) / num_finer


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
