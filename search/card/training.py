"""Sections of a model card on how a network came about: data, search, selection, calibration."""

from collections.abc import Mapping
from typing import Any

from lightning_modules.data.manifest import SPLITS
from search.card.checklists import TO_FILL
from search.card.markdown import escape, mapping, number, say, table

SPLIT_NAMES = {"train": "train", "val": "validation (tuning)", "test": "test (locked)"}

_DIGESTS = {
    "manifest_digest": "manifest (path, label, group, source, split)",
    "split_digest": "splits (path, split)",
    "pack_digest": "images (contents, in order)",
}

_WEIGHTS = {
    "origin": "origin",
    "path": "file",
    "digest": "SHA-256 of the tensors",
    "seed": "seed of random weights",
    "num_matched": "tensors taken",
    "num_ignored": "names ignored",
    "provenance": "provenance, as stated",
    "licence": "licence",
}

_BY_GROUP = "No group (the patient, or the nearest to it that is known) lies in two splits."
_BY_IMAGE = (
    "Splits are disjoint by image only: every image is a group of its own, so that slices of one "
    "patient may lie in two splits, which flatters."
)

Facts = Mapping[str, Any]


def describe_data(data: Facts) -> str:
    """Return counts of images and groups of each split, class, and source, and digests."""
    images, groups = mapping(data, "images"), mapping(data, "groups")
    splits = [[SPLIT_NAMES[s], images.get(s, TO_FILL), groups.get(s, TO_FILL)] for s in SPLITS]
    by_source = mapping(data, "classes_by_source")
    sources = sorted({source for label in by_source for source in mapping(by_source, label)})
    crossed = [
        [label, *(mapping(by_source, label).get(source, 0) for source in sources)]
        for label in by_source
    ]
    of_one = [label for label in by_source if len(mapping(by_source, label)) == 1]
    confounded = (
        f"\n\nOf one source only: {', '.join(map(escape, of_one))}. What tells that source from "
        "others may be what the network has learnt."
    )
    digests = [[title, data.get(name, TO_FILL)] for name, title in _DIGESTS.items()]
    return f"""## Data

{table(["split", "images", "groups"], splits)}

{_BY_IMAGE if data.get("every_image_is_a_group") else _BY_GROUP}
Images left out because they could not be read: {say(data, "skipped_images")}.

Images (groups) of each class:

{_count("class", mapping(data, "classes"))}

Images (groups) of each source:

{_count("source", mapping(data, "sources"))}

Images of each class by source, all splits:

{table(["class", *sources], crossed)}{confounded if of_one else ""}

{table(["SHA-256 of", "digest"], digests)}

Origin, licence, reference standard, and demographics of the images: {TO_FILL}."""


def describe_search(config: Facts) -> str:
    """Return what was searched, how much of it, and how the trial was selected."""
    search, trial = mapping(config, "search"), mapping(config, "trial")
    space, params = mapping(search, "space"), mapping(trial, "params")
    searched = [[name, _domain(mapping(space, name)), params.get(name, TO_FILL)] for name in space]
    fixed = [[name, value] for name, value in params.items() if name not in space]
    states = ", ".join(
        f"{escape(count)} {state}" for state, count in mapping(search, "states").items()
    )
    asha = mapping(search, "scheduler")
    stopped = (
        f"ASHA, from epoch {say(asha, 'grace_period_epochs')} on, lets one in "
        f"{say(asha, 'reduction_factor')} go on"
    )
    metric = say(mapping(config, "metric"), "name")
    confirmation = mapping(search, "confirmation")
    rule = {
        "best": f"the best {metric} on validation images, each trial at its own best epoch",
        "confirmed": f"the best mean {metric} on validation images over "
        f"{say(confirmation, 'num_seeds')} fresh seeds, among the best trials of the search",
        "greedy": f"probabilities of several trials, mixed as is best for {metric} on validation "
        "images, chosen one by one with replacement (Caruana et al. 2004)",
        "grid": f"probabilities of several trials, mixed as is best for {metric} on validation "
        "images, of all shares on a grid",
        "soup": f"the mean weights of several trials, each taken in only if {metric} on validation "
        "images rose (Wortsman et al. 2022)",
    }.get(str(search.get("chosen")), f"by hand, trial {say(trial, 'number')}; others may be better")
    return f"""## Search

{table(["param", "searched", "this trial"], searched)}

{table(["param", "fixed at"], fixed)}

- Trials run: **{say(search, "num_trials")}** ({states}), {say(search, "num_epochs")} epochs in all
- Longest a trial may run: {say(search, "max_epochs")} epochs
- Sampler: {say(search, "sampler")}
- Scheduler: {stopped if asha else "none"}
- Seeds: {say(search, "seed")} of the sweep, {say(trial, "seed")} of this trial
- Baseline: trial 0, whose params no search has chosen

**Selection rule:** {rule}.{_members(config)}{_confirmed(confirmation)}"""


