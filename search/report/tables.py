"""Tables of a report: rows of text, ready to be shown."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_modules.data.manifest import SPLITS
from search.card.markdown import mapping, number
from search.planning.span import compare_with_actual
from search.report.findings import Findings, describe_state
from search.report.scales import short, time_unit
from search.shareable import settings_of, weights_of
from search.space import Choice, Domain

SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test, locked"}

_DIGESTS = {"manifest_digest": "manifest, with splits", "pack_digest": "decoded images"}


@dataclass(frozen=True)
class Table:
    """A table; the first column names its rows.

    Attributes:
        header: Of every column.
        rows: Cells as text.
        title: What it holds; may be empty.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


def describe_summary(findings: Findings) -> Table:
    """Return how much was run, and what it came to."""
    sweep, best = findings.sweep, findings.best
    epoch = best.best_epoch(sweep.metric, sweep.mode)
    possible = sweep.search.num_trials * sweep.training.max_epochs
    states = ", ".join(f"{count} {state}" for state, count in findings.states.most_common())
    rows = [
        [
            "Best value of the search",
            f"{sweep.metric} {findings.values[best.number]:.4f}, trial {best.number}, epoch "
            f"{epoch.epoch if epoch else '-'} of {len(best.epochs)}, on validation images",
        ]
    ]
    if 0 in findings.values and best.number != 0:
        difference = findings.values[best.number] - findings.values[0]
        rows.append(
            ["Baseline, trial 0", f"{findings.values[0]:.4f}; the best is {difference:+.4f}"]
        )
    rows += [
        ["Trials", f"{len(findings.trials)} of {sweep.search.num_trials}: {states}"],
        ["Epochs", f"{findings.num_epochs} trained of {possible} without early stopping"],
    ]
    if findings.ended_s:
        rows.append(["Time", f"{_span(max(findings.ended_s.values()))}, pauses included"])
    if compared := compare_with_actual(findings.facts):
        rows.append(["Forecast", compared.removeprefix("forecast ")])
    if devices := _devices(findings):
        rows.append(["Ran on", devices])
    return Table(("", ""), rows)


def describe_space(findings: Findings) -> Table:
    """Return what was searched, and what it came to."""
    sweep, chosen = findings.sweep, findings.trials[findings.chosen]
    rows = [
        [
            name.replace("_", " "),
            _domain(domain),
            _cell(getattr(sweep.params, name)),
            _cell(getattr(chosen.params, name)),
        ]
        for name, domain in sweep.space.items()
    ]
    return Table(("param", "searched", "baseline", f"trial {chosen.number}"), rows)


def describe_settings(findings: Findings) -> str:
    """Return in a sentence or two how it was searched."""
    sweep = findings.sweep
    fixed = ", ".join(
        f"{name.replace('_', ' ')} {_cell(value)}"
        for name, value in dataclasses.asdict(sweep.params).items()
        if name not in sweep.space
    )
    asha = sweep.scheduler
    stopping = (
        "no trial is stopped early"
        if asha is None
        else f"ASHA compares from epoch {asha.grace_period_epochs} on and lets one in "
        f"{asha.reduction_factor} go on"
    )
    return (
        f"Sampler {sweep.search.sampler}, up to {sweep.training.max_epochs} epochs a trial; "
        f"{stopping}. Images are brought to {sweep.data.image_size_px} x "
        f"{sweep.data.image_size_px} px. Fixed for all trials: {fixed}."
    )


def describe_data(findings: Findings) -> list[Table]:
    """Return images and groups of each split, class, and source; none if they are not known."""
    if not findings.data:
        return []
    header = [f"{SPLIT_NAMES[split]}: images (groups)" for split in SPLITS]
    of_class, of_source = findings.data["class"], findings.data["source"]
    return [
        Table(["class", *header], [*_count_rows(of_class), _counts("all", findings.data["all"])]),
        Table(["source", *header], _count_rows(of_source)),
    ]


def describe_audit(findings: Findings) -> list[str]:
    """Return what is known of copies, groups, and images that were left out."""
    facts, settings = findings.facts, findings.sweep.data
    leakage = facts.get("leakage")
    lines = []
    if leakage:
        lines.append(
            f"{leakage.get('pictures')} pictures lie in two splits, {leakage.get('images')} images "
            "in all: every score here flatters."
        )
    elif leakage is not None:
        lines.append(
            "No picture was found in two splits: all images were compared with each other"
            + (", and copies were moved together." if settings.duplicates == "group" else ".")
        )
    else:
        lines.append("Whether copies of pictures lie in two splits was not recorded.")
    if findings.data.get("every_image_is_a_group"):
        lines.append(
            "Every image is a group of its own: slices of one patient may lie in two splits, which "
            "flatters."
        )
    skipped = facts.get("skipped_images") or ()
    lines.append(f"{len(skipped)} images could not be read and were left out.")
    return lines


def trial_header(findings: Findings) -> list[str]:
    """Return the columns of `trial_rows`."""
    searched = [name.replace("_", " ") for name in findings.sweep.space]
    return [
        "trial",
        "state",
        findings.sweep.metric,
        "best epoch",
        "epochs",
        *searched,
        "s an epoch",
    ]


