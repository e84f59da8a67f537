"""The backbones there are, and where each is cut: names only, quick to import."""

NUM_STAGES = 5

BACKBONES = ("mobilenet_v2", "resnet50")

# Names of torchvision's modules, a tuple a stage, stem first. A stage ends where the resolution
# halves (MobileNetV2: /2, /4, /8, /16, /32; ResNet-50: its own stem and layers), so a depth means
# the same share of the network's scales in both.
STAGE_MODULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "mobilenet_v2": tuple(
        tuple(f"features.{block}" for block in range(first, last))
        for first, last in ((0, 2), (2, 4), (4, 7), (7, 14), (14, 19))
    ),
    "resnet50": (
        ("conv1", "bn1", "relu", "maxpool"),
        ("layer1",),
        ("layer2",),
        ("layer3",),
        ("layer4",),
    ),
}

# torchvision's name of the last linear layer.
HEAD_MODULE = {"mobilenet_v2": "classifier.1", "resnet50": "fc"}
