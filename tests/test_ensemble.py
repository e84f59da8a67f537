"""An ensemble is a bundle like any other, and written only if it is better than one trial."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.bundle import load_bundle
from lightning_modules.calibration import softmax
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from lightning_modules.explain import grad_cam
from lightning_modules.network_files import Mixture, module_logits
from lightning_modules.rebuilding import load_network
from search.bundles.ensemble import Method, average, ensemble_sweep, scorer
from search.bundles.export import load_trial, write_bundle
from search.cli import main
from search.data import prepare_data
from search.results import open_sweep, rank
from search.study.record import Record


def classifier(seed: int, backbone: str = "mobilenet_v2") -> ImageClassifier:
    return ImageClassifier(
        backbone=backbone, num_classes=3, image_size_px=32, seed=seed, unfreeze_depth=1
    ).eval()


def test_a_mixture_gives_the_logarithm_of_mixed_probabilities() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    inputs = torch.randn(5, 4)
    expected = 0.3 * torch.softmax(first(inputs), 1) + 0.7 * torch.softmax(second(inputs), 1)
    found = Mixture([first, second], [0.3, 0.7])(inputs)
    torch.testing.assert_close(torch.softmax(found, 1), expected)
    torch.testing.assert_close(torch.exp(found), expected)


def test_scores_are_scikit_learns_and_losses_are_turned() -> None:
    labels = np.array([0, 0, 1, 2])
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    # Answers 0 1 1 2: F1 of the classes 2/3, 2/3, 1.
    assert scorer("val_macro_f1", labels, 3)(probabilities) == pytest.approx(7 / 9)
    assert scorer("val_accuracy", labels, 3)(probabilities) == 0.75
    expected = np.log([0.6, 0.2, 0.8, 0.4]).mean()
    assert scorer("val_loss", labels, 3)(probabilities) == pytest.approx(expected)


def test_the_average_of_a_network_and_itself_is_itself() -> None:
    module = classifier(0)
    found = average([module, module])
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(found[name], tensor)


def test_the_average_of_two_heads_is_their_mean() -> None:
    first, second = classifier(0), classifier(1)
    found = average([first, second])
    torch.testing.assert_close(found["head.weight"], (first.head.weight + second.head.weight) / 2)


@pytest.mark.slow
def test_all_files_of_an_ensembles_bundle_hold_the_mixture(
    tmp_path: Path, tiny_data: tuple[Manifest, Pack]
) -> None:
    manifest, pack = tiny_data
    members = [(0.25, classifier(0)), (0.75, classifier(1, "vit_b_16"))]
    config = {
        "format": 2,
        "backbone": "ensemble",
        "classes": list(manifest.classes),
        "input": {"image_size_px": 32},
        "members": [
            {"weight": weight, "params": {"backbone": module.backbone.name}}
            for weight, module in members
        ],
    }
    parity = write_bundle(members, config, tmp_path / "bundle", manifest=manifest, pack=pack)
    assert set(parity.differences) == {"model.onnx", "model.pt2", "model.safetensors"}
    images = np.asarray(pack.images())
    mixed = sum(w * softmax(module_logits([(1.0, m)], images)) for w, m in members)
    logits = load_bundle(tmp_path / "bundle").logits(images)
    np.testing.assert_allclose(softmax(logits), mixed, atol=1e-5)
    # So does what is explained, whose maps have the finer cells: 16 px, where the other has 32.
    network = load_network(tmp_path / "bundle")
    intensities = torch.from_numpy(images[:, None].astype(np.float32) / 255)
    np.testing.assert_allclose(network(intensities).numpy(), logits, atol=1e-4)
    targets = torch.zeros(len(images), dtype=torch.int64)
    assert grad_cam(network, intensities, targets).shape == (len(images), 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "grid", "soup"])
def test_an_ensemble_is_written_only_if_it_is_better_than_one_trial(
    method: Method, tiny_sweeps: Path, tmp_path: Path
) -> None:
    record = Record.open(open_sweep("tiny", tiny_sweeps))
    ensemble = ensemble_sweep(record, tmp_path / "bundle", top=4, method=method)
    if ensemble.parity is None:
        assert ensemble.value <= ensemble.best_single
        assert not (tmp_path / "bundle").exists()
        return
    assert ensemble.value > ensemble.best_single
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    members = config["members"]
    assert sum(member["weight"] for member in members) == pytest.approx(1)
    # What it claims is what its members' checkpoints give, mixed or averaged, by hand.
    manifest, pack = prepare_data(record.sweep)
    rows = manifest.rows("val")
    images = np.asarray(pack.images()[rows])
    modules = [load_trial(record, record.trial(m["number"]), manifest) for m in members]
    if method == "soup":
        modules[0].load_state_dict(average(modules))
        mixed = softmax(module_logits([(1.0, modules[0])], images))
    else:
        parts = [softmax(module_logits([(1.0, module)], images)) for module in modules]
        mixed = sum(m["weight"] * part for m, part in zip(members, parts, strict=True))
    score_of = scorer("val_macro_f1", manifest.labels()[rows], len(manifest.classes))
    assert config["metric"]["value"] == pytest.approx(score_of(mixed))
    assert "Made of these trials" in (tmp_path / "bundle" / "README.md").read_text()


@pytest.mark.slow
def test_a_members_checkpoint_that_was_changed_is_refused(
    tiny_sweeps: Path, tmp_path: Path
) -> None:
    record = Record.open(open_sweep("tiny", tiny_sweeps))
    trials = rank(record.trials(), record.sweep)[:2]
    best = [trial.epochs[-1].best for trial in trials]
    files = [record.sweep.folder / file.path for file in best if file is not None]
    kept = [file.read_bytes() for file in files]
    try:
        for file in files:
            checkpoint = torch.load(file, weights_only=True)
            checkpoint["state_dict"]["head.bias"] += 1
            torch.save(checkpoint, file)
        with pytest.raises(InputError, match="torn or changed"):
            ensemble_sweep(record, tmp_path / "bundle", top=2, method="grid")
    finally:
        for file, data in zip(files, kept, strict=True):
            file.write_bytes(data)


@pytest.mark.slow
def test_an_ensemble_needs_two_trials_with_checkpoints(tiny_sweeps: Path, tmp_path: Path) -> None:
    record = Record.open(open_sweep("tiny", tiny_sweeps))
    for trial in record.trials()[1:]:
        best = trial.epochs[-1].best
        assert best is not None
        (record.sweep.folder / best.path).rename(tmp_path / f"{trial.number}.ckpt")
    try:
        with pytest.raises(InputError, match="needs two trials that kept their checkpoints; 1 of"):
            ensemble_sweep(record, tmp_path / "bundle", top=5, method="greedy")
    finally:
        for trial in record.trials()[1:]:
            best = trial.epochs[-1].best
            assert best is not None
            (tmp_path / f"{trial.number}.ckpt").rename(record.sweep.folder / best.path)


@pytest.mark.slow
def test_an_ensemble_is_scored_once_beside_the_best_trial_alone(
    tiny_sweeps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # By the loss a mixture is better than its parts unless one of them is always surer.
    shutil.copytree(tiny_sweeps / "tiny", tmp_path / "tiny")
    settings = tmp_path / "tiny" / "sweep.yaml"
    settings.write_text(settings.read_text().replace("metric: val_macro_f1", "metric: val_loss"))
    out, single = tmp_path / "mixed", tmp_path / "mixed-single"
    command = ["ensemble", "tiny", str(out), "--storage", str(tmp_path), "--top", "4"]
    main([*command, "--evaluate"])
    logs = [json.loads((folder / "evaluations.json").read_text()) for folder in (out, single)]
    assert [[entry["as"] for entry in log] for log in logs] == [["evaluated"], ["baseline"]]
    config = json.loads((out / "config.json").read_text())
    assert config["search"]["ensemble_top"] == 4
    assert all(member["weights"]["origin"] == "random" for member in config["members"])
    assert "--top 4" in (out / "README.md").read_text()
    assert "above the baseline" in capsys.readouterr().out
    # Whoever exports another bundle and evaluates it has looked before.
    (look,) = json.loads((tmp_path / "tiny" / "evaluations.json").read_text())
    assert look == logs[0][0]
