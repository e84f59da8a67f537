"""Sections of a model card on what was measured later: on test images, and of explanations."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from search.card.markdown import escape, image, mapping, number, say, table

MAX_ROWS = 200
MAX_FIGURES = 6
_MAX_DEPTH = 8

_TESTS = {
    "tests": "Tests of the maps; of areas under deletion curves lower is better, of insertion "
    "higher",
    "pointing_game": "Pointing game on simulated patients: shares of maxima inside the lesion",
}

Facts = Mapping[str, Any]


def describe_evaluations(folder: Path, evaluations: Sequence[Facts]) -> str:
    """Return every evaluation of a bundle, the repeated ones marked, and its plots."""
    if not evaluations:
        return "## Test results\n\nNone yet: `neurosweep evaluate BUNDLE --data MANIFEST`."
    parts = ["## Test results", "Intervals are 95 %, over resampled groups."]
    for entry in evaluations:
        run = entry.get("run")
        again = "" if run in (None, 1) else f", run {escape(run)} on these images: no first look"
        parts.append(f"### {say(entry, 'date')}, {say(entry, 'as')}{again}")
        parts.append(_figures(entry.get("figures")))
        if external := mapping(entry, "external"):
            parts += ["Images from elsewhere, nothing refitted:", _figures(external.get("figures"))]
    plots = sorted(path.name for path in (folder / "evaluation").glob("*.png") if path.is_file())
    parts += [image(f"evaluation/{name}") for name in plots[:MAX_FIGURES]]
    return "\n\n".join(parts)


def describe_explanation(folder: Path, explanation: Facts) -> str:
    """Return how the maps of an explanation did in their tests, and the first of them."""
    if not explanation:
        return (
            "## Explanations\n\n"
            "None yet: `neurosweep explain BUNDLE IMAGES --out BUNDLE/explanation`."
        )
    parts = [
        "## Explanations",
        "A map shows what changes the network's answer, not that the answer has a medical reason.",
    ]
    verdicts = mapping(explanation, "verdicts")
    parts += [f"- {escape(name)}: {say(verdicts, name)}" for name in list(verdicts)[:MAX_ROWS]]
    for name, title in _TESTS.items():
        if name in explanation:
            parts += [f"{title}:", _figures(explanation[name])]
    overlays = _overlays(folder / "explanation", explanation)
    parts += [image(f"explanation/{name}") for name in overlays[:MAX_FIGURES]]
    return "\n\n".join(parts)


def _figures(found: Any) -> str:
    rows = [row for row, _ in zip(_walk(found, ()), range(MAX_ROWS), strict=False)]
    return table(["figure", "value", "95 % interval"], rows)


def _walk(found: Any, names: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield name, value, and interval of each number below; lists, such as curves, are left out."""
    name = ", ".join(names).replace("_", " ")
    if isinstance(found, int | float):
        yield [name, number(found), ""]
    elif isinstance(found, dict) and "value" in found:
        has_interval = None not in (found.get("low"), found.get("high"))
        between = f"{number(found.get('low'))} to {number(found.get('high'))}"
        yield [name, number(found["value"]), between if has_interval else ""]
    elif isinstance(found, dict) and len(names) < _MAX_DEPTH:
        for key, value in found.items():
            yield from _walk(value, (*names, str(key)))


def _overlays(folder: Path, explanation: Facts) -> list[str]:
    """Return names of overlays that lie in the folder itself."""
    images = explanation.get("images")
    names = [
        str(mapping(mapping(mapping({"": case}, ""), "files"), method).get("overlay"))
        for case in (images if isinstance(images, list) else [])
        for method in mapping(mapping({"": case}, ""), "files")
    ]
    return [name for name in names if name == Path(name).name and (folder / name).is_file()]
