"""Compiled stages compute what the others do, and the second trial does not pay for them again."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.backbones import Backbone, freeze_below, pool, run_stages
from lightning_modules.compiled_stages import check_compiler, compiled_pass, num_compiled
from lightning_modules.errors import InputError
from search.config import load_sweep
from search.tuning.resources import check_devices


def test_a_missing_compiler_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    path = tmp_path / "sweep.yaml"
    path.write_text("name: s\ndata: {phantom: {}}\n")
    check_devices(load_sweep(path, {}), None)
    with pytest.raises(InputError) as error:
        check_devices(load_sweep(path, {"training.compile": True}), None)
    assert str(error.value) == (
        "training.compile needs a C++ compiler; no-such-compiler is not found: install it "
        "(Debian: g++), or leave training.compile out"
    )


def train_and_validate(seed: int, compiled_in: Path | None) -> tuple[Tensor, list[Tensor], Tensor]:
    """One step and one look, of another network for each seed.

    Returns:
        The features, the gradients of the last stage, and the features of a smaller batch then.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = Backbone("mobilenet_v2", image_size_px=64).to(memory_format=torch.channels_last)
        images = torch.randn(6, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    freeze_below(list(backbone.stages), 1)
    with torch.no_grad():
        activations = run_stages(backbone.stages[:4], images)
    run = run_stages if compiled_in is None else compiled_pass(compiled_in)
    features = pool(run(list(backbone.stages[4:]), activations))
    features.square().sum().backward()
    gradients = [p.grad for p in backbone.stages[4].parameters() if p.grad is not None]
    backbone.eval()
    with torch.no_grad():
        validated = pool(run(list(backbone.stages[4:]), activations[:3]))
    return features.detach(), gradients, validated


@pytest.mark.slow
def test_compiled_stages_are_the_same_and_are_compiled_for_the_first_trial_alone(
    tmp_path: Path,
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    check_compiler()
    train_and_validate(0, tmp_path)
    num_after_first = num_compiled()
    assert num_after_first == 2, "for training and for validation"
    features, gradients, validated = train_and_validate(1, tmp_path)
    assert num_compiled() == num_after_first
    expected_features, expected_gradients, expected_validated = train_and_validate(1, None)
    torch.testing.assert_close(features, expected_features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(validated, expected_validated, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(expected_gradients) > 0
    # Some are zero but for rounding: before a batch normalisation, say.
    scale = max(float(expected.abs().max()) for expected in expected_gradients)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert float((gradient - expected).abs().max()) <= 1e-5 * scale
    assert any((tmp_path / "compiled").iterdir())
