"""What each command does; each imports what it needs itself: `top` should not wait for torch."""

import argparse
import collections
import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from lightning_modules.errors import InputError
from lightning_modules.strict_yaml import load_yaml
from search.planning.duration import parse_duration
from search.tuning.faults import AlikeFailuresError
from search.watch import PORT, tensorboard_command, tunnel_command

# Said before it is done: it takes seconds.
LOADS = "loads   torch"


def launch(options: argparse.Namespace) -> None:
    """Run a new sweep."""
    _exit(start_sweep(options, dict(_assignment(text) for text in options.set))[1])


def start_sweep(options: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[Any, int]:
    """Run a new sweep; return its record, and what the command exits with.

    Args:
        options: The command's.
        settings: Override those of the sweep file, by dotted key.
    """
    budget_s = None
    if options.budget is not None:
        budget_s = parse_duration(options.budget, "--budget")
        given = settings.keys() & {"search.num_trials", "search.time_budget_s"}
        if given:
            raise InputError(
                f"--budget chooses the number of trials; got {min(given)} too: leave one out"
            )
        settings = {**settings, "search.time_budget_s": budget_s}
    sweep = configured(options, settings)
    _check_export(options.export)

    from search.folder import new_folder

    with new_folder(sweep):
        return _run_to_end(sweep, options, budget_s=budget_s)


def configured(options: argparse.Namespace, settings: Mapping[str, Any]) -> Any:
    """Return the sweep of a file and of the options that override it."""
    from search.config import load_sweep

    overrides = dict(settings)
    if options.name is not None:
        overrides["name"] = options.name
    if options.data is not None:
        overrides["data.path"] = str(Path(options.data).expanduser().resolve())
        overrides["data.phantom"] = None
    if options.weights is not None:
        overrides["weights"] = [
            spec if spec in ("imagenet", "random") else str(Path(spec).expanduser().resolve())
            for spec in options.weights
        ]
    if options.storage is not None:
        overrides["storage"] = options.storage
    if options.skip_bad_images:
        overrides["data.skip_bad_images"] = True
    if options.group_duplicates or options.allow_leakage:
        overrides["data.duplicates"] = "group" if options.group_duplicates else "allow"
    return load_sweep(options.sweep, overrides)


def _exit(code: int) -> None:
    if code:
        sys.exit(code)


def plan(options: argparse.Namespace) -> None:
    """Say what a sweep will take, and run nothing."""
    from search.folder import new_folder

    sweep = configured(options, dict(_assignment(text) for text in options.set))
    # In a folder of its own: the sweep's may be there already.
    sweep = dataclasses.replace(sweep, name=f"{sweep.name[:56]}-plan")
    console = _console()
    address = _cluster(options, console.print)
    with new_folder(sweep):
        from search.data import prepare_data

        with _bar(console) as bar:
            manifest, pack = prepare_data(sweep, _told_by(bar))
        console.print(LOADS)
        from search.planning.words import print_plan
        from search.tuning.tuner import plan_sweep

        found = plan_sweep(
            sweep, manifest, pack, address=address, tell=console.print, wait_s=options.wait_s
        )
    print_plan(console, found)


def resume(options: argparse.Namespace) -> None:
    """Go on with an interrupted sweep."""
    from search.results import open_sweep

    sweep = open_sweep(options.name, options.storage)
    _check_export(options.export)

    from search.folder import lock
    from search.study.record import Record
    from search.trial_table import print_trials

    with lock(sweep):
        record = Record.open(sweep)
        with record.being_written():
            if not record.is_finished():
                _exit(_run_to_end(sweep, options, record)[1])
                return
        console = _console(for_people=not options.json)
        console.print(f"{sweep.name} has ended: there is nothing to go on with", soft_wrap=True)
        print_trials(console, record, num_rows=20)
        if options.json:
            _tell_end(record, elapsed_s=0.0)
        _finish(console, record, options.export)


def _run_to_end(
    sweep: Any, options: argparse.Namespace, record: Any = None, *, budget_s: float | None = None
) -> tuple[Any, int]:
    """Run a new sweep, or go on with one that has a record; return as `start_sweep`."""
    from search.data import prepare_data

    console = _console(for_people=not options.json)
    start_s = time.monotonic()
    address = _cluster(options, console.print)
    with _bar(console) as bar:
        manifest, pack = prepare_data(sweep, _told_by(bar))
    console.print(f"sweep   {sweep.name} in {sweep.location}", soft_wrap=True)
    console.print(f"watch   {tensorboard_command(sweep)}", soft_wrap=True)
    _print_tunnel(console, "        ")

    # After the images: their mistakes should not wait for torch to be imported.
    console.print(LOADS)
    from search.trial_table import print_trials
    from search.tuning import tuner

    again = f"neurosweep resume {sweep.reference}"
    with said_how_to_go_on(console, again, if_there=sweep):
        given: dict[str, Any] = {
            "address": address,
            "tell": console.print,
            "wait_s": options.wait_s,
            "as_json": options.json,
        }
        if record is None:
            record = tuner.launch_sweep(sweep, manifest, pack, budget_s=budget_s, **given)
        else:
            tuner.resume_sweep(record, manifest, pack, **given)
    elapsed_s = time.monotonic() - start_s
    print_trials(console, record, num_rows=20)
    if options.json:
        _tell_end(record, elapsed_s=elapsed_s)
    code = _print_end(console, record, elapsed_s=elapsed_s)
    if not code:
        _finish(console, record, options.export)
    return record, code


def _cluster(options: argparse.Namespace, tell: Callable[[str], None]) -> str | None:
    """Return the address of the cluster to run on, checked; none for this machine."""
    if options.address is None:
        return None
    from search.tuning.address import check_address

    return check_address(options.address, insecure=options.insecure, tell=tell)


def _tell_end(record: Any, *, elapsed_s: float, confirmation: dict[str, Any] | None = None) -> None:
    from search.tuning.events import sweep_ended
    from search.tuning.lines import JsonLines

    event = sweep_ended(record, elapsed_s=elapsed_s, confirmation=confirmation)
    JsonLines(record.sweep.name).show(event)


@contextlib.contextmanager
def said_how_to_go_on(console: Console, command: str, *, if_there: Any) -> Iterator[None]:
    """Say how to go on with trials that were interrupted, or whose code is at fault.

    Args:
        console: For people.
        command: Goes on.
        if_there: The sweep; nothing is said of one that was interrupted before it was launched.
    """
    try:
        yield
    except KeyboardInterrupt:
        if if_there.files.has("sweep.yaml"):
            console.print(f"interrupted; go on with\n  {command}", soft_wrap=True)
        raise
    except AlikeFailuresError as error:
        error.add_note(f"mend the code, then `{command}` runs them again")
        raise


def _bar(console: Console) -> Bar:
    """Return a progress bar; a notebook would need ipywidgets, a file would get a blank line."""
    is_shown = console.is_terminal and not console.is_jupyter
    return Bar(console=console, transient=True, disable=not is_shown)


def _told_by(bar: Bar) -> Callable[[str, int, int], None]:
    task = bar.add_task("", total=None, visible=False)

    def tell(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total, visible=done < total)

    return tell


def audit(options: argparse.Namespace) -> None:
    """Look for what is wrong with images."""
    from search.audit import audit_folder, print_audit, write_audit

    console = _console()
    with _bar(console) as bar:
        manifest, audit = audit_folder(
            options.images, group_pattern=options.group_pattern, progress=_told_by(bar)
        )
    print_audit(console, manifest, audit)
    if options.out is not None:
        write_audit(manifest, audit, options.out)
        console.print(f"written to {options.out}", soft_wrap=True)
    if options.group_duplicates is not None:
        from search.audit import write_grouped

        write_grouped(
            options.images, audit, options.group_duplicates, group_pattern=options.group_pattern
        )
        console.print(
            f"grouped manifest: {options.group_duplicates}; next\n"
            f"  neurosweep launch SWEEP.yaml --data {shlex.quote(str(options.group_duplicates))}",
            soft_wrap=True,
        )
    elif audit.leaks:
        sys.exit(1)


def _finish(console: Console, record: Any, bundle: Path | None) -> None:
    """Say what to type next, and export if that was asked for."""
    sweep = record.sweep
    console.print("next", style="bold")
    console.print(f"  neurosweep top {sweep.reference}", soft_wrap=True)
    console.print(f"  {tensorboard_command(sweep)}", soft_wrap=True)
    _print_tunnel(console, "  ")
    page = shlex.quote(f"{sweep.name}.html")
    console.print(f"  neurosweep report {sweep.reference} --out {page}", soft_wrap=True)
    if "confirmation" not in record.facts:
        console.print(f"  neurosweep confirm {sweep.reference}", soft_wrap=True)
    if bundle is None:
        console.print(f"  neurosweep export {sweep.reference} {sweep.name}-bundle", soft_wrap=True)
    else:
        _write_bundle(console, record, bundle, trial_number=None)


def _print_end(console: Console, record: Any, *, elapsed_s: float) -> int:
    """Say what was run; return what to exit with: not 0 if the sweep did not come to its end."""
    sweep, trials = record.sweep, record.trials()
    run_epochs = sum(len(trial.epochs) for trial in trials)
    possible = sweep.search.num_trials * sweep.training.max_epochs
    console.print(
        f"{len(trials)} trials, {run_epochs} epochs run of {possible} possible, {elapsed_s:.0f} s "
        "with all that came before the first"
    )
    outcomes = collections.Counter(epoch.features for trial in trials for epoch in trial.epochs)
    told = ", ".join(f"{outcome} in {count} epochs" for outcome, count in outcomes.most_common())
    console.print(f"frozen stages: {told}", soft_wrap=True)
    cut_short = len(trials) < sweep.search.num_trials and sweep.search.time_budget_s is None
    if cut_short or any(trial.state == "running" for trial in trials):
        command = f"neurosweep resume {sweep.reference}"
        console.print(f"not every trial has ended; go on with\n  {command}", soft_wrap=True)
        return 1
    if all(trial.state == "failed" for trial in trials):
        print("neurosweep: every trial failed; the table says why", file=sys.stderr)
        return 1
    return 0


def top(options: argparse.Namespace) -> None:
    """Rank a sweep's trials."""
    from search.results import open_sweep
    from search.study.record import Record
    from search.trial_table import print_trials

    record = Record.open(open_sweep(options.name, options.storage))
    console = _console()
    if not (options.pareto or options.plot):
        trials = print_trials(console, record, num_rows=options.num)
        if unfinished := sum(trial.state == "running" for trial in trials):
            console.print(
                f"{unfinished} running, or interrupted; then "
                f"`neurosweep resume {record.sweep.reference}` goes on with them",
                soft_wrap=True,
            )
        return
    from search.pareto import draw_front, print_front

    print_front(console, record)
    if options.plot is not None:
        draw_front(record, options.plot)
        console.print(f"written to {options.plot}", soft_wrap=True)


def report(options: argparse.Namespace) -> None:
    """Write a page on a sweep, or on several of the same images."""
    from search.report.report import write_report
    from search.results import open_sweep
    from search.study.record import Record

    console = _console()
    records = [Record.open(open_sweep(name, options.storage)) for name in options.names]
    if options.images and not options.bundle:
        raise InputError("--images shows overlays of a bundle; got no bundle: give --bundle")
    out = write_report(records, options.out, bundles=options.bundle, with_images=options.images)
    console.print(f"written to {out}, {out.stat().st_size / 1024:.0f} KiB", soft_wrap=True)
    if options.images:
        console.print("it shows images of the data: mind who gets it")


def replay(options: argparse.Namespace) -> None:
    """Run one trial again, and compare."""
    from search.results import open_sweep
    from search.study.record import Record

    record = Record.open(open_sweep(options.name, options.storage))
    console = _console()
    from search.data import prepare_data

    with _bar(console) as bar:
        manifest, pack = prepare_data(record.sweep, _told_by(bar))
    from search.replay import print_replay, replay_trial

    found = replay_trial(record, manifest, pack, number=options.trial, tell=console.print)
    print_replay(console, found)
    _exit(0 if found.is_equal else 1)


def completion(options: argparse.Namespace) -> None:
    """Print what makes a shell complete commands, options, sweeps, and files."""
    from search.completion import script_for

    print(script_for(options.shell))


def confirm(options: argparse.Namespace) -> None:
    """Train the best trials again with fresh seeds."""
    from search.folder import lock
    from search.results import open_sweep
    from search.study.record import Record

    sweep = open_sweep(options.name, options.storage)
    console = _console(for_people=not options.json)
    start_s = time.monotonic()
    with lock(sweep), (record := Record.open(sweep)).being_written():
        address = _cluster(options, console.print)
        from search.data import prepare_data

        with _bar(console) as bar:
            manifest, pack = prepare_data(sweep, _told_by(bar))
        from search.confirm import confirm_sweep, print_confirmation

        command = shlex.join(["neurosweep", *sys.argv[1:]])
        with said_how_to_go_on(console, command, if_there=sweep):
            confirmation = confirm_sweep(
                record,
                manifest,
                pack,
                top=options.top,
                seeds=options.seeds,
                address=address,
                tell=console.print,
                wait_s=options.wait_s,
                as_json=options.json,
            )
    print_confirmation(console, confirmation)
    if options.json:
        _tell_end(record, elapsed_s=time.monotonic() - start_s, confirmation=confirmation)


def export(options: argparse.Namespace) -> None:
    """Write the best checkpoint as a bundle."""
    from search.results import open_sweep
    from search.study.record import Record

    _check_export(options.out)
    record = Record.open(open_sweep(options.name, options.storage))
    _write_bundle(_console(), record, options.out, trial_number=options.trial)


def _write_bundle(console: Console, record: Any, out: Path, *, trial_number: int | None) -> None:
    from search.bundles.export import export_trial

    parity = export_trial(record, out, trial_number=trial_number)
    _print_bundle(console, out, parity)


def _print_bundle(console: Console, out: Path, parity: Any) -> None:
    console.print(
        f"bundle {out}: its files and the module agree on {parity.num_images} images, largest "
        f"difference of a logit {parity.largest_difference:.2e}",
        soft_wrap=True,
    )
    console.print(f"  neurosweep evaluate {shlex.quote(str(out))} --data SWEEP", soft_wrap=True)
    console.print(f"  neurosweep predict {shlex.quote(str(out))} IMAGE...", soft_wrap=True)


def ensemble(options: argparse.Namespace) -> None:
    """Write several trials as one bundle."""
    from search.results import open_sweep
    from search.study.record import Record

    _check_export(options.out)
    single = options.out.with_name(f"{options.out.name}-single")
    if options.evaluate:
        _check_export(single)
    record = Record.open(open_sweep(options.name, options.storage))
    from search.bundles.ensemble import ensemble_sweep

    console = _console()
    found = ensemble_sweep(record, options.out, top=options.top, method=options.method)
    metric = record.sweep.metric
    shares = ", ".join(f"{number:05d} {weight:.2f}" for number, weight in found.weights.items())
    console.print(
        f"{options.method}: {metric} {found.value:.4f} on validation images, where the best trial "
        f"alone has {found.best_single:.4f}; trials and their shares: {shares}",
        soft_wrap=True,
    )
    if found.parity is None:
        print("neurosweep: no better than one trial; nothing was written", file=sys.stderr)
        sys.exit(1)
    _print_bundle(console, options.out, found.parity)
    if options.evaluate:
        _write_bundle(console, record, single, trial_number=found.best_number)
        _evaluate(console, options.out, record.sweep.location, baseline=single)


def evaluate(options: argparse.Namespace) -> None:
    """Score a bundle on its locked test images."""
    _evaluate(
        _console(),
        options.bundle,
        options.data,
        external=options.external,
        baseline=options.baseline,
        out=options.out,
        seed=options.seed,
        num_resamples=options.resamples,
        skip_bad_images=options.skip_bad_images,
    )


def _evaluate(
    console: Console,
    bundle: Path,
    data: Path | str,
    *,
    external: Path | None = None,
    baseline: Path | None = None,
    out: Path | None = None,
    **settings: Any,
) -> None:
    from search.card.model_card import write_card
    from search.evaluation.evaluate import evaluate_bundle
    from search.evaluation.tables import print_evaluation

    with _bar(console) as bar:
        evaluation = evaluate_bundle(
            bundle,
            data,
            external=external,
            baseline=baseline,
            out=out,
            progress=_told_by(bar),
            **settings,
        )
    for evaluated in filter(None, (bundle, baseline)):
        write_card(evaluated)
    print_evaluation(console, evaluation)
    out = out or bundle / "evaluation"
    console.print(f"written to {out}, {bundle / 'README.md'}", soft_wrap=True)


def explain(options: argparse.Namespace) -> None:
    """Show and test what a bundle looks at."""
    from search.card.model_card import write_card
    from search.explanation.explain import RESULT_FILE, explain_images, print_explanation

    console = _console()
    own = options.bundle / "explanation"
    out = options.out or own
    for path in (own, own / RESULT_FILE):
        if path.is_symlink():
            raise InputError(f"a bundle's files are its own; {path} is a link: remove it")
    with _bar(console) as bar:
        explanation = explain_images(
            options.bundle,
            options.images,
            out,
            num_phantoms=options.phantoms,
            progress=_told_by(bar),
        )
    if out != own:
        # The card needs the figures, wherever the maps go.
        own.mkdir(exist_ok=True)
        shutil.copyfile(out / RESULT_FILE, own / RESULT_FILE)
    write_card(options.bundle)
    print_explanation(console, explanation)
    console.print(f"written to {out}", soft_wrap=True)


def doctor(options: argparse.Namespace) -> None:
    """Look whether a sweep can run on this machine, or on a cluster."""
    from search.doctor import examine, print_findings

    console = _console()
    address = _cluster(options, console.print)
    if not print_findings(console, examine(options.storage, address)):
        sys.exit(1)


def predict(options: argparse.Namespace) -> None:
    """Classify images with a bundle."""
    from lightning_modules.bundle import load_bundle
    from search.bundles.predict import predict_files, print_predictions

    bundle = load_bundle(options.bundle)
    predictions = predict_files(bundle, options.images, slice_number=options.slice)
    print_predictions(_console(), bundle, predictions, options.format)


def _console(*, for_people: bool = True) -> Console:
    """Return the terminal; a pipe or a file gets lines that are not wrapped.

    Args:
        for_people: Whether standard output is; if not, people get standard error.
    """
    # No markup: names of files, sources, and tensors may hold brackets.
    console = Console(highlight=False, markup=False, stderr=not for_people)
    if not console.is_terminal:
        console.width = 200
    return console


def _print_tunnel(console: Console, indent: str) -> None:
    tunnel = tunnel_command()
    if tunnel is not None:
        told = f"{tunnel}   # at home, then http://localhost:{PORT}"
        console.print(f"{indent}{told}", soft_wrap=True)


def _check_export(out: Path | None) -> None:
    if out is None:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"a bundle goes into a new folder; {out} exists: give another")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"a bundle goes into a new folder; {above} takes none: give another")


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set must be KEY=VALUE, such as search.num_trials=16; got {text!r}")
    try:
        return key, load_yaml(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--set {key} must be a YAML value; got {value!r}") from error
