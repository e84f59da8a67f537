"""Runs a sweep on Ray Tune: a new one, or one that was interrupted."""

import contextlib
import dataclasses
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

from lightning_modules.data.datamodule import source_loss_weights
from lightning_modules.data.manifest import SPLITS, Manifest
from lightning_modules.data.pack import Pack, default_cache_dir
from lightning_modules.errors import InputError
from lightning_modules.feature_store import current_moment
from lightning_modules.network_cost import measure_costs
from lightning_modules.weights import WeightOrigin, find_weights
from search.config import dump_sweep
from search.data import check_leakage, check_same_data
from search.interruption import Interruption
from search.planning.known_measurements import recall, remember
from search.planning.measurement import Measurement, kinds_of, measure
from search.planning.plan import Plan, make_plan
from search.planning.words import lines_of
from search.study.origins import recorded_weights
from search.study.record import Record
from search.study.sweep_files import LocalFiles, is_object_storage
from search.sweep import Sweep
from search.tuning.faults import AlikeFailuresError
from search.tuning.local_ray import local_ray
from search.tuning.nodes import check_nodes, wait_for_node
from search.tuning.pictures import draw_kept
from search.tuning.progress import Progress
from search.tuning.recorder import EndOfSweep, StudyRecorder
from search.tuning.resources import (
    TrialResources,
    check_devices,
    gpu_share,
    max_concurrent,
    max_trials_per_gpu,
    measure_device,
    placement_of,
    whole_resources,
)
from search.tuning.scheduler import ResumableASHA
from search.tuning.searcher import StudySearcher
from search.tuning.shared_weights import local_weights, share_weights
from search.tuning.silence import EndSilentWorkers
from search.tuning.survey import source_digest
from search.tuning.trial import Run, train_trial

# For workers. glibc gives memory back to the system after every step and faults it in again on the
# next, which takes up to half of a training step on a CPU. Kept instead, it stays at its peak.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "67108864",
    # A stopped trial takes its time to leave Lightning; a worker that is not waited for is lost to
    # Ray together with the next trial, without a word to anyone.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
}

