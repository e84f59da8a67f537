"""The command line: what the user types, and what is printed back."""

import argparse
import collections
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from lightning_modules.errors import InputError

DESCRIPTION = "Hyperparameter search for transfer learning on brain MRI."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit 0 if it succeeded, 2 after a mistake of the user, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    # Pillow would warn of an image beside the one line that refuses it.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        options.run(options)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that is not permitted
        if options.debug:
            raise
        print(f"neurosweep: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("neurosweep: interrupted", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neurosweep", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    audit = _command(commands, "audit", _audit, "look for what is wrong with images")
    audit.add_argument("images", type=Path, metavar="FOLDER|MANIFEST")
    audit.add_argument("--out", type=Path, metavar="DIR", help="write audit.json and pictures here")
    audit.add_argument(
        "--group-pattern", metavar="REGEX", help="its first group, found in a path, is the patient"
    )
    audit.add_argument(
        "--group-duplicates",
        type=Path,
        metavar="MANIFEST.csv",
        help="write a manifest here, beside the images, in which copies are of one group",
    )

    launch = _command(commands, "launch", _launch, "run a sweep")
    launch.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    launch.add_argument("--data", metavar="PATH", help="manifest CSV, or folder of class folders")
    launch.add_argument(
        "--weights",
        action="append",
        metavar="SPEC",
        help="imagenet, random, a state dict, or a folder of them; repeat to try several in order",
    )
    launch.add_argument("--name", help="instead of the sweep file's name")
    launch.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting of the sweep file, such as search.num_trials=16",
    )
    launch.add_argument("--storage", type=Path, metavar="DIR", help="where sweeps are (sweeps/)")
    launch.add_argument(
        "--skip-bad-images", action="store_true", help="go on without unreadable images"
    )
    copies = launch.add_mutually_exclusive_group()
    copies.add_argument(
        "--group-duplicates", action="store_true", help="move images of one picture into one split"
    )
    copies.add_argument(
        "--allow-leakage", action="store_true", help="launch with copies in two splits"
    )
    _run_options(launch)

    resume = _command(commands, "resume", _resume, "go on with an interrupted sweep")
    _sweep_options(resume)
    _run_options(resume)

    top = _command(commands, "top", _top, "rank a sweep's trials, also while it runs")
    _sweep_options(top)
    top.add_argument("--num", type=_positive, default=20, metavar="N", help="rows to print (20)")

    export = _command(commands, "export", _export, "write the best checkpoint as a bundle")
    _sweep_options(export)
    export.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    export.add_argument("--trial", type=int, metavar="NUMBER", help="instead of the best one")

    predict = _command(commands, "predict", _predict, "classify images with a bundle")
    predict.add_argument("bundle", type=Path, metavar="BUNDLE")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="SWEEP", help="a sweep's name, or its folder")
    parser.add_argument(
        "--storage", type=Path, default=Path("sweeps"), metavar="DIR", help="where sweeps are"
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="a running Ray cluster; one is started here if not given")
    parser.add_argument("--export", type=Path, metavar="DIR", help="export the best at the end")


# Commands import what they need themselves: `top` should not wait for torch.


def _launch(options: argparse.Namespace) -> None:
    from search.config import load_sweep

    overrides: dict[str, Any] = dict(_assignment(text) for text in options.set)
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
        overrides["storage"] = str(options.storage)
    if options.skip_bad_images:
        overrides["data.skip_bad_images"] = True
    if options.group_duplicates or options.allow_leakage:
        overrides["data.duplicates"] = "group" if options.group_duplicates else "allow"
    sweep = load_sweep(options.sweep, overrides)
    _check_export(options.export)

    from search.folder import new_folder

    with new_folder(sweep):
        _run_to_end(sweep, options, is_new=True)


def _resume(options: argparse.Namespace) -> None:
    from search.results import open_sweep

    sweep = open_sweep(options.name, options.storage)
    _check_export(options.export)

    from search.folder import lock
    from search.record import Record

    with lock(sweep):
        record = Record.open(sweep)
        if record.is_finished():
            _print_table(_console(), record, num_rows=20)
            _finish(_console(), record, options.export)
        else:
            _run_to_end(sweep, options, is_new=False)


def _run_to_end(sweep: Any, options: argparse.Namespace, *, is_new: bool) -> None:
    from search.data import prepare_data

    console = _console()
    start_s = time.monotonic()
    with Bar(console=console, transient=True) as bar:
        manifest, pack = prepare_data(sweep, _told_by(bar))
    console.print(f"sweep   {sweep.name} in {sweep.folder}", soft_wrap=True)
    console.print(f"watch   {_tensorboard(sweep)}", soft_wrap=True)

    # After the images: their mistakes should not wait for torch to be imported.
    from search import tuner

    run = tuner.launch_sweep if is_new else tuner.resume_sweep
    record = run(sweep, manifest, pack, address=options.address, tell=console.print)
    _print_table(console, record, num_rows=20)
    _print_end(console, record, elapsed_s=time.monotonic() - start_s)
    _finish(console, record, options.export)


def _told_by(bar: Bar) -> Callable[[str, int, int], None]:
    task = bar.add_task("", total=None, visible=False)

    def tell(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total, visible=done < total)

    return tell


