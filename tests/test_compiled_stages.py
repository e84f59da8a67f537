"""Compiled stages compute what the others do, and the second trial does not pay for them again."""

import dataclasses
import functools
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.backbones import Backbone, freeze_below, pool, run_stages
from lightning_modules.compiled_stages import check_compiler, compiled_pass, num_compiled
from lightning_modules.errors import InputError
from search.config import load_sweep
from search.tuning.resources import check_devices
from search.tuning.survey import Question, look


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


def train_and_validate(
    seed: int, compiled_in: Path | None, *, depth: int = 1, num_images: int = 6
) -> tuple[Tensor, list[Tensor], Tensor]:
    """One step and one look, of another network for each seed.

    Returns:
        The features, the gradients of the trained stages, and the features of half the batch then.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = Backbone("mobilenet_v2", image_size_px=64).to(memory_format=torch.channels_last)
        images = torch.randn(num_images, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    freeze_below(list(backbone.stages), depth)
    with torch.no_grad():
        activations = run_stages(backbone.stages[: 5 - depth], images)
    run = run_stages if compiled_in is None else compiled_pass(compiled_in)
    trained = list(backbone.stages[5 - depth :])
    features = pool(run(trained, activations))
    features.square().sum().backward()
    gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
    backbone.eval()
    with torch.inference_mode():
        validated = pool(run(trained, activations[: max(1, num_images // 2)]))
    return features.detach(), gradients, validated


def test_a_node_without_a_compiler_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path))
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "driver").write_text("nonce")
    question = Question(
        location=str(tmp_path),
        probe="probe",
        content="nonce",
        images_root=None,
        images=(),
        pack=tmp_path / "none",
        pack_bytes=0,
    )
    assert "code" not in look(question, "node")
    found = look(dataclasses.replace(question, compiles=True), "node")["code"]
    assert found.text == "no compiler"
    assert "no-such-compiler is not found" in found.trouble


@pytest.mark.slow
def test_trials_in_threads_of_their_own_share_more_graphs_than_torch_keeps_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Graphs are counted, not generated.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counts = []

    def run_kinds() -> None:
        for depth in (1, 2):
            for num_images in (32, 16, 8, 4, 1):
                train_and_validate(0, tmp_path, depth=depth, num_images=num_images)
        counts.append(num_compiled())

    compiled_pass.cache_clear()
    torch._dynamo.reset()
    before = num_compiled()
    try:
        for _ in range(3):
            thread = threading.Thread(target=run_kinds)
            thread.start()
            thread.join()
    finally:
        compiled_pass.cache_clear()
        torch._dynamo.reset()
    assert counts[0] - before > 8, "torch compiles no more than 8 by itself"
    assert counts == [counts[0]] * 3, "nothing is compiled again, nor left uncompiled for a while"


@pytest.mark.slow
def test_compiled_stages_are_the_same_and_are_compiled_for_the_first_trial_alone(
    tmp_path: Path,
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    check_compiler()
    train_and_validate(0, tmp_path)
    num_after_first = num_compiled()
    assert num_after_first >= 2, "for training and for validation"
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