# Ray Tune 2.60 sends the driver's keys along with every trial, and writes them into its logs. Every
# node has its own environment, and workers that are started here have this one's.
ENV_VARS_TO_PROPAGATE.difference_update(
    {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
)

Tell = Callable[[str], None]


def launch_sweep(
    sweep: Sweep,
    manifest: Manifest,
    pack: Pack,
    *,
    address: str | None,
    tell: Tell,
    wait_s: float = 0.0,
    as_json: bool = False,
    budget_s: float | None = None,
) -> Record:
    """Run a new sweep to its end.

    Args:
        sweep: What to run; its folder is new, and held.
        manifest: Its images, split.
        pack: Its images, decoded.
        address: A running Ray cluster's; none starts one on this machine.
        tell: Given a line for the user now and then.
        wait_s: How long to wait for a cluster that grows to have a node that a trial fits.
        as_json: Whether events go to standard output, see ``events``, instead of a view for people.
        budget_s: Run as many trials as will probably fit; none runs the sweep's own number.

    Returns:
        The sweep's record.

    Raises:
        InputError: If anything the user gave is wrong; then there is no record either.
    """
    weights, leakage = _look(sweep, manifest, pack, address, tell)
    checked = _checked_cluster(address, sweep, manifest, pack, wait_s=wait_s, tell=tell)
    with contextlib.ExitStack() as stack:
        if address is not None:
            # What a cluster has is known only to it, and asked before there is a record.
            stack.enter_context(checked)
        if address is not None or is_object_storage(sweep.storage):
            weights = share_weights(weights, sweep)
        facts = {
            **_facts(manifest, pack, weights),
            "leakage": leakage,
            "costs": _costs(sweep, manifest, tell),
        }
        record = Record.create(sweep, facts)
        stack.enter_context(record.being_written())
        is_local = address is None
        try:
            if is_local:
                stack.enter_context(checked)
            run, resources = _prepare(record, manifest, pack, weights, is_local=is_local, tell=tell)
            # A number of trials that is chosen by it deserves to be measured now.
            may_recall = is_local and budget_s is None
            known = recall(run, resources.whole) if may_recall else None
            plan = make_plan(
                run,
                resources=resources,
                measurement=known or _measurement(run, resources, is_local=is_local, tell=tell),
                network_costs=record.costs,
                is_local=is_local,
                budget_s=budget_s,
            )
        except BaseException:  # a signal, too
            # No sweep comes of it, and a server would keep the name.
            record.delete()
            sweep.files.remove(sweep.files.names("weights"))
            raise
        for line in lines_of(plan):
            tell(line)
        record.add_fact("forecast", plan.as_fact())
        record.sweep = plan.sweep
        sweep.files.write("manifest.csv", manifest.csv())
        sweep.files.write("sweep.yaml", dump_sweep(plan.sweep).encode())
        run = dataclasses.replace(run, sweep=plan.sweep)
        _run(record, run, resources, is_local=is_local, tell=tell, as_json=as_json)
    return record


def plan_sweep(
    sweep: Sweep,
    manifest: Manifest,
    pack: Pack,
    *,
    address: str | None,
    tell: Tell,
    wait_s: float = 0.0,
) -> Plan:
    """Return what a sweep will take, and run nothing.

    Args:
        sweep: Its folder is new, and held; it is left empty.
        manifest: Its images, split.
        pack: Its images, decoded.
        address: A running Ray cluster's; none starts one on this machine.
        tell: Given a line for the user now and then.
        wait_s: How long to wait for a cluster that grows to have a node that a trial fits.

    Raises:
        InputError: As ``launch_sweep``.
    """
    weights, _ = _look(sweep, manifest, pack, address, tell)
    costs = {
        name: found[sweep.cost]
        for name, found in _costs(sweep, manifest, tell).items()
        if sweep.cost
    }
    try:
        with _checked_cluster(address, sweep, manifest, pack, wait_s=wait_s, tell=tell):
            if address is not None:
                weights = share_weights(weights, sweep)
            is_local = address is None
            measured = measure_device(sweep, is_local=is_local)
            run, resources = _run_of(sweep, manifest, pack, weights, measured, is_local=is_local)
            measurement = _measurement(run, resources, is_local=is_local, tell=tell)
            return make_plan(
                run,
                resources=resources,
                measurement=measurement,
                network_costs=costs,
                is_local=is_local,
            )
    finally:
        sweep.files.remove(sweep.files.names("weights"))


def _look(
    sweep: Sweep, manifest: Manifest, pack: Pack, address: str | None, tell: Tell
) -> tuple[dict[str, WeightOrigin], dict[str, int]]:
    """Look at devices, weights, and images before anything starts; tell of them."""
    check_devices(sweep, address)
    if sweep.data.source_weights:
        source_loss_weights(manifest, sweep.data.source_weights)  # refuses sources that are not
    weights = {
        backbone: find_weights(sweep.weights[backbone], backbone=backbone, seed=sweep.seed)
        for backbone in sweep.backbones
    }
    for backbone, origin in weights.items():
        tell(f"weights {backbone}: {origin.origin}")
        if origin.summary:
            tell(f"        {origin.summary}")
        for reason in origin.passed_over:
            tell(f"        {reason}")
    _tell_data(manifest, pack, tell)
    leakage = check_leakage(sweep, manifest, pack)
    if leakage:
        tell(f"        {leakage['pictures']} pictures lie in two splits: scores flatter")
    return weights, leakage


def resume_sweep(
    record: Record,
    manifest: Manifest,
    pack: Pack,
    *,
    address: str | None,
    tell: Tell,
    wait_s: float = 0.0,
    as_json: bool = False,
) -> None:
    """Go on with a sweep that was interrupted.

    Finished trials are not run again. Unfinished ones go on under their numbers and params from
    their last whole checkpoint, and the scheduler's rungs hold every recorded epoch.

    Args:
        record: Of the sweep as it was launched; held, and being written.
        manifest: Its images, split, as they are now.
        pack: Its images, decoded, as they are now.
        address: A running Ray cluster's; none starts one on this machine.
        tell: Given a line for the user now and then.
        wait_s: How long to wait for a cluster that grows to have a node that a trial fits.
        as_json: Whether events go to standard output, see ``events``, instead of a view for people.

    Raises:
        InputError: If the record is damaged, or if the images or the initial weights are not the
            ones it was launched with.
    """
    record.check()
    sweep = record.sweep
    weights = recorded_weights(record)
    check_same_data(record.facts, manifest, pack)
    for backbone, origin in weights.items():
        check_same_weights(backbone, origin)
    check_devices(sweep, address)
    _tell_data(manifest, pack, tell)
    with _checked_cluster(address, sweep, manifest, pack, wait_s=wait_s, tell=tell):
        is_local = address is None
        run, resources = _prepare(record, manifest, pack, weights, is_local=is_local, tell=tell)
        _run(record, run, resources, is_local=is_local, tell=tell, as_json=as_json)


def _prepare(
    record: Record,
    manifest: Manifest,
    pack: Pack,
    weights: dict[str, WeightOrigin],
    *,
    is_local: bool,
    tell: Tell,
) -> tuple[Run, TrialResources]:
    """Return what trials share, and what they take of the connected cluster."""
    measured = _measured(record, tell, is_local=is_local)
    return _run_of(record.sweep, manifest, pack, weights, measured, is_local=is_local)


def _run_of(
    sweep: Sweep,
    manifest: Manifest,
    pack: Pack,
    weights: dict[str, WeightOrigin],
    measured: dict[str, Any],
    *,
    is_local: bool,
) -> tuple[Run, TrialResources]:
    whole = whole_resources(sweep)
    each = whole
    # A sweep that was measured on GPUs may be resumed without.
    if whole["gpu"] and (peak_bytes := measured["gpu_peak_bytes"]):
        share = gpu_share(
            peak_bytes.values(), measured["gpu_total_bytes"], max_trials_per_gpu(sweep)
        )
        each = whole | {"gpu": share}
    run = Run(
        sweep=sweep,
        manifest=manifest,
        pack=pack,
        weights=weights,
        precisions=measured["precisions"],
        gpu_share=each["gpu"],
        started=current_moment(),
        source_digest=None if is_local else source_digest(),
    )
    num_slots = sweep.search.max_concurrent_trials or max_concurrent(each)
    return run, TrialResources(whole=whole, each=each, num_slots=num_slots)


def _run(
    record: Record,
    run: Run,
    resources: TrialResources,
    *,
    is_local: bool,
    tell: Tell,
    as_json: bool,
) -> None:
    each = {name.upper(): amount for name, amount in resources.each.items()}

    def resources_of(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return placement_of(each, config)

    is_new = record.num_trials == 0
    start_s = time.monotonic()
    run_trials(
        record,
        tune.with_resources(tune.with_parameters(train_trial, run=run), resources_of),
        max_concurrent_trials=resources.num_slots,
        is_local=is_local,
        as_json=as_json,
        tell=tell,
    )
    if is_new:
        _record_actual(record, time.monotonic() - start_s)
    draw_kept(record, run, tell)


def _record_actual(record: Record, duration_s: float) -> None:
    """Record what became of the forecast, in its words, if the sweep came to its end."""
    trials = record.trials()
    if any(trial.state == "running" for trial in trials):
        return
    epochs = sum(len(trial.epochs) for trial in trials)
    record.add_fact("actual", {"duration_s": duration_s, "epochs": epochs})


def run_trials(
    record: Record,
    trainable: Any,
    *,
    max_concurrent_trials: int,
    is_local: bool,
    as_json: bool = False,
    tell: Tell = print,
) -> None:
    """Run the trials that a record has yet to see the end of.

    Args:
        record: Where trials come from, and where everything they report goes; being written.
        trainable: Reports epochs to Ray Tune, as ``train_trial`` does; with its resources.
        max_concurrent_trials: Trials at a time.
        is_local: Whether all of it happens on this machine.
        as_json: Whether events go to standard output.
        tell: Given a line for the user now and then.

    Raises:
        InputError: If the sweep's storage gave out.
        AlikeFailuresError: If the trials' code is at fault.
        Interrupted: If the user ended it.
    """
    sweep = record.sweep
    scheduler = ResumableASHA(sweep, record.trials(), record.costs)
    interruption = Interruption()
    recorder = StudyRecorder(record, scheduler, tell=tell)
    unfinished = recorder.take_up()
    remaining = len(unfinished) + sweep.search.num_trials - record.num_trials
    if remaining <= 0:
        return
    if isinstance(sweep.files, LocalFiles):
        for name in ("trials", "tensorboard"):
            # Here alone: a worker that made them would write beneath a mount that is gone.
            (sweep.files.folder / name).mkdir(exist_ok=True)
    progress = Progress(record, scheduler, as_json=as_json)
    with (
        tempfile.TemporaryDirectory(prefix="neurosweep-") as scratch,
        interruption.taken(),
    ):
        # Never read back; in a shared folder, every node of a cluster sees it. Ray looks for it on
        # a worker only if that reports a checkpoint to Ray, which none does.
        ray_folder = Path(scratch)
        if not is_local and not is_object_storage(sweep.storage):
            ray_folder = sweep.folder / "ray"
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(record, unfinished, recorder),
                scheduler=scheduler,
                num_samples=-1,  # the searcher knows: a trial whose worker is lost comes twice
                # Without it Ray creates the trials of a custom searcher one after another.
                max_concurrent_trials=min(max_concurrent_trials, remaining),
                # Importing torch and Lightning takes longer than a short trial.
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=sweep.name,
                storage_path=str(ray_folder),
                stop=EndOfSweep(recorder, interruption),
                callbacks=[recorder, progress, EndSilentWorkers()],
                verbose=0,
            ),
        )
        # What went wrong in a trial is recorded and printed by our own callbacks.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        try:
            tuner.fit()
        finally:
            progress.close()
        recorder.settle()
        shutil.rmtree(ray_folder, ignore_errors=True)
    if recorder.storage_error:
        raise InputError(
            f"the sweep's storage must take what is written; {recorder.storage_error}: make room "
            f"or bring it back, then `neurosweep resume {sweep.reference}`; nothing recorded is "
            "lost"
        )
    if recorder.bug:
        raise AlikeFailuresError(recorder.bug.traceback)