def describe_validation(config: Facts) -> str:
    """Return what the best epoch reported on validation images."""
    metric, trial = mapping(config, "metric"), mapping(config, "trial")
    scores = mapping(metric, "all")
    rows = [[name, number(scores[name])] for name in scores if name.startswith(("val_", "train_"))]
    confusion, classes = metric.get("confusion"), config["classes"]
    crossed = ""
    if isinstance(confusion, list) and len(confusion) == len(classes):
        lines = [
            [label, *(counts if isinstance(counts, list) else [])]
            for label, counts in zip(classes, confusion, strict=True)
        ]
        crossed = "\n\nImages, true classes down, predicted across:\n\n"
        crossed += table(["", *classes], lines)
    return f"""## Validation results

Epoch {say(trial, "epoch")} of {say(trial, "epochs_run")} run. These images have chosen the epoch
and the trial: the figures are too high, and the more trials, the more.

{table(["metric", "value"], rows)}{crossed}"""


def describe_calibration(config: Facts) -> str:
    """Return the temperature, and what it did to the images that it was fitted on."""
    found = mapping(config, "calibration")
    before, after = number(found.get("nll_before")), number(found.get("nll_after"))
    return f"""## Calibration

Logits are divided by the temperature **{config["temperature"]:.4g}** before they become
probabilities (Guo et al. 2017, https://arxiv.org/abs/1706.04599). It was fitted on
{say(found, "num_images")} validation images, whose mean negative log-likelihood it took
from {before} to {after}. It holds for images like these only."""


def describe_weights(weights: Facts) -> str:
    """Return where the initial weights came from."""
    rows = [[title, weights[name]] for name, title in _WEIGHTS.items() if weights.get(name)]
    if weights.get("origin") != "random":
        stated = ("provenance", "licence")
        rows += [[_WEIGHTS[name], TO_FILL] for name in stated if not weights.get(name)]
    return f"""## Initial weights

{table(["", ""], rows)}

Whether test images were among those that they were trained on: {TO_FILL}."""


def _members(config: Facts) -> str:
    """Return which trials an ensemble is of; params above are the best one's."""
    found = config.get("members")
    members = [mapping({"": member}, "") for member in (found if isinstance(found, list) else ())]
    if not members:
        return ""
    rows = []
    for member in members:
        params = mapping(member, "params")
        rows.append(
            [
                member.get("number"),
                number(member.get("weight")),
                *(params.get(name) for name in ("backbone", "unfreeze_depth", "lr", "dropout")),
                mapping(member, "weights").get("origin"),
            ]
        )
    header = ("trial", "share", "backbone", "unfreeze depth", "lr", "dropout", "initial weights")
    return (
        f"\n\nMade of these trials; the params above are the best one's:\n\n{table(header, rows)}"
    )


def _confirmed(confirmation: Facts) -> str:
    """Return what the best trials reached when trained again; the bundle is the first training."""
    rows = []
    candidates = confirmation.get("candidates")
    for candidate in candidates if isinstance(candidates, list) else ():
        of = mapping({"": candidate}, "")
        means = [
            f"{number(of.get(f'{kind}mean'))} ({number(of.get(f'{kind}low'))} to "
            f"{number(of.get(f'{kind}high'))})"
            for kind in ("", "over_baseline_", "over_rival_")
        ]
        rows.append([of.get("number"), *means, number(of.get("probability_best"))])
    if not rows:
        return ""
    header = ("trial", "mean", "above baseline", "above the best other", "probability of best")
    return (
        f"\n\nThe best trials again, each with {say(confirmation, 'num_seeds')} fresh seeds; 95 % "
        f"intervals; the bundle holds the search's own training:\n\n{table(header, rows)}"
    )


def _count(kind: str, found: Facts) -> str:
    rows = []
    for name in found:
        parts = [mapping(mapping(found, name), split) for split in SPLITS]
        cells = [f"{part.get('images', TO_FILL)} ({part.get('groups', TO_FILL)})" for part in parts]
        rows.append([name, *cells])
    return table([kind, *SPLIT_NAMES.values()], rows)


def _domain(domain: Facts) -> str:
    if isinstance(domain.get("choices"), list):
        return ", ".join(map(str, domain["choices"]))
    return f"{domain.get('low')} to {domain.get('high')}{', log' if domain.get('log') else ''}"
