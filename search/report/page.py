"""One page of HTML with everything in it: it loads nothing, and its policy lets it load nothing."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from search.report import bundle_tables, param_plots, result_plots, search_plots, tables
from search.report.bundles import BundleFindings
from search.report.findings import MIN_COMPARED, Findings
from search.report.importance import best_share, measure_importance
from search.report.svg import Plot, clean
from search.results import verdict
from search.shareable import settings_of

_FOLDER = Path(__file__).parent

# What a backbone costs, as a sweep with two objectives has recorded it.
_COSTS = {
    "latency_ms": "latency of one image on one CPU thread, ms",
    "size_mib": "size of the exported model, MiB",
}


@dataclass(frozen=True, kw_only=True)
class BundleSection:
    """What the page shows of a bundle."""

    name: str
    facts: tables.Table
    headline: tables.Table
    figures: tables.Table
    classes: Sequence[str]
    confusion: Sequence[Sequence[tuple[str, int]]]
    reliability: Sequence[Plot]
    explanation: tables.Table
    overlays: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    """What the page shows of a sweep.

    Attributes:
        anchor: Begins every id of the section.
        importance_note: How trials were compared, or why there is no importance.
        settings: The sweep file that runs it again.
    """

    anchor: str
    name: str
    metric: str
    mode: str
    leakage: Mapping[str, Any]
    is_running: bool
    is_crowded: bool
    verdict: str
    key: Markup
    summary: tables.Table
    space: tables.Table
    search: str
    data: Sequence[tables.Table]
    audit: Sequence[str]
    history: Sequence[Plot]
    curves: Plot
    parallel: Plot
    importance: Plot | None
    importance_note: str
    slices: Sequence[Plot]
    maps: Sequence[Plot]
    map_epoch: int
    costs: Sequence[Plot]
    header: Sequence[str]
    trials: Sequence[tuple[str, Sequence[str]]]
    confirmation: tables.Table | None
    confirmation_plot: Plot | None
    bundles: Sequence[BundleSection]
    settings: str
    command: str
    seeds: tables.Table
    versions: tables.Table
    digests: tables.Table


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the page shows of several sweeps side by side."""

    table: tables.Table
    plots: Sequence[Plot] = field(default_factory=tuple)