def _measurement(run: Run, resources: TrialResources, *, is_local: bool, tell: Tell) -> Measurement:
    """Measure what each kind of trial takes; a cluster's nodes are not this machine."""
    tell(f"times   a few steps of each of {len(kinds_of(run.sweep))} kinds of trials")
    measurement = measure(run, resources.whole)
    if is_local:
        remember(run, resources.whole, measurement)
    return measurement


def _measured(record: Record, tell: Tell, *, is_local: bool) -> dict[str, Any]:
    """Return what was measured when the sweep was launched; measure it now if nothing was."""
    measured: dict[str, Any] = record.facts.get("measured") or {}
    if not measured:
        measured = measure_device(record.sweep, is_local=is_local)
        record.add_fact("measured", measured)
    for backbone, precision in measured["precisions"].items():
        tell(f"trains  {backbone} in {precision}")
    return measured


def _trial_name(trial: Any) -> str:
    return str(trial.config["name"])


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine that nobody else can reach."""
    options: dict[str, Any] = {
        "runtime_env": {
            "env_vars": dict(WORKER_ENVIRONMENT),  # Ray adds to it
            # Until its first trial, or what is measured in its place: all that imports make stays.
            "worker_process_setup_hook": "gc.disable",
        },
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address is None:
        with local_ray(options):
            yield
        return
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--address must be a Ray cluster that answers; got {address}: {reason}"
        ) from error
    yield
    # Not after a signal: Ray on this node may have got it too, and then ends this process at the
    # first call. A driver that is gone is noticed, and its workers are ended.
    ray.shutdown()


@contextlib.contextmanager
def _checked_cluster(
    address: str | None, sweep: Sweep, manifest: Manifest, pack: Pack, *, wait_s: float, tell: Tell
) -> Iterator[None]:
    """Connect to a cluster whose nodes can run the trials, or start one on this machine."""
    if address is None:
        tell("starts  workers on this machine")
    with connected(address):
        if address is not None:
            wait_for_node(sweep, wait_s, tell)
            check_nodes(sweep, manifest, pack, tell=tell)
        yield


def _tell_data(manifest: Manifest, pack: Pack, tell: Tell) -> None:
    counts = ", ".join(f"{len(manifest.rows(split))} {split}" for split in SPLITS)
    groups = manifest.frame["group_id"].nunique()
    tell(f"images  {counts}; {len(manifest.classes)} classes, {groups} groups")
    if groups == len(manifest.frame):
        tell("        every image is a group of its own: if patients have several, name them")
        tell("        (group_id in the manifest, or data.group_pattern), or the scores flatter")
    if pack.skipped:
        tell(f"        {len(pack.skipped)} unreadable images are left out")


def check_same_weights(backbone: str, origin: WeightOrigin) -> None:
    """Refuse initial weights that are not those that a sweep was launched with.

    Raises:
        InputError: If the file has changed, or is gone.
    """
    here = local_weights(origin).path
    now = find_weights(here or "random", backbone=backbone, seed=origin.seed)
    if now.digest != origin.digest:
        raise InputError(
            f"a sweep is resumed from the weights it was launched with; {origin.path} has changed "
            f"(digest {origin.digest[:12]}, now {now.digest[:12]}): restore the file"
        )


def _costs(sweep: Sweep, manifest: Manifest, tell: Tell) -> dict[str, dict[str, float]]:
    """Return what each backbone costs, if the sweep looks for little of it; told once."""
    if sweep.cost is None:
        return {}
    costs = measure_costs(
        sweep.backbones,
        num_classes=len(manifest.classes),
        image_size_px=sweep.data.image_size_px,
        cache_dir=default_cache_dir(),
        tell=tell,
    )
    for backbone, cost in costs.items():
        tell(f"costs   {backbone} {cost.latency_ms:.1f} ms, {cost.size_mib:.1f} MiB")
    return {backbone: dataclasses.asdict(cost) for backbone, cost in costs.items()}


def _facts(manifest: Manifest, pack: Pack, weights: dict[str, WeightOrigin]) -> dict[str, Any]:
    packages = ("torch", "torchvision", "pytorch-lightning", "ray", "optuna", "kornia")
    return {
        "classes": list(manifest.classes),
        "manifest_digest": manifest.digest,
        "pack_digest": pack.digest,
        "skipped_images": list(pack.skipped),
        "weights": {name: dataclasses.asdict(origin) for name, origin in weights.items()},
        "versions": {
            "python": platform.python_version(),
            "neurosweep": version("neurosweep"),
            **{name: version(name) for name in packages},
        },
    }