def _audit(options: argparse.Namespace) -> None:
    from search.audit import audit_folder, print_audit, write_audit

    console = _console()
    with Bar(console=console, transient=True) as bar:
        manifest, audit = audit_folder(
            options.images, group_pattern=options.group_pattern, progress=_told_by(bar)
        )
    print_audit(console, manifest, audit)
    if options.out is not None:
        write_audit(manifest, audit, options.out)
        console.print(f"written to {options.out}", soft_wrap=True)
    if options.group_duplicates is not None:
        from search.audit import write_grouped

        write_grouped(manifest, audit, options.group_duplicates)
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
    console.print(f"  {_tensorboard(sweep)}", soft_wrap=True)
    if bundle is None:
        console.print(f"  neurosweep export {sweep.reference} {sweep.name}-bundle", soft_wrap=True)
    else:
        _write_bundle(console, record, bundle, trial_number=None)


def _print_end(console: Console, record: Any, *, elapsed_s: float) -> None:
    """Say what was run; exit if the sweep did not come to its end."""
    sweep, trials = record.sweep, record.trials()
    run_epochs = sum(len(trial.epochs) for trial in trials)
    possible = sweep.search.num_trials * sweep.training.max_epochs
    console.print(
        f"{len(trials)} trials, {run_epochs} epochs run of {possible} possible, {elapsed_s:.0f} s"
    )
    outcomes = collections.Counter(epoch.features for trial in trials for epoch in trial.epochs)
    told = ", ".join(f"{outcome} in {count} epochs" for outcome, count in outcomes.most_common())
    console.print(f"frozen stages: {told}", soft_wrap=True)
    cut_short = len(trials) < sweep.search.num_trials and sweep.search.time_budget_s is None
    if cut_short or any(trial.state == "running" for trial in trials):
        console.print(f"interrupted; go on with\n  neurosweep resume {sweep.reference}")
        sys.exit(130)
    if all(trial.state == "failed" for trial in trials):
        print("neurosweep: every trial failed; the table says why", file=sys.stderr)
        sys.exit(1)


def _top(options: argparse.Namespace) -> None:
    from search.record import Record
    from search.results import open_sweep

    record = Record.open(open_sweep(options.name, options.storage))
    _print_table(_console(), record, num_rows=options.num)


def _export(options: argparse.Namespace) -> None:
    from search.record import Record
    from search.results import open_sweep

    _check_export(options.out)
    record = Record.open(open_sweep(options.name, options.storage))
    _write_bundle(_console(), record, options.out, trial_number=options.trial)


def _write_bundle(console: Console, record: Any, out: Path, *, trial_number: int | None) -> None:
    from search.export import export_trial

    parity = export_trial(record, out, trial_number=trial_number)
    console.print(
        f"bundle {out}: ONNX and module agree on {parity.num_images} validation images, largest "
        f"difference of a logit {parity.largest_difference:.2e}",
        soft_wrap=True,
    )
    console.print(f"  neurosweep predict {shlex.quote(str(out))} IMAGE...", soft_wrap=True)


def _predict(options: argparse.Namespace) -> None:
    from lightning_modules.bundle import load_bundle

    bundle = load_bundle(options.bundle)
    console = _console()
    table = Table("image", "class", "probability", box=box.SIMPLE_HEAD)
    for path, probabilities in zip(options.images, bundle.predict(options.images), strict=True):
        best = int(probabilities.argmax())
        table.add_row(str(path), bundle.classes[best], f"{probabilities[best]:.3f}")
    console.print(table)


def _print_table(console: Console, record: Any, *, num_rows: int) -> None:
    from search.results import rank

    sweep = record.sweep
    searched = list(sweep.space)
    trials = record.trials()
    rows = []
    for trial in rank(trials, sweep)[:num_rows]:
        best = trial.best_epoch(sweep.metric, sweep.mode)
        rows.append(
            (
                f"{trial.number:05d}",
                _state(trial),
                "" if best is None else f"{best.metrics[sweep.metric]:.4f}",
                f"{'-' if best is None else best.epoch}/{len(trial.epochs)}",
                *(_cell(getattr(trial.params, name)) for name in searched),
            )
        )
    table = Table(
        title=f"{sweep.name}: best {sweep.metric} first; trial 00000 is the baseline",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    headers = ("trial", "state", sweep.metric, "epoch best/run", *searched)
    for index, header in enumerate(headers):
        # Headers may wrap at their words, values may not: 80 columns hold the default space.
        widest = max((min(len(row[index]), 40) for row in rows), default=0)
        table.add_column(header.replace("_", " "), min_width=widest, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if len(trials) > num_rows:
        console.print(f"and {len(trials) - num_rows} more")


def _state(trial: Any) -> str:
    if trial.state == "pruned":
        return "out of time" if trial.reason == "time_budget" else "stopped"
    return f"failed: {trial.reason}" if trial.state == "failed" else str(trial.state)


def _console() -> Console:
    """Return the terminal; a pipe or a file gets lines that are not wrapped."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _cell(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _tensorboard(sweep: Any) -> str:
    return f"tensorboard --logdir {shlex.quote(str(sweep.folder / 'tensorboard'))}"


def _check_export(out: Path | None) -> None:
    if out is None:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"a bundle goes into a new folder; {out} exists: give another")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"a bundle goes into a new folder; {above} takes none: give another")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {text!r}")
    return int(text)


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set must be KEY=VALUE, such as search.num_trials=16; got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"--set {key} must be a YAML value; got {value!r}") from error


if __name__ == "__main__":
    main()