def write_page(sweeps: Sequence[Findings], written: str) -> str:
    """Return the page.

    Args:
        sweeps: One, or several on the same images and by the same metric.
        written: When and with what, for its last line.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Names of classes, sources, and bundles are anybody's: no character that cannot be seen.
        finalize=lambda value: value if isinstance(value, Markup) else clean(value),
    )
    style, script = ((_FOLDER / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    sections = [
        _section(findings, f"s{index}" if len(sweeps) > 1 else "s")
        for index, findings in enumerate(sweeps)
    ]
    comparison = None
    if len(sweeps) > 1:
        comparison = Comparison(
            table=tables.describe_difference(sweeps), plots=result_plots.draw_comparison(sweeps)
        )
    return environment.get_template("page.html").render(
        title=" and ".join(findings.sweep.name for findings in sweeps),
        policy=_policy(style, script, has_images=any(_overlays(sections))),
        # Ours, and nothing else: their hashes are the page's policy.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        sections=sections,
        comparison=comparison,
        written=written,
    )


def _policy(style: str, script: str, *, has_images: bool) -> str:
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    images = "; img-src data:" if has_images else ""
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        f"base-uri 'none'; form-action 'none'{images}"
    )


def _overlays(sections: Sequence[SweepSection]) -> Iterator[str]:
    for section in sections:
        for bundle in section.bundles:
            yield from bundle.overlays


def _section(findings: Findings, anchor: str) -> SweepSection:
    sweep, facts, prefix = findings.sweep, findings.facts, f"{anchor}:"
    confirmation = facts.get("confirmation")
    importance, importance_note = _importance(findings)
    first_rung = findings.rungs[0]
    data = "" if sweep.data.phantom is not None else " --data MANIFEST"
    return SweepSection(
        anchor=anchor,
        name=sweep.name,
        metric=sweep.metric,
        mode=sweep.mode,
        leakage=facts.get("leakage") or {},
        is_running=any(trial.state == "running" for trial in findings.trials)
        or len(findings.trials) < sweep.search.num_trials,
        is_crowded=findings.is_crowded,
        verdict=_verdict(findings),
        key=search_plots.draw_key(findings),
        summary=tables.describe_summary(findings),
        space=tables.describe_space(findings),
        search=tables.describe_settings(findings),
        data=tables.describe_data(findings),
        audit=tables.describe_audit(findings),
        history=search_plots.draw_history(findings, prefix),
        curves=search_plots.draw_curves(findings, prefix),
        parallel=param_plots.draw_parallel(findings, prefix),
        importance=importance,
        importance_note=importance_note,
        slices=param_plots.draw_slices(findings, prefix),
        maps=param_plots.draw_map(findings, prefix, first_rung),
        map_epoch=first_rung.epoch,
        costs=_costs(findings, prefix),
        header=tables.trial_header(findings),
        trials=[
            (search_plots.key_of(prefix, number), cells)
            for number, cells in tables.trial_rows(findings)
        ],
        confirmation=None if confirmation is None else tables.describe_confirmation(confirmation),
        confirmation_plot=None
        if confirmation is None
        else result_plots.draw_confirmation(findings, prefix),
        bundles=[_bundle(bundle) for bundle in findings.bundles],
        settings=yaml.safe_dump(settings_of(sweep), sort_keys=False),
        command=f"neurosweep launch sweep.yaml{data} --weights FOLDER",
        seeds=tables.describe_seeds(findings),
        versions=tables.describe_versions(findings),
        digests=tables.describe_digests(findings),
    )


def _verdict(findings: Findings) -> str:
    confirmation = findings.facts.get("confirmation")
    if confirmation is None:
        return (
            f"Not confirmed: trial {findings.best.number} has the best value of "
            f"{len(findings.values)}, each from one training. That value has been selected and is "
            "too good on average; neurosweep confirm trains the best again with fresh seeds."
        )
    # As everywhere on the page: without the zeros that sort folders.
    said = re.sub(r"\btrial 0*(?=\d)", "trial ", verdict(confirmation))
    later = len(findings.trials) - confirmation["num_trials"]
    more = f" {later} trials were run after the confirmation." if later else ""
    return f"{said[0].upper()}{said[1:]}.{more}"


def _importance(findings: Findings) -> tuple[Plot | None, str]:
    """Return the plot of importance at every epoch where enough trials compare, and what it is."""
    compared = [
        rung
        for rung in findings.rungs
        if rung.num_trials >= MIN_COMPARED and len(set(rung.values.values())) > 1
    ]
    if not compared:
        most = max(rung.num_trials for rung in findings.rungs)
        return None, (
            f"Importance needs {MIN_COMPARED} trials that can be compared; at most {most} have "
            "reached the same epoch."
        )
    found = [(rung, measure_importance(findings, rung)) for rung in compared]
    counts = ", ".join(
        f"{rung.num_trials} at epoch {rung.epoch} (the best {best_share(rung.num_trials):.0%} "
        "against all)"
        for rung in compared
    )
    diverged = len(compared[0].diverged)
    failed = f" {diverged} that diverged count as the worst." if diverged else ""
    return param_plots.draw_importance(found), (
        "Values of trials that were stopped early do not compare with those of trials that ran to "
        "the end. So trials are compared at one epoch at a time, each by its best value up to it, "
        f"among those that reached it: {counts}.{failed} The first epoch has all trials and says "
        "what matters early; later ones have only those that early stopping left. PED-ANOVA; bars "
        "are 95 % intervals over resampled trials. A hollow mark means that values shuffled among "
        "the trials tell as much in 5 % of cases or more: not told from chance."
    )


def _costs(findings: Findings, prefix: str) -> list[Plot]:
    drawn = []
    recorded = findings.facts.get("costs") or {}
    for name, title in _COSTS.items() if recorded else ():
        costs = {
            trial.number: recorded[trial.params.backbone][name]
            for trial in findings.trials
            if trial.params.backbone in recorded
        }
        drawn.append(search_plots.draw_pareto(findings, prefix, costs, title))
    title = "mean time of an epoch, s"
    drawn.append(search_plots.draw_pareto(findings, prefix, findings.epoch_s, title))
    return [plot for plot in drawn if plot is not None]


def _bundle(bundle: BundleFindings) -> BundleSection:
    classes, confusion = bundle_tables.confusion_of(bundle)
    internal = bundle.evaluation.get("internal")
    calibration = internal.get("calibration") if isinstance(internal, dict) else None
    return BundleSection(
        name=bundle.name,
        facts=bundle_tables.describe_bundle(bundle),
        headline=bundle_tables.headline_of(bundle),
        figures=bundle_tables.describe_evaluation(bundle),
        classes=classes,
        confusion=confusion,
        reliability=result_plots.draw_reliability(calibration)
        if isinstance(calibration, dict)
        else [],
        explanation=bundle_tables.describe_explanation(bundle),
        overlays=bundle.overlays,
    )