def trial_rows(findings: Findings) -> list[tuple[int, list[str]]]:
    """Return the trials best first: number, and cells."""
    sweep, rows = findings.sweep, []
    for trial in findings.ranked:
        best = trial.best_epoch(sweep.metric, sweep.mode)
        value, epoch_s = findings.values.get(trial.number), findings.epoch_s.get(trial.number)
        rows.append(
            (
                trial.number,
                [
                    str(trial.number),
                    describe_state(trial),
                    "" if value is None else f"{value:.4f}",
                    "" if best is None else str(best.epoch),
                    str(len(trial.epochs)),
                    *(_cell(getattr(trial.params, name)) for name in sweep.space),
                    "" if epoch_s is None else f"{epoch_s:.1f}",
                ],
            )
        )
    return rows


def describe_confirmation(confirmation: Mapping[str, Any]) -> Table:
    """Return the candidates with intervals and differences."""
    rows = [
        [
            f"{row['number']}" + (", baseline" if row["number"] == 0 else ""),
            _interval(row, ""),
            _interval(row, "over_baseline_") if row["number"] else "",
            f"{_interval(row, 'over_rival_')} (trial {row['rival']})",
            f"{row['probability_best']:.0%}",
        ]
        for row in confirmation["candidates"]
    ]
    header = ("trial", "mean", "above the baseline", "above the best other", "best with")
    return Table(header, rows)


def describe_digests(findings: Findings) -> Table:
    """Return what identifies images and initial weights."""
    facts = findings.facts
    rows = [[title, str(facts.get(name, "not recorded"))] for name, title in _DIGESTS.items()]
    for backbone, fact in (facts.get("weights") or {}).items():
        kept = weights_of(fact)
        source = kept.get("path") or kept.get("origin")
        rows.append([f"initial weights of {backbone}, {source}", str(kept.get("digest"))])
    return Table(("SHA-256 of", "digest"), rows)


def describe_versions(findings: Findings) -> Table:
    """Return the packages that ran the sweep."""
    versions = mapping(findings.facts, "versions")
    return Table(
        ("package", "version"), [[name, str(version)] for name, version in versions.items()]
    )


def describe_seeds(findings: Findings) -> Table:
    """Return the seeds that matter: of the sweep, and of the trial that is exported."""
    chosen = findings.trials[findings.chosen]
    rows = [
        ["sweep", str(findings.sweep.seed)],
        [f"trial {chosen.number}, weights and order", str(chosen.seed)],
        [f"trial {chosen.number}, augmented views", str(chosen.view_seed)],
    ]
    return Table(("seed of", "value"), rows)


def describe_difference(sweeps: Sequence[Findings]) -> Table:
    """Return what several sweeps came to, and the settings in which they differ."""
    rows = []
    facts: dict[str, list[str]] = {
        "trials": [f"{len(f.trials)} of {f.sweep.search.num_trials}" for f in sweeps],
        "epochs trained": [str(f.num_epochs) for f in sweeps],
        "time": [_span(max(f.ended_s.values(), default=0.0)) for f in sweeps],
        f"best {sweeps[0].sweep.metric} of the search": [
            f"{f.values[f.best.number]:.4f}, trial {f.best.number}" for f in sweeps
        ],
        "baseline": [number(f.values.get(0)) for f in sweeps],
        "over fresh seeds": [_confirmed(f) for f in sweeps],
    }
    rows += [[name, *cells] for name, cells in facts.items()]
    flat = [dict(_flatten(settings_of(f.sweep), ())) for f in sweeps]
    for key in dict.fromkeys(name for settings in flat for name in settings):
        values = [settings.get(key, "") for settings in flat]
        if key != "name" and len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["", *(f.sweep.name for f in sweeps)], rows)


def _interval(row: Mapping[str, Any], prefix: str) -> str:
    mean, low, high = (row.get(f"{prefix}{name}") for name in ("mean", "low", "high"))
    if mean is None:
        return ""
    sign = "+" if prefix else ""
    return f"{mean:{sign}.4f}" + ("" if low is None else f" [{low:{sign}.4f}, {high:{sign}.4f}]")


def _confirmed(findings: Findings) -> str:
    confirmation = findings.facts.get("confirmation")
    if confirmation is None:
        return "not confirmed"
    first = confirmation["candidates"][0]
    return f"{_interval(first, '')}, trial {first['number']}"


def _count_rows(found: Mapping[str, Any]) -> list[list[str]]:
    return [_counts(name, splits) for name, splits in found.items()]


def _counts(name: str, splits: Mapping[str, Any]) -> list[str]:
    return [name, *(f"{splits[s]['images']:,} ({splits[s]['groups']:,})" for s in SPLITS)]


def _devices(findings: Findings) -> str:
    # Host, device, precision: hosts are nobody's business.
    found = {
        " ".join(epoch.ran_on.split(" ")[1:]) for trial in findings.trials for epoch in trial.epochs
    }
    return "; ".join(sorted(found - {""}))


def _domain(domain: Domain) -> str:
    if isinstance(domain, Choice):
        return ", ".join(map(str, domain.choices))
    is_log = getattr(domain, "log", False)
    return f"{domain.low:g} to {domain.high:g}" + (", evenly over decades" if is_log else "")


def _cell(value: Any) -> str:
    return short(value) if isinstance(value, float) else str(value)


def _span(seconds: float) -> str:
    unit_s, unit = time_unit(seconds)
    return f"{seconds / unit_s:.1f} {unit}"


def _flatten(found: Any, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(found, dict) and found:
        for key, value in found.items():
            yield from _flatten(value, (*names, str(key)))
    else:
        yield ".".join(names), str(found)
