"""bf16 is taken where that was measured to pay; GPUs are shared by measured memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules import step_cost
from lightning_modules.step_cost import StepCost, choose_precisions, computes_in_bf16, measure_step
from search.space import Choice, Domain, Int
from search.sweep import DataSettings, Sweep
from search.tuning.resources import gpu_share, values_of

CPU = torch.device("cpu")

# A transformer in emulated bfloat16 takes most of a minute.
NEEDS_BF16 = pytest.mark.skipif(not computes_in_bf16(CPU), reason="a CPU without bfloat16")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Steps that take as long as is said here; what was asked for, in order."""
    asked: list[tuple[str, str]] = []
    step_s = {
        ("resnet50", "32-true"): 2.0,
        ("resnet50", "bf16-mixed"): 1.0,
        ("mobilenet_v2", "32-true"): 1.1,
        ("mobilenet_v2", "bf16-mixed"): 1.0,
    }

    def measure(backbone: str, *, precision: str, **_: Any) -> StepCost:
        asked.append((backbone, precision))
        return StepCost(step_s=step_s[backbone, precision], peak_bytes=0)

    monkeypatch.setattr(step_cost, "measure_step", measure)
    monkeypatch.setattr(step_cost, "computes_in_bf16", lambda device: True)
    return asked


def choose(cache_dir: Path, *backbones: str, image_size_px: int = 96) -> dict[str, str]:
    return choose_precisions(
        backbones, image_size_px=image_size_px, device=CPU, cache_dir=cache_dir
    )


def test_bf16_is_taken_where_it_is_clearly_faster(
    measured: list[tuple[str, str]], tmp_path: Path
) -> None:
    chosen = choose(tmp_path, "resnet50", "mobilenet_v2")
    assert chosen == {"resnet50": "bf16-mixed", "mobilenet_v2": "32-true"}  # 2x, and 1.1x


def test_each_backbone_and_size_is_measured_once(
    measured: list[tuple[str, str]], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = choose(cache, "resnet50")
    assert len(measured) == 2
    assert choose(cache, "resnet50") == first
    assert len(measured) == 2
    choose(cache, "resnet50", image_size_px=224)
    assert len(measured) == 4


def test_a_network_that_was_changed_is_measured_anew(
    measured: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(tmp_path, "resnet50")
    monkeypatch.setattr(step_cost, "code_digest_of", lambda *modules: "f" * 64)
    choose(tmp_path, "resnet50")
    assert len(measured) == 4


@pytest.mark.parametrize("content", [b"", b"not json", b"[1]", b"3", b'{"a": 1}'])
def test_a_damaged_cache_is_measured_anew(
    measured: list[tuple[str, str]], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "precisions.json").write_bytes(content)
    assert choose(tmp_path, "resnet50") == {"resnet50": "bf16-mixed"}
    assert len(measured) == 2
    assert "bf16-mixed" in json.loads((tmp_path / "precisions.json").read_bytes()).values()


def test_without_bf16_in_hardware_nothing_is_measured(
    measured: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(step_cost, "computes_in_bf16", lambda device: False)
    assert choose(tmp_path, "resnet50") == {"resnet50": "32-true"}
    assert measured == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "precision"),
    [
        ("mobilenet_v2", "32-true"),
        ("mobilenet_v2", "bf16-mixed"),
        ("vit_b_16", "32-true"),
        pytest.param("vit_b_16", "bf16-mixed", marks=NEEDS_BF16),
        ("vgg16", "32-true"),
    ],
)
def test_a_step_is_measured_on_this_machine(backbone: str, precision: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    cost = measure_step(
        backbone,
        unfreeze_depth=5,
        batch_size=4,
        image_size_px=32,
        precision=precision,
        device=CPU,
    )
    assert cost.step_s > 0
    assert cost.peak_bytes == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_a_deeper_step_takes_more_of_a_gpu(device: str) -> None:
    peaks = [
        measure_step(
            "resnet50",
            unfreeze_depth=depth,
            batch_size=64,
            image_size_px=224,
            precision="bf16-mixed",
            device=torch.device(device),
        ).peak_bytes
        for depth in (0, 5)
    ]
    assert step_cost.CONTEXT_BYTES < peaks[0] < peaks[1]


# Shares of a GPU


@pytest.mark.parametrize(
    ("peaks_gib", "max_trials", "share"),
    [
        ((1, 10), 16, 1 / 5),  # 80 / 15 = 5.3: five of the largest fit
        ((1, 1), 16, 1 / 16),  # 53 fit, but the CPUs are enough for 16
        ((1, 70), 16, 1.0),  # with its margin not even one: it gets all there is
    ],
)
def test_a_share_is_one_in_as_many_of_the_largest_trials_as_fit_with_a_margin(
    peaks_gib: tuple[int, int], max_trials: int, share: float
) -> None:
    gib = 2**30
    assert gpu_share([peak * gib for peak in peaks_gib], 80 * gib, max_trials) == share


def test_what_is_measured_are_the_params_that_trials_may_have() -> None:
    def values(name: str, **space: Domain) -> set[int]:
        data = DataSettings(path="images")
        sweep = Sweep(name="s", storage="s", metric="val_loss", data=data, space=space)
        return values_of(sweep, name)

    assert values("batch_size") == {32}  # the baseline's
    assert values("batch_size", batch_size=Choice(choices=(16, 64))) == {16, 32, 64}
    assert values("unfreeze_depth", unfreeze_depth=Int(low=4, high=5)) == {2, 4, 5}
