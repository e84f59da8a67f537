"""The command line: what the user types, and how a command ends."""

import argparse
import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_modules.errors import InputError, printable
from search import commands
from search.interruption import Interrupted, Interruption
from search.tuning.faults import AlikeFailuresError

DESCRIPTION = "Hyperparameter search for transfer learning on brain MRI."


def run_and_exit() -> None:
    """Be the process that runs the command, quick to begin and to end; exit as `main` says."""
    # Python looks for garbage after every 700 new objects, or 2,000. While torch is imported they
    # all stay: to look through them again and again takes a seventh of that time.
    gc.set_threshold(10_000)
    code = 0
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # the shell may have closed it
            with contextlib.suppress(BrokenPipeError):  # whoever was reading went away
                stream.flush()
    # Unloading torch takes seconds, in which Ray would look for what was ended.
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit 0 if it succeeded, 2 after a mistake of the user.

    1 is for work that was done and failed, 130 for Ctrl-C, 143 for SIGTERM, and 141 for a reader
    that went away, as a shell has it.
    """
    if not (sys.argv[1:] if arguments is None else arguments):
        parser().print_help(sys.stderr)
        sys.exit(2)
    options = parser().parse_args(arguments)
    # Pillow would warn of an image beside the one line that refuses it.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Interruption().taken():
            options.run(options)
    except BrokenPipeError:  # whoever was reading has read enough, as `head` does
        if options.debug:
            raise
        sys.exit(141)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that is not permitted
        if options.debug:
            raise
        print(f"neurosweep: {printable(_said(error))}", file=sys.stderr)
        sys.exit(2)
    except AlikeFailuresError as error:
        if options.debug:
            raise
        print(error.traceback, file=sys.stderr)
        print(f"neurosweep: {error}: {error.__notes__[-1]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        if options.debug:
            raise
        print("neurosweep: interrupted", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, Interrupted) else 130)


def _said(error: InputError | OSError) -> str:
    """Return an error's line; of a file that the system names, the name without its folders."""
    # Folders may be patients' names.
    if isinstance(error, OSError) and error.strerror:
        names = [Path(os.fsdecode(n)).name for n in (error.filename, error.filename2) if n]
        return ": ".join([*names, error.strerror])
    return str(error)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="neurosweep", description=DESCRIPTION)
    parser.add_argument(
        "--version", action="version", version=f"neurosweep {version('neurosweep')}"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    audit = _command(subparsers, "audit", commands.audit, "look for what is wrong with images")
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

    launch = _command(subparsers, "launch", commands.launch, "run a sweep")
    _setting_options(launch)
    launch.add_argument(
        "--budget",
        metavar="TIME",
        help="run as many trials as will probably fit into 2h, 30m, or 90s",
    )
    _run_options(launch)

    plan = _command(
        subparsers, "plan", commands.plan, "say what a sweep will take: time, epochs, disk, money"
    )
    _setting_options(plan)
    _cluster_options(plan)

    resume = _command(subparsers, "resume", commands.resume, "go on with an interrupted sweep")
    _sweep_options(resume)
    _run_options(resume)

    top = _command(subparsers, "top", commands.top, "rank a sweep's trials, also while it runs")
    _sweep_options(top)
    top.add_argument("--num", type=_positive, default=20, metavar="N", help="rows to print (20)")
    top.add_argument(
        "--pareto", action="store_true", help="print the best at each cost: latency, size"
    )
    top.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the metric against cost")

    report = _command(
        subparsers, "report", commands.report, "write a page on a sweep, or on several"
    )
    report.add_argument(
        "names", nargs="+", metavar="SWEEP", help="a sweep's name, or its folder or URL"
    )
    _storage_option(report)
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)"
    )
    report.add_argument(
        "--bundle",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="made of a sweep: shows its evaluation and explanations; repeat for several",
    )
    report.add_argument(
        "--images",
        action="store_true",
        help="show overlays of the bundles' explanations, which are images of the data",
    )

    replay = _command(
        subparsers, "replay", commands.replay, "run one trial again, and compare with the record"
    )
    _sweep_options(replay)
    replay.add_argument("trial", type=_index, metavar="TRIAL", help="its number")

    confirm = _command(
        subparsers, "confirm", commands.confirm, "train the best trials again with fresh seeds"
    )
    _sweep_options(confirm)
    confirm.add_argument("--top", type=_positive, default=3, metavar="K", help="best trials (3)")
    confirm.add_argument("--seeds", type=_positive, default=5, metavar="N", help="seeds each (5)")
    _cluster_options(confirm)
    _json_option(confirm)

    export = _command(
        subparsers, "export", commands.export, "write the best checkpoint as a bundle"
    )
    _sweep_options(export)
    export.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    export.add_argument("--trial", type=int, metavar="NUMBER", help="instead of the best one")

    ensemble = _command(
        subparsers, "ensemble", commands.ensemble, "write several trials as one bundle"
    )
    _sweep_options(ensemble)
    ensemble.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    ensemble.add_argument("--top", type=_positive, default=5, metavar="K", help="best trials (5)")
    ensemble.add_argument(
        "--method",
        choices=("greedy", "grid", "soup"),
        default="greedy",
        help="mix probabilities, chosen one by one or on a grid, or average weights (greedy)",
    )
    ensemble.add_argument(
        "--evaluate",
        action="store_true",
        help="then score it on the locked test images, beside the best trial alone (OUT-single)",
    )

    evaluate = _command(
        subparsers, "evaluate", commands.evaluate, "score a bundle on its locked test images"
    )
    evaluate.add_argument("bundle", type=Path, metavar="BUNDLE")
    evaluate.add_argument(
        "--data",
        type=place,
        required=True,
        metavar="MANIFEST|SWEEP",
        help="the manifest with its splits, or the sweep's folder or URL",
    )
    evaluate.add_argument(
        "--external", type=Path, metavar="FOLDER|MANIFEST", help="other images, evaluated whole"
    )
    evaluate.add_argument(
        "--baseline", type=Path, metavar="BUNDLE", help="compared on the same images"
    )
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="instead of BUNDLE/evaluation")
    evaluate.add_argument(
        "--seed", type=_index, default=0, metavar="N", help="of the resamples (0)"
    )
    evaluate.add_argument(
        "--resamples", type=_positive, default=1000, metavar="N", help="for the intervals (1000)"
    )
    evaluate.add_argument(
        "--skip-bad-images", action="store_true", help="go on without unreadable images"
    )

    explain = _command(
        subparsers, "explain", commands.explain, "show and test what a bundle looks at"
    )
    explain.add_argument("bundle", type=Path, metavar="BUNDLE")
    explain.add_argument(
        "images",
        type=place,
        nargs="+",
        metavar="IMAGE|SWEEP",
        help="files, or the sweep's folder or URL",
    )
    explain.add_argument(
        "--out", type=Path, metavar="DIR", help="a new folder, instead of BUNDLE/explanation"
    )
    explain.add_argument(
        "--phantoms",
        type=_index,
        default=0,
        metavar="N",
        help="play the pointing game on N simulated patients, for bundles trained on such (0)",
    )

    doctor = _command(
        subparsers, "doctor", commands.doctor, "look whether a sweep can run on this machine"
    )
    doctor.add_argument(
        "--storage", default="sweeps", metavar="DIR|URL", help="where sweeps are to go (sweeps/)"
    )
    _cluster_options(doctor)

    predict = _command(subparsers, "predict", commands.predict, "classify images with a bundle")
    predict.add_argument("bundle", type=Path, metavar="BUNDLE")
    predict.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG, TIFF, DICOM, or NIfTI"
    )
    predict.add_argument(
        "--slice", type=_index, metavar="N", help="one slice of each volume, counted from 0"
    )
    predict.add_argument(
        "--format", choices=("table", "csv", "json"), default="table", help="(table)"
    )
    completion = _command(
        subparsers, "completion", commands.completion, "print what makes a shell complete"
    )
    completion.add_argument("shell", choices=("bash", "zsh"))
    return parser


