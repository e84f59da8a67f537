"""From a YAML file to one frozen ``Sweep``; every mistake in it ends here."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_modules.errors import InputError
from lightning_modules.stages import BACKBONES, check_image_size
from lightning_modules.strict_yaml import MAX_YAML_BYTES, load_yaml
from search.samplers.sampler import SAMPLERS, num_grid_points
from search.space import Choice, Domain, Float, Int, Space
from search.study.sweep_files import OBJECT_STORAGE, is_object_storage
from search.sweep import COSTS, METRIC_MODES, PARAM_LIMITS, Sweep, TrialParams, WeightsSpec

# Positive, and no further apart than float32 adds up.
SOURCE_WEIGHT_LIMITS = (1e-3, 1e3)


def load_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read a sweep file and check everything in it.

    Relative paths of data and weights start from the file's folder, ``storage`` from the current
    one. Make paths in ``overrides`` absolute.

    Args:
        path: The YAML file.
        overrides: Dotted keys (``search.num_trials``) and the values that replace the file's.

    Raises:
        InputError: On the first thing that is wrong: file, dotted key, rule, value, remedy.
    """
    if not path.is_file():
        raise InputError(f"the sweep file must exist; nothing at {path}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: must be YAML; {error}") from error
    return read_sweep(content, str(path), path.resolve().parent, overrides)


def read_sweep(
    content: bytes, source: str, base: Path, overrides: Mapping[str, Any] | None = None
) -> Sweep:
    """Read what a sweep file holds, wherever it came from.

    Args:
        content: Of the file.
        source: What the file is called in messages.
        base: The folder that relative paths of data and weights start from.
        overrides: As of ``load_sweep``.

    Raises:
        InputError: As of ``load_sweep``.
    """
    document = _read_yaml(content, source)
    for dotted, value in (overrides or {}).items():
        _override(document, dotted, value)
    try:
        return _checked(_build_sweep(document, base=base))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except RuntimeError as error:  # Path.expanduser
        raise InputError(f"{source}: paths must not start with ~NAME; write them out") from error


def dump_sweep(sweep: Sweep) -> str:
    """Return the YAML text that ``load_sweep`` reads back as the same sweep."""
    document = dataclasses.asdict(sweep)
    document["space"] = {name: _dump_domain(domain) for name, domain in sweep.space.items()}
    return yaml.safe_dump(_plain(document), sort_keys=False, allow_unicode=True)


def _read_yaml(content: bytes, source: str) -> dict[str, Any]:
    if len(content) > MAX_YAML_BYTES:
        raise InputError(f"{source}: a sweep file must be below 256 KiB; is it one?")
    try:
        document = load_yaml(content.decode("utf-8"))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: must be YAML; {reason[:300]}") from error
    if not isinstance(document, dict):
        raise InputError(f"{source}: must be a mapping of settings; got {_shown(document)}")
    return document


