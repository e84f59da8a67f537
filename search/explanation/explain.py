"""What a bundle's network looks at, shown and tested: overlays, arrays, figures, a gallery."""

import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_modules.bundle import Bundle, load_bundle
from lightning_modules.bundled_mixture import Bundled
from lightning_modules.data.decode import one_line
from lightning_modules.data.manifest import hashed
from lightning_modules.data.volumes import decode_slices, read_file
from lightning_modules.errors import InputError
from lightning_modules.explain import enlarge, untrained_network
from lightning_modules.rebuilding import load_network
from lightning_modules.seeds import derive_seed
from search.evaluation.data import Progress, read_manifest_or_sweep
from search.explanation.checks import (
    BATCH_SIZE,
    METHODS,
    point_at_phantoms,
    run_tests,
    to_intensities,
)
from search.explanation.gallery import Case, Pixels, choose_cases, draw_overlay, png, write_gallery
from search.explanation.verdict import judge

FORMAT = 1

RESULT_FILE = "explanation.json"
GALLERY_FILE = "gallery.html"


def explain_images(
    bundle: Path,
    images: Sequence[Path | str],
    out: Path,
    *,
    num_each: int = 8,
    num_tests: int = 16,
    num_phantoms: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Explain a bundle's predictions, and test the explanations.

    Of a labelled manifest only validation images are read: test groups are for ``evaluate``.

    Args:
        bundle: A bundle's folder.
        images: Image files; or a sweep's folder, its address as text, or one manifest with splits,
            of whose validation images right, wrong, and uncertain ones are chosen for a gallery.
        out: A new folder, or the bundle's ``explanation``, which is replaced; it appears whole or
            not at all. For every image and method an overlay (PNG) and an array ``(H, W)`` of the
            network's image size (NPY, float32), and what is returned, as ``explanation.json``.
        num_each: Images of each kind in the gallery.
        num_tests: Images that the tests of the maps are run on: the first ones given, or some
            drawn from the manifest; 0 for none.
        num_phantoms: Simulated patients to play the pointing game on; for a bundle that was
            trained on simulated images, which no bundle says of itself.
        seed: Of everything that is drawn.
        progress: Told how far it is.

    Returns:
        What was explained, and how the maps did. No value in it names a folder.

    Raises:
        InputError: If the bundle, an image, or the manifest cannot be used, or ``out`` exists.
    """
    own = bundle / "explanation"
    is_made_anew = out == own and (own / RESULT_FILE).is_file()
    if out.exists() and not is_made_anew and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"explanations go into a new folder; {out} exists: give another")
    tell = progress or (lambda what, done, total: None)
    opened = load_bundle(bundle)
    only = images[0] if len(images) == 1 else Path()
    is_labelled = len(images) == 1 and (
        isinstance(only, str) or only.is_dir() or only.suffix.lower() == ".csv"
    )
    if is_labelled:
        cases, tested = _labelled_cases(opened, only, num_each, num_tests, seed, tell)
    else:
        cases = _cases(opened, [Path(image) for image in images])
        tested = np.array([case.image for case in cases[:num_tests]], np.uint8)
    # After the images: their mistakes should not wait for it.
    network = load_network(bundle)
    backbones = [member.backbone.name for member in network.members]
    result: dict[str, Any] = {
        "format": FORMAT,
        "use": "Research only. Not a medical device.",
        "backbone": opened.config["backbone"],
        "members": backbones,
        "classes": list(opened.classes),
        "model": opened.config["digests"],
        "leakage": opened.config.get("leakage") or {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "explanation"
        folder.mkdir()
        result["images"] = _write_maps(network, opened.classes, cases, folder, tell)
        if is_labelled:
            title = f"{', '.join(dict.fromkeys(backbones))}: cases"
            page = write_gallery(cases, opened.classes, title)
            (folder / GALLERY_FILE).write_text(page, encoding="utf-8")
        if len(tested):
            intensities = to_intensities(tested)
            untrained = untrained_network(
                network, intensities[:BATCH_SIZE], seed=derive_seed("untrained", seed)
            )
            result["tests"] = run_tests(network, untrained, intensities, seed=seed, progress=tell)
        if num_phantoms:
            result["pointing_game"] = point_at_phantoms(
                network, opened.classes, opened.image_size_px, num_phantoms, seed=seed
            )
        result["verdicts"] = {name: judge(result, name) for name in METHODS}
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / RESULT_FILE).write_text(f"{text}\n", encoding="utf-8")
        folder.chmod(0o755)
        if is_made_anew:
            out.rename(Path(temporary) / "earlier")
        elif out.is_dir():
            out.rmdir()
        shutil.move(folder, out)
    return result


def print_explanation(console: Console, explanation: Mapping[str, Any]) -> None:
    """Print how the maps of an explanation did, each figure beside that of knowing nothing.

    Args:
        console: Where to.
        explanation: As of ``explain_images``, or read from its ``explanation.json``.
    """
    console.print(f"{len(explanation['images'])} images explained")
    table = Table("test of the maps", *METHODS, "should be", box=box.SIMPLE_HEAD)
    if tests := explanation.get("tests"):
        for kind, aim in (("deletion", "below random"), ("insertion", "above random")):
            cells = [
                f"{tests[name][kind]['area']:.3f} (random {tests[name][kind]['random_area']:.3f})"
                for name in METHODS
            ]
            table.add_row(f"{kind}, area on {tests['num_images']} images", *cells, aim)
        for module in ("head", "stage 1"):
            found = [tests[name]["weights_forgotten_down_to"][module] for name in METHODS]
            cells = [
                "flat" if values["spearman"] is None else f"{values['spearman']:.2f}"
                for values in found
            ]
            table.add_row(f"correlation, weights forgotten down to {module}", *cells, "near 0")
    if game := explanation.get("pointing_game"):
        cells = [
            f"{game[name]['share']['value']:.3f} "
            f"[{game[name]['share']['low']:.3f}, {game[name]['share']['high']:.3f}] "
            f"(random {game[name]['random_point']:.3f})"
            for name in METHODS
        ]
        table.add_row(f"pointing game, {game['num_images']} phantoms", *cells, "above random")
    if table.row_count:
        console.print(table)
    for name, verdict in explanation.get("verdicts", {}).items():
        console.print(f"{name}: {verdict}", soft_wrap=True)


def _labelled_cases(
    bundle: Bundle, path: Path | str, num_each: int, num_tests: int, seed: int, tell: Progress
) -> tuple[list[Case], Pixels]:
    """Choose what to show of a manifest, and draw what to test on."""
    manifest, name = read_manifest_or_sweep(path), Path(path).name
    if unknown := sorted(set(manifest.classes) - set(bundle.classes)):
        raise InputError(
            f"labels must be the bundle's classes, {', '.join(bundle.classes)}; {name} has "
            f"{', '.join(unknown)}: rename them, or leave their images out"
        )
    frame = manifest.frame[manifest.frame["split"] == "val"]
    if frame.empty:
        # Without splits, any image may be one that the sweep has locked.
        raise InputError(
            f"cases are chosen from validation images; {name} does not say which they are: "
            "give the sweep's folder, such as sweeps/NAME, or image files"
        )
    paths = [manifest.root / name for name in frame["path"]]
    labels = np.array([bundle.classes.index(label) for label in frame["label"]])
    parts = []
    for start in range(0, len(paths), BATCH_SIZE):
        tell("classifying images", start, len(paths))
        parts.append(bundle.predict(_decode(bundle, paths[start : start + BATCH_SIZE])))
    tell("classifying images", len(paths), len(paths))
    probabilities = np.concatenate(parts)
    # Images are decoded again, so that a large manifest does not have to fit into memory.
    cases = [
        Case(
            kind=kind,
            name=_base_name(paths[row]),
            image=_decode(bundle, [paths[row]])[0],
            probabilities=probabilities[row],
            label=int(labels[row]),
            group=hashed(str(frame["group_id"].iloc[row])),
        )
        for kind, rows in choose_cases(probabilities, labels, num_each).items()
        for row in rows
    ]
    drawn = np.random.default_rng(seed).permutation(len(paths))[:num_tests]
    return cases, _decode(bundle, [paths[row] for row in drawn])


def _cases(bundle: Bundle, paths: Sequence[Path]) -> list[Case]:
    images = _decode(bundle, paths)
    return [
        Case(kind="given", name=_base_name(path), image=image, probabilities=probabilities)
        for path, image, probabilities in zip(paths, images, bundle.predict(images), strict=True)
    ]


def _decode(bundle: Bundle, paths: Sequence[Path]) -> Pixels:
    size_px = bundle.image_size_px
    images = np.empty((len(paths), size_px, size_px), np.uint8)
    for image, path in zip(images, paths, strict=True):
        try:
            slices = list(itertools.islice(decode_slices(read_file(path), size_px), 2))
        except FileNotFoundError as error:
            raise InputError(f"an image to explain must exist; there is no {path.name}") from error
        except (OSError, InputError) as error:
            raise InputError(f"{path.name} {one_line(error)}") from error
        if len(slices) != 1:
            raise InputError(
                f"an image to explain is one slice; {path.name} is a volume: export one"
            )
        image[:] = slices[0].pixels
    return images


def _write_maps(
    network: Bundled,
    classes: Sequence[str],
    cases: Sequence[Case],
    folder: Path,
    tell: Progress,
) -> list[dict[str, Any]]:
    """Write every case's maps, keep its overlays for the gallery, and return what to say of it."""
    described = []
    for start in range(0, len(cases), BATCH_SIZE):
        tell("explaining images", start, len(cases))
        batch = cases[start : start + BATCH_SIZE]
        intensities = to_intensities(np.stack([case.image for case in batch]))
        targets = torch.tensor([case.explained for case in batch])
        maps = {
            name: enlarge(method(network, intensities, targets), intensities.shape[-1]).numpy()
            for name, method in METHODS.items()
        }
        for place, case in enumerate(batch):
            stem = re.sub(r"[^\w.-]", "_", Path(case.name).stem)[:80]
            files = {}
            for name, values in maps.items():
                case.overlays[name] = draw_overlay(case.image, values[place])
                file = f"{start + place:04d}-{stem}-{name}"
                (folder / f"{file}.png").write_bytes(png(case.overlays[name]))
                array = io.BytesIO()
                np.save(array, values[place].astype(np.float32), allow_pickle=False)
                (folder / f"{file}.npy").write_bytes(array.getvalue())
                files[name] = {"overlay": f"{file}.png", "array": f"{file}.npy"}
            truth = {} if case.label is None else {"label": classes[case.label]}
            described.append(
                {
                    "kind": case.kind,
                    "image": case.name,
                    **({"group": case.group} if case.group else {}),
                    **truth,
                    "explained_class": classes[case.explained],
                    "probabilities": dict(zip(classes, case.probabilities.tolist(), strict=True)),
                    "files": files,
                }
            )
    tell("explaining images", len(cases), len(cases))
    return described


def _base_name(path: Path) -> str:
    """Return a file's name without its folders, as text that can be written as UTF-8."""
    return path.name.encode("utf-8", "replace").decode()
