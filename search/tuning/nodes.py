"""Can every node of a cluster take part? Asked before the first trial, and shown as one table."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_modules.data.manifest import Manifest, some_of
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from search.study.sweep_files import files_at
from search.sweep import Sweep
from search.tuning.resources import num_fitting, whole_resources
from search.tuning.survey import Finding, Question, Survey, source_digest, versions

ANSWER_WITHIN_S = 180.0
POLL_S = 2.0

# Enough to see that a folder is another, or was copied in part.
NUM_SAMPLED_IMAGES = 32

COLUMNS = ("code", "storage", "images", "cache", "device")

Tell = Callable[[str], None]


def wait_for_node(sweep: Sweep, wait_s: float, tell: Tell) -> None:
    """Have a cluster that grows start a node that a trial fits, and wait for it.

    Args:
        sweep: Says what a trial takes.
        wait_s: At most this long; 0 does nothing.
        tell: Given a line for the user if there is something to wait for.

    Raises:
        InputError: If there is no such node by then.
    """
    deadline_s = time.monotonic() + wait_s
    has_requested = False
    try:
        while True:
            try:
                whole_resources(sweep)
                return
            except InputError:
                if time.monotonic() >= deadline_s:
                    raise
            if not has_requested:
                tell(f"cluster no node fits a trial yet; waiting for one, at most {wait_s:.0f} s")
                resources = sweep.resources
                # Whole GPUs: the kinds of nodes that a cluster can start have no less.
                gpus = {"GPU": 1} if resources.gpus_per_trial else {}
                request_resources(bundles=[{"CPU": resources.cpus_per_trial, **gpus}])
                has_requested = True
            time.sleep(POLL_S)
    finally:
        if has_requested:
            # It would outlive this process and hold the node for ever.
            request_resources(bundles=[])


def check_nodes(sweep: Sweep, manifest: Manifest, pack: Pack, *, tell: Tell) -> None:
    """Ask every node that may run trials whether it can, and show what they said.

    A node must have this very code installed, see the sweep's folder and write to it, read the
    images or the pack, and have a cache folder with room for the pack. Nodes that no trial fits,
    such as a head without CPUs, are not asked. ``check_joined_node`` is for those that come later.

    Args:
        sweep: Its folder exists.
        manifest: Its images.
        pack: The same, decoded.
        tell: Given the table, a line at a time.

    Raises:
        InputError: If a node cannot take part; it names each, and the remedy.
    """
    resources = whole_resources(sweep)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [node for node in nodes if num_fitting(node["Resources"], resources)]
    _check(nodes, asked, _question(sweep, manifest, pack), tell)


def check_storage(location: str, *, tell: Tell) -> None:
    """Ask every node whether it has this code, sees a storage, and has a cache; as `check_nodes`.

    Args:
        location: Where sweeps are to go; a folder exists.
        tell: Given the table, a line at a time.

    Raises:
        InputError: If a node cannot take part.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    question = Question(
        location=location,
        probe=f".node-check-{secrets.token_hex(8)}",
        content=secrets.token_hex(16),
        images_root=None,
        images=(),
        pack=Path("/none"),
        pack_bytes=0,
    )
    _check(nodes, nodes, question, tell)


def _check(
    nodes: Sequence[Mapping[str, Any]],
    asked: Sequence[Mapping[str, Any]],
    question: Question,
    tell: Tell,
) -> None:
    files = files_at(question.location)
    try:
        files.write(f"{question.probe}/driver", question.content.encode())
        surveys = _ask(asked, question)
        arrived = files.names(question.probe)
        for node_id, survey in surveys.items():
            _look_for_answer(survey, f"{question.probe}/{node_id}" in arrived, files.location)
    finally:
        files.remove(files.names(question.probe))
    rows = [(node, surveys.get(node["NodeID"])) for node in nodes]
    for line in table_of(rows):
        tell(line)
    troubles = [
        f"{_name(node)}: {finding.trouble}"
        for node, survey in rows
        for finding in (survey or {}).values()
        if finding.trouble
    ]
    if troubles:
        raise InputError(
            f"every node that a trial fits must be able to run one; {some_of(troubles, limit=8)}; "
            "or take the node out of the cluster"
        )