def _override(document: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        below = document.get(parent)
        if not isinstance(below, dict):
            below = document[parent] = {}
        document = below
    document[last] = value


def _build_sweep(document: dict[str, Any], base: Path) -> Sweep:
    known = {f.name for f in dataclasses.fields(Sweep)}
    _check_keys("", document, known)
    if "data" not in document:
        raise InputError("data must say which images: data.path, or data.phantom")
    plain = {k: v for k, v in document.items() if k not in ("space", "weights", "objectives")}
    sweep: Sweep = _build(Sweep, plain, "")
    if is_object_storage(sweep.storage):
        check_address(sweep.storage)
    changes: dict[str, Any] = {
        **_build_objectives(document),
        # Results belong where the command is run, not beside the sweep file.
        "storage": sweep.storage.rstrip("/")
        if is_object_storage(sweep.storage)
        else str(Path(sweep.storage).expanduser().resolve()),
        "weights": _build_weights(document.get("weights", "imagenet"), base),
    }
    if sweep.data.path is not None:
        data_path = (base / Path(sweep.data.path).expanduser()).resolve()
        changes["data"] = dataclasses.replace(sweep.data, path=str(data_path))
    if sweep.scheduler is not None and "grace_period_epochs" not in (
        document.get("scheduler") or {}
    ):
        # The default must not refuse a short training.
        grace = min(sweep.scheduler.grace_period_epochs, max(1, sweep.training.max_epochs))
        changes["scheduler"] = dataclasses.replace(sweep.scheduler, grace_period_epochs=grace)
    if "space" in document:
        changes["space"] = _build_space(document["space"])
    return dataclasses.replace(sweep, **changes)


def _build(cls: type[Any], given: Any, dotted: str) -> Any:
    """Build a dataclass from a mapping, each value checked against its annotation."""
    if not isinstance(given, dict):
        raise InputError(f"{dotted} must be a mapping of settings; got {_shown(given)}")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    _check_keys(dotted, given, {f.name for f in fields})
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in given:
            raise InputError(f"{_join(dotted, f.name)} must be given")
    values = {
        name: _convert(hints[name], value, _join(dotted, name)) for name, value in given.items()
    }
    try:
        return cls(**values)
    except InputError as error:
        message = str(error)
        # A class that knows its own place in the file has said so already.
        prefix = "" if not dotted or message.startswith(dotted) else f"{dotted}."
        raise InputError(f"{prefix}{message}") from error


def _convert(hint: Any, value: Any, dotted: str) -> Any:
    """Check a value against an annotation; text that is a number becomes one."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    hint = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, dotted)
    if typing.get_origin(hint) is dict:
        return _mapping(value, typing.get_args(hint)[1], dotted)
    if typing.get_origin(hint) is Literal:
        return _one_of(value, typing.get_args(hint), dotted)
    if hint is bool:
        if not isinstance(value, bool):
            raise InputError(f"{dotted} must be true or false; got {_shown(value)}")
        return value
    if hint in (int, float):
        return _number(value, hint, dotted)
    if not isinstance(value, str) or _CONTROL.search(value):
        raise InputError(f"{dotted} must be text; got {_shown(value)}")
    return value


def _mapping(value: Any, hint: Any, dotted: str) -> dict[str, Any]:
    """Check a mapping whose keys are the user's own words."""
    if not isinstance(value, dict):
        raise InputError(f"{dotted} must be a mapping of names to values; got {_shown(value)}")
    for key in value:
        if not isinstance(key, str) or _CONTROL.search(key):
            raise InputError(f"{dotted} must have text as its keys; got {_shown(key)}: quote it")
    return {key: _convert(hint, below, f"{dotted}.{key:.80}") for key, below in value.items()}


# Control characters and half pairs, which no path or name can have.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# What YAML 1.1 reads as text though it is a number to everyone else: 1e-4, 5E3.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any, hint: type[int] | type[float], dotted: str) -> int | float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    kind = "a whole number" if hint is int else "a number"
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not finite:
        raise InputError(f"{dotted} must be {kind}; got {_shown(value)}")
    if hint is int and value != int(value):
        raise InputError(f"{dotted} must be a whole number; got {value}")
    if abs(value) > 2**53:
        raise InputError(f"{dotted} must be within plus or minus 2**53; got {_shown(value)}")
    return hint(value)


def _build_objectives(document: dict[str, Any]) -> dict[str, Any]:
    """Read the metric and the cost that are searched together; the metric is the sweep's, too."""
    given = document.get("objectives")
    if given is None:
        return {}
    if not isinstance(given, list) or len(given) != 2:
        raise InputError(
            f"objectives must be a metric and a cost, such as [val_macro_f1, latency_ms]; got "
            f"{_shown(given)}"
        )
    metric = _one_of(given[0], tuple(METRIC_MODES), "the first of objectives")
    cost = _one_of(given[1], COSTS, "the second of objectives")
    if document.get("metric", metric) != metric:
        raise InputError(
            f"metric must be the first of objectives, {metric}; got {_shown(document['metric'])}: "
            "leave one of them out"
        )
    return {"metric": metric, "objectives": (metric, cost)}


def _build_weights(given: Any, base: Path) -> dict[str, WeightsSpec]:
    """Read one specification for all backbones, or a mapping with one each."""
    if isinstance(given, dict):
        _check_keys("weights", given, set(BACKBONES))
        each = dict(given)
    else:
        each = dict.fromkeys(BACKBONES, given)
    return {name: _build_weights_spec(spec, base, name) for name, spec in each.items()}


def _build_weights_spec(spec: Any, base: Path, name: str) -> WeightsSpec:
    attempts = [spec] if isinstance(spec, str) else spec
    if (
        not isinstance(attempts, Sequence)
        or not attempts
        or not all(isinstance(one, str) and one and not _CONTROL.search(one) for one in attempts)
    ):
        raise InputError(
            "weights must be imagenet, random, a path, or a list of these; "
            f"got {_shown(spec)} for {name}"
        )
    absolute = tuple(
        attempt
        if attempt in ("imagenet", "random")
        else str((base / Path(attempt).expanduser()).resolve())
        for attempt in attempts
    )
    return absolute[0] if len(absolute) == 1 else absolute


def _build_space(given: Any) -> Space:
    if not isinstance(given, dict) or not given:
        raise InputError(f"space must map at least one param to its values; got {_shown(given)}")
    hints = typing.get_type_hints(TrialParams)
    _check_keys("space", given, set(hints))
    return {name: _build_domain(name, hints[name], value) for name, value in given.items()}


def _build_domain(name: str, hint: type[Any], given: Any) -> Domain:
    dotted = f"space.{name}"
    if isinstance(given, list):
        given = {"choices": given}
    if not isinstance(given, dict):
        raise InputError(
            f"{dotted} must be a list of choices or a mapping of low and high; got {_shown(given)}"
            ": a param that is not to be searched is left out of space"
        )
    is_number = hint in (int, float)
    _check_keys(dotted, given, {"choices", "low", "high", "log"} if is_number else {"choices"})
    try:
        if "choices" in given:
            if len(given) > 1:
                raise InputError(".choices goes alone, without low, high, or log")
            if not isinstance(given["choices"], list):
                raise InputError(f".choices must be a list; got {_shown(given['choices'])}")
            return Choice(
                choices=tuple(_convert(hint, choice, dotted) for choice in given["choices"])
            )
        for bound in ("low", "high"):
            if bound not in given:
                raise InputError(f" must have {bound}, or be a list of choices")
        low, high = (_convert(hint, given[bound], f"{dotted}.{bound}") for bound in ("low", "high"))
        if hint is float:
            log = _convert(bool, given.get("log", False), f"{dotted}.log")
            return Float(low=low, high=high, log=log)
        if "log" in given:
            raise InputError(".log is for real numbers; give choices such as [16, 32, 64]")
        return Int(low=low, high=high)
    except InputError as error:
        message = str(error)
        if not message.startswith(dotted):
            message = dotted + (message if message[0] in ". " else f".{message}")
        raise InputError(message) from error


def _checked(sweep: Sweep) -> Sweep:
    """Check what depends on more than one setting, or on a limit."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", sweep.name):
        raise InputError(
            "name must be 1 to 64 letters, digits, dots, dashes, or underscores, a letter or digit "
            f"first; got {_shown(sweep.name)}"
        )
    _check_places(sweep)
    _one_of(sweep.metric, tuple(METRIC_MODES), "metric")
    _one_of(sweep.search.sampler, SAMPLERS, "search.sampler")
    _within("seed", sweep.seed, 0, 2**31 - 1)
    _within("data.image_size_px", sweep.data.image_size_px, 32, 1024)
    _within("data.val_fraction", sweep.data.val_fraction, 0.01, 0.5)
    _within("data.test_fraction", sweep.data.test_fraction, 0, 0.5)
    for source, weight in (sweep.data.source_weights or {}).items():
        _within(f"data.source_weights.{source:.80}", weight, *SOURCE_WEIGHT_LIMITS)
    _within("training.max_epochs", sweep.training.max_epochs, 1, 10_000)
    _within("training.warmup_epochs", sweep.training.warmup_epochs, 0, sweep.training.max_epochs)
    _within("search.num_trials", sweep.search.num_trials, 1, 1_000_000)
    _within("search.keep_trials", sweep.search.keep_trials, 1, 10_000)
    _within("resources.cpus_per_trial", sweep.resources.cpus_per_trial, 1, 1024)
    if sweep.resources.feature_cache_gib is not None:
        _within("resources.feature_cache_gib", sweep.resources.feature_cache_gib, 0, 10**6)
    if sweep.resources.price_per_gpu_hour is not None:
        _within("resources.price_per_gpu_hour", sweep.resources.price_per_gpu_hour, 0, 10**6)
    if sweep.search.max_concurrent_trials is not None:
        _within("search.max_concurrent_trials", sweep.search.max_concurrent_trials, 1, 100_000)
    if sweep.search.time_budget_s is not None:
        _within("search.time_budget_s", sweep.search.time_budget_s, 1, 10**8)
    if sweep.resources.gpus_per_trial is not None:
        _check_gpus(sweep.resources.gpus_per_trial)
    if sweep.scheduler is not None:
        grace = sweep.scheduler.grace_period_epochs
        _within("scheduler.grace_period_epochs", grace, 1, sweep.training.max_epochs)
        _within("scheduler.reduction_factor", sweep.scheduler.reduction_factor, 2, 100)
    if (sweep.data.path is None) == (sweep.data.phantom is None):
        raise InputError(
            "data must have either path or phantom; "
            f"got {'neither' if sweep.data.path is None else 'both'}"
        )
    for name in BACKBONES:
        if name in sweep.backbones and name not in sweep.weights:
            raise InputError(f"weights must name initial weights for {name}, which is searched")
    if sweep.objectives is not None and len(sweep.backbones) < 2:
        raise InputError(
            f"objectives need several backbones in space.backbone, since {sweep.cost} is the "
            f"backbone's alone; got {sweep.backbones[0]}"
        )
    _check_params(sweep)
    for name in sweep.backbones:
        try:
            check_image_size(name, sweep.data.image_size_px)
        except InputError as error:
            raise InputError(f"data.{error}") from error
    _check_sampler(sweep)
    return sweep


def check_address(storage: str) -> None:
    """Refuse an address of an object storage that is of another kind, or holds a secret.

    Raises:
        InputError: If so; the address is not repeated.
    """
    if OBJECT_STORAGE.fullmatch(storage.rstrip("/")) is None or {".", ".."} & {*storage.split("/")}:
        raise InputError(
            "storage must be a folder, s3://BUCKET/PREFIX, or gs://BUCKET/PREFIX, in letters, "
            "digits, dots, dashes, and underscores; it is an address of another kind, or holds "
            "more: credentials and the endpoint belong into the environment"
        )


def _check_places(sweep: Sweep) -> None:
    """Check where files and study go; nothing of a secret is repeated in a message."""
    url = sweep.study_url or ""
    # The sweep file is copied to the storage, and the address into messages.
    authority, _, query = url.partition("://")[2].partition("?")
    user, at, _ = authority.rpartition("@")
    if (at and ":" in user) or "password=" in query or "sslpassword=" in query:
        raise InputError(
            "study_url must hold no password; it does: take it out, and set PGPASSWORD or write "
            "~/.pgpass"
        )
    if is_object_storage(sweep.storage) and not url.startswith("postgresql"):
        raise InputError(
            "study_url must be a PostgreSQL server's where storage is an object storage, which no "
            f"database file can lie in; got {url.partition(':')[0] or 'none'}: set study_url, such "
            "as postgresql://USER@HOST/DATABASE"
        )


def _check_params(sweep: Sweep) -> None:
    params = dataclasses.asdict(sweep.params)
    _one_of(params["backbone"], BACKBONES, "params.backbone")
    for name, (low, high) in PARAM_LIMITS.items():
        _within(f"params.{name}", params[name], low, high)
    for name, domain in sweep.space.items():
        dotted = f"space.{name}"
        if isinstance(domain, Choice):
            for choice in domain.choices:
                if name in PARAM_LIMITS:
                    _within(dotted, typing.cast("float", choice), *PARAM_LIMITS[name])
                else:
                    _one_of(choice, BACKBONES, dotted)
        else:
            _within(f"{dotted}.low", domain.low, *PARAM_LIMITS[name])
            _within(f"{dotted}.high", domain.high, *PARAM_LIMITS[name])
        _check_baseline(name, domain, params[name])


def _check_sampler(sweep: Sweep) -> None:
    """Check what a sampler would refuse only once the sweep runs."""
    if sweep.search.sampler == "cma_es" and all(
        isinstance(d, Choice) for d in sweep.space.values()
    ):
        raise InputError(
            "search.sampler cma_es must have a range to search; space has only choices: use tpe"
        )
    if sweep.objectives is not None and sweep.search.sampler in ("tpe", "cma_es"):
        raise InputError(
            "search.sampler must be gp, random, or grid with two objectives; got "
            f"{sweep.search.sampler}, which knows one"
        )
    if sweep.search.sampler == "grid":
        num_points = num_grid_points(sweep.space)
        if sweep.search.num_trials > num_points + 1:
            raise InputError(
                f"search.num_trials must be at most {num_points + 1} with the grid sampler, the "
                f"baseline and {num_points} points; got {sweep.search.num_trials}"
            )


def _check_baseline(name: str, domain: Domain, value: Any) -> None:
    """A baseline outside the space could not be told to the sampler."""
    if isinstance(domain, Choice):
        inside, shown = value in domain.choices, list(domain.choices)
    else:
        inside, shown = domain.low <= value <= domain.high, [domain.low, domain.high]
    if not inside:
        raise InputError(
            f"params.{name}, the baseline's value, must lie in space.{name} {shown}; got {value}: "
            f"set params.{name}"
        )


def _check_gpus(gpus_per_trial: float) -> None:
    if not (0 <= gpus_per_trial <= 1):
        raise InputError(
            "resources.gpus_per_trial must be in [0, 1]: a trial trains on one device or a "
            f"fraction of one; got {gpus_per_trial:g}"
        )


def _within(dotted: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{dotted} must be in [{low:.10g}, {high:.10g}]; got {value:.10g}")


def _one_of(value: Any, allowed: Sequence[Any], dotted: str) -> Any:
    if value not in allowed:
        raise InputError(
            f"{dotted} must be one of {', '.join(map(str, allowed))}; got {_shown(value)}"
            + _nearest(value, allowed)
        )
    return value


def _check_keys(dotted: str, given: Mapping[Any, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            where = f" in {dotted}" if dotted else ""
            remedy = _nearest(key, known) or f"; known are {', '.join(sorted(known))}"
            raise InputError(f"unknown key {_shown(key)}{where}{remedy}")


def _nearest(value: Any, allowed: Sequence[Any] | set[str]) -> str:
    options = [str(option) for option in allowed]
    near = difflib.get_close_matches(_shown(value).strip("'"), options, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    try:
        text = "null" if value is None else repr(value)  # as YAML has it
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        return "a number too long to print"
    return text if len(text) <= 80 else text[:77] + "..."


def _join(dotted: str, name: str) -> str:
    return f"{dotted}.{name}" if dotted else name


def _dump_domain(domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return list(domain.choices)
    return dataclasses.asdict(domain)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return value