def _setting_options(parser: argparse.ArgumentParser) -> None:
    """Add the sweep file, and what overrides it."""
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--data", metavar="PATH", help="manifest CSV, or folder of class folders")
    parser.add_argument(
        "--weights",
        action="append",
        metavar="SPEC",
        help="imagenet, random, a state dict, or a folder of them; repeat to try several in order",
    )
    parser.add_argument("--name", help="instead of the sweep file's name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting of the sweep file, such as search.num_trials=16",
    )
    parser.add_argument(
        "--storage",
        metavar="DIR|URL",
        help="where sweeps are: a folder, s3://BUCKET/PREFIX, or gs://BUCKET/PREFIX (sweeps/)",
    )
    parser.add_argument(
        "--skip-bad-images", action="store_true", help="go on without unreadable images"
    )
    copies = parser.add_mutually_exclusive_group()
    copies.add_argument(
        "--group-duplicates", action="store_true", help="move images of one picture into one split"
    )
    copies.add_argument(
        "--allow-leakage", action="store_true", help="launch with copies in two splits"
    )


def _command(subparsers: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="SWEEP", help="a sweep's name, or its folder or URL")
    _storage_option(parser)


def _storage_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage", default="sweeps", metavar="DIR|URL", help="where sweeps are (sweeps/)"
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    _cluster_options(parser)
    parser.add_argument("--export", type=Path, metavar="DIR", help="export the best at the end")
    _json_option(parser)


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print each event as one line of JSON, and what is for people to standard error",
    )


def _cluster_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a running Ray cluster, or auto; one is started here if not given",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="use a cluster that asks for no token"
    )
    parser.add_argument(
        "--wait-s",
        type=_index,
        default=0,
        metavar="S",
        help="wait so long for a cluster that grows to start a node that a trial fits (0)",
    )


def place(text: str) -> Path | str:
    """Return a path; an address as it is, of which a path would make one slash of the two."""
    return text if "://" in text else Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {text!r}")
    return int(text)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0; got {text!r}")
    return int(text)


if __name__ == "__main__":
    run_and_exit()