def table_of(rows: Sequence[tuple[Mapping[str, Any], Survey | None]]) -> list[str]:
    """Return each node, and what it found of itself, as the lines of a table.

    Args:
        rows: Nodes as Ray describes them, with none for one that was not asked.
    """
    cells = [["node", "has", *COLUMNS]]
    for node, survey in rows:
        has = node["Resources"]
        gpus = f", {has['GPU']:g} GPU" if has.get("GPU") else ""
        row = [_name(node), f"{has.get('CPU', 0):g} CPU{gpus}"]
        if survey is None:
            row += ["no trial fits", "", "", "", ""]
        else:
            row += [_cell(survey.get(column)) for column in COLUMNS]
        cells.append(row)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _cell(finding: Finding | None) -> str:
    if finding is None:
        return "-"
    return f"NO: {finding.text}" if finding.trouble else finding.text


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} {node['NodeManagerHostname']}"


def _question(sweep: Sweep, manifest: Manifest, pack: Pack) -> Question:
    paths = [str(path) for path in manifest.frame["path"]]
    step = max(1, len(paths) // NUM_SAMPLED_IMAGES)
    return Question(
        location=sweep.location,
        probe=f".node-check-{secrets.token_hex(8)}",
        content=secrets.token_hex(16),
        images_root=None if sweep.data.phantom is not None else manifest.root,
        images=tuple(paths[::step][:NUM_SAMPLED_IMAGES]),
        pack=pack.path,
        pack_bytes=len(paths) * pack.image_size_px**2,
        compiles=sweep.training.compile,
    )


def _ask(nodes: Sequence[Mapping[str, Any]], question: Question) -> dict[str, Survey]:
    """Ask nodes all at once; return their surveys by their ids, also of those that are silent."""
    # Takes no CPU: a node that is busy answers, too.
    ask = ray.remote(num_cpus=0, max_retries=0)(_asker())
    digest, here = source_digest(), versions()
    asked = {}
    for node in nodes:
        node_id = node["NodeID"]
        num_gpus = int(node["Resources"].get("GPU", 0))
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        plain = dataclasses.asdict(dataclasses.replace(question, num_gpus=num_gpus))
        task = ask.options(scheduling_strategy=pinned).remote(digest, here, plain, node_id)
        asked[task] = node_id
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_WITHIN_S)
    surveys: dict[str, Survey] = {}
    for task in silent:
        ray.cancel(task, force=True)
        trouble = f"it has not answered within {ANSWER_WITHIN_S:.0f} s: look at its Ray logs"
        surveys[asked[task]] = {"code": Finding(text="no answer", trouble=trouble)}
    for task in answered:
        surveys[asked[task]] = _answer_of(task)
    return surveys


def _answer_of(task: Any) -> Survey:
    try:
        answers = ray.get(task)
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        trouble = f"asking it failed ({reason}): look at its Ray logs"
        return {"code": Finding(text="no answer", trouble=trouble)}
    return {name: Finding(text=text, trouble=trouble) for name, (text, trouble) in answers.items()}


def _look_for_answer(survey: Survey, has_arrived: bool, location: str) -> None:
    """Doubt a node that says it has written where nothing has arrived."""
    if "storage" in survey and not survey["storage"].trouble and not has_arrived:
        trouble = f"what it writes to {location} does not arrive here: mount the same storage"
        survey["storage"] = Finding(text="another one", trouble=trouble)


def _asker() -> Callable[..., dict[str, tuple[str, str]]]:
    """Return the function that a node runs.

    It is defined in here so that Ray sends it whole instead of by the name of its module, which a
    node without the package cannot import. For the same reason it takes and returns plain values.
    """

    def ask(
        digest: str, theirs: dict[str, str], question: dict[str, Any], node_id: str
    ) -> dict[str, tuple[str, str]]:
        import importlib.util

        packages = ("search", "lightning_modules")
        if any(importlib.util.find_spec(package) is None for package in packages):
            return {"code": ("none", "neurosweep is not installed there: install it")}
        try:
            from search.tuning import survey

            own = survey.versions()
            same = survey.source_digest() == digest
        except (ImportError, AttributeError) as error:
            return {"code": ("another", f"its neurosweep is another ({error}): install this one")}
        differing = [
            f"{name} {own.get(name)} instead of {wanted}"
            for name, wanted in theirs.items()
            if own.get(name) != wanted
        ]
        if differing:
            trouble = f"it has {', '.join(differing)}: install the same"
            return {"code": (differing[0], trouble)}
        if not same:
            trouble = "its files in search and lightning_modules are others: install this version"
            return {"code": ("another", trouble)}
        found = survey.look(survey.Question(**question), node_id)
        answers = {name: (finding.text, finding.trouble) for name, finding in found.items()}
        return {"code": ("same", ""), **answers}

    return ask
