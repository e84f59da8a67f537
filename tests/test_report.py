"""The report: what it compares, that it says what there is, and that it is one page for anybody."""

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from chromium import headless_chromium
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from lightning_modules.data.manifest import COLUMNS, Manifest
from lightning_modules.data.phantom import PhantomSettings
from search.cli import main
from search.config import dump_sweep
from search.pareto import pareto_front
from search.report.findings import compare_at_rungs, read_findings
from search.report.importance import best_share, measure_importance
from search.report.scales import linear, logarithmic, range_of
from search.report.svg import spread
from search.space import to_distributions
from search.study.record import Record
from search.study.recorded import Epoch
from search.sweep import DataSettings, SchedulerSettings, SearchSettings, Sweep, TrainingSettings

RUN_BY = "ann-smiths-laptop"
EVIL = "<script>alert(1)</script>"

Curve = list[float | None]


def make_record(storage: Path, name: str = "swept", **facts: Any) -> Record:
    """A sweep of up to 9 epochs, compared at 1, 3, and 9; nothing is trained."""
    metric = facts.pop("metric", "val_macro_f1")
    sweep = Sweep(
        name=name,
        storage=str(storage),
        metric=metric,
        data=DataSettings(phantom=PhantomSettings()),
        weights={"mobilenet_v2": "random", "resnet50": "random"},
        training=TrainingSettings(max_epochs=9),
        search=SearchSettings(num_trials=4, sampler="random"),
        scheduler=SchedulerSettings(grace_period_epochs=1, reduction_factor=3),
    )
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "sweep.yaml").write_text(dump_sweep(sweep))
    common: dict[str, Any] = {
        "classes": ["glioma", "none"],
        "manifest_digest": "a" * 64,
        "pack_digest": "b" * 64,
        "skipped_images": ["patients/ann_smith.png"],
        "weights": {
            "resnet50": {
                "origin": f"/data/{RUN_BY}",
                "path": f"/data/{RUN_BY}/r.pth",
                "digest": "c",
            }
        },
        "versions": {"torch": "2.15.0"},
        "leakage": {},
    }
    return Record.create(sweep, common | facts)


def add_trial(record: Record, values: Curve, stopped: str) -> int:
    number = record.draw().number
    for epoch, value in enumerate(values, start=1):
        record.add_epoch(
            number,
            Epoch(
                epoch=epoch,
                metrics={record.sweep.metric: value, "epoch_s": 2.0 + number},
                confusion=[[1, 0], [0, 1]],
                last=None,
                best=None,
                stopped=stopped if epoch == len(values) else "",
                features="computed",
                ran_on=f"{RUN_BY} cpu 32-true",
            ),
        )
    return number


def fill(record: Record) -> None:
    """Four trials: one that ran to the end, one stopped at 3, one that diverged, one that runs."""
    add_trial(record, [0.4, 0.5, 0.6, 0.65, 0.7, 0.7, 0.69, 0.72, 0.71], "max_epochs")
    add_trial(record, [0.3, 0.55, 0.5], "asha")
    add_trial(record, [0.2, None], "diverged")
    add_trial(record, [0.45, 0.46], "")


class Page(HTMLParser):
    """What a browser finds in a page: elements with attributes, and the text of each kind."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open, data))

    @property
    def shown(self) -> str:
        """All text, but not what is in scripts and styles."""
        found = [text for tag, text in self.texts if tag not in ("script", "style")]
        return " ".join(" ".join(found).split())

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]


def report(storage: Path, *arguments: str) -> Page:
    out = storage / "page.html"
    main(["report", *(arguments or ("swept",)), "--storage", str(storage), "--out", str(out)])
    return Page(out.read_text("utf-8"))


def refused(capsys: pytest.CaptureFixture[str], storage: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["report", *arguments, "--storage", str(storage)])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not list(storage.rglob("*.html"))
    return line


# What is compared


def test_trials_are_compared_at_epochs_that_each_has_reached(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    fill(record)
    first, second, last = compare_at_rungs(record.trials(), record.sweep)
    # By the best value up to the epoch, worked out from the curves of `fill`.
    assert (first.epoch, first.values) == (1, {0: 0.4, 1: 0.3, 3: 0.45})
    assert (second.epoch, second.values) == (3, {0: 0.6, 1: 0.55})
    assert (last.epoch, last.values) == (9, {0: 0.72})
    # The one that diverged had a value at epoch 1, which says nothing good of it.
    assert [rung.diverged for rung in (first, second, last)] == [(2,)] * 3
    assert [rung.num_trials for rung in (first, second, last)] == [4, 3, 2]


def test_a_crash_says_nothing_of_a_trials_params(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    add_trial(record, [0.4], "")
    record.finish(0, "failed", "OutOfMemoryError")
    assert [rung.num_trials for rung in compare_at_rungs(record.trials(), record.sweep)] == [0] * 3


def decided_by_lr(storage: Path, num_trials: int = 60) -> Record:
    """Trials of one epoch, whose value is that of their learning rate."""
    record = make_record(storage)
    for _ in range(num_trials):
        trial = record.draw()
        value = 1 - abs(np.log10(trial.params.lr) + 3) / 4
        epoch = {"epoch": 1, "metrics": {"val_macro_f1": value}, "confusion": [], "stopped": "asha"}
        record.add_epoch(
            trial.number, Epoch(last=None, best=None, features="", ran_on="here cpu 32", **epoch)
        )
    return record


@pytest.mark.slow
def test_the_param_that_decides_is_the_important_one(tmp_path: Path) -> None:
    findings = read_findings(decided_by_lr(tmp_path))
    found = measure_importance(findings, findings.rungs[0])
    assert next(iter(found)) == "lr"
    assert found["lr"].share > 0.7
    assert found["lr"].low > 1 / 4  # an equal share
    assert found["lr"].p_value < 0.02
    assert all(found[name].p_value > 0.05 for name in ("dropout", "backbone"))
    assert sum(one.share for one in found.values()) == pytest.approx(1)


def test_importance_is_optunas_own_of_a_study_with_these_values(tmp_path: Path) -> None:
    record = decided_by_lr(tmp_path, 30)
    findings = read_findings(record)
    study = optuna.create_study(direction="maximize")
    for trial in findings.trials:
        params = {name: getattr(trial.params, name) for name in record.sweep.space}
        study.add_trial(
            optuna.trial.create_trial(
                value=findings.values[trial.number],
                params=params,
                distributions=to_distributions(record.sweep.space),
            )
        )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=5 / 30)
    expected = get_param_importances(study, evaluator=evaluator)
    found = measure_importance(findings, findings.rungs[0], num_resamples=2)
    assert {name: one.share for name, one in found.items()} == pytest.approx(expected)


def test_the_best_are_a_tenth_of_the_trials_but_at_least_five() -> None:
    assert [best_share(number) for number in (15, 50, 1000)] == pytest.approx([1 / 3, 0.1, 0.1])


def test_the_pareto_front_has_what_no_other_beats_in_both() -> None:
    found = {
        0: (1.0, 0.5),
        1: (2.0, 0.7),
        2: (3.0, 0.6),
        3: (2.0, 0.65),
        4: (5.0, 0.9),
        5: (1.0, 0.4),
    }
    assert pareto_front(found, "max") == [0, 1, 4]
    assert pareto_front(found, "min") == [5]


# How it is drawn


def test_axes_put_values_where_they_belong() -> None:
    scale = logarithmic(1e-4, 1e-2, 0, 100)
    assert [scale(value) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0, 50, 100])
    assert [label for _, label in scale.ticks] == ["0.0001", "0.001", "0.01"]
    assert scale(1.0) == 100  # beyond the end
    upright = linear(0.52, 0.71, 200, 0)
    assert [label for _, label in upright.ticks] == ["0.50", "0.55", "0.60", "0.65", "0.70", "0.75"]
    assert upright(0.6) == pytest.approx(120)
    assert [label for _, label in logarithmic(2e-3, 3e-3, 0, 1).ticks] == ["0.002", "0.003"]


def test_a_few_values_that_are_far_off_do_not_press_the_others_into_a_line() -> None:
    losses = [0.5 + index / 1000 for index in range(99)] + [1e9]
    low, high = range_of(losses, "min")
    assert low == 0.5
    assert high < 1
    assert range_of([0.5, 0.6, 0.7], "max") == pytest.approx((0.5, 0.7))


def test_labels_keep_their_distance_and_their_order() -> None:
    moved = spread([10, 11, 50], 15)
    assert moved[1] - moved[0] == pytest.approx(15)
    assert sorted(moved) == moved
    assert sum(moved) == pytest.approx(71)


# What the page says


def test_the_page_says_what_was_recorded(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    fill(record)
    page = report(tmp_path)
    for said in (
        "Research use only, not a medical device.",
        "val_macro_f1 0.7200, trial 0, epoch 8 of 9, on validation images",
        "4 of 4: ",
        "1 complete, 1 stopped early, 1 diverged, 1 running",
        "16 trained of 36 without early stopping",
        "swept has not come to its end.",
        "Not confirmed",
        "1 images could not be read and were left out.",
        "at most 4 have reached the same epoch",
        "cpu 32-true",
    ):
        assert said in page.shown, said
    rows = [attributes["data-t"] for tag, attributes in page.elements if tag == "tr" and attributes]
    assert rows == ["s:0", "s:1", "s:3", "s:2"]
    # A mark in both histories, all four slices, and the map of its backbone; a line in two plots.
    marks = [tag for tag, attributes in page.elements if attributes.get("data-t") == "s:0"]
    assert (marks.count("polyline"), marks.count("tr")) == (2, 1)


@pytest.mark.parametrize("metric", ["val_macro_f1", "val_loss"])
def test_the_best_is_the_best_whichever_way_the_metric_goes(tmp_path: Path, metric: str) -> None:
    record = make_record(tmp_path, metric=metric)
    add_trial(record, [0.5] * 9, "max_epochs")
    add_trial(record, [0.3] * 9, "max_epochs")
    best = {"val_macro_f1": "0.5000, trial 0", "val_loss": "0.3000, trial 1"}[metric]
    assert f"{metric} {best}" in report(tmp_path).shown


def test_the_forecast_stands_beside_what_came_of_it(tmp_path: Path) -> None:
    forecast = {
        "duration_s": {"low": 600, "middle": 1200, "high": 1800},
        "epochs": {"low": 10, "middle": 14, "high": 20},
    }
    fill(make_record(tmp_path, forecast=forecast, actual={"duration_s": 1500, "epochs": 16}))
    said = "Forecast 20 min [10 min, 30 min], epochs 14 [10, 20]; actual 25 min (+25%), epochs 16"
    assert said in " ".join(report(tmp_path).shown.split())


def test_leakage_is_said_first(tmp_path: Path) -> None:
    fill(make_record(tmp_path, leakage={"pictures": 35, "images": 71}))
    page = report(tmp_path)
    assert "swept was launched although 35 pictures (71 images) lie in two splits" in page.shown
    alarm = next(i for i, (_, a) in enumerate(page.elements) if a.get("class") == "alarm")
    assert alarm < next(i for i, (tag, _) in enumerate(page.elements) if tag == "main")


def test_a_confirmation_is_shown_with_its_doubt(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    fill(record)
    row = {"values": [0.6, 0.7], "mean": 0.65, "low": 0.1, "high": 1.2, "probability_best": 0.6}
    rival = {
        f"over_rival_{name}": value for name, value in (("mean", 0.01), ("low", -1), ("high", 1))
    }
    candidates = [{"number": n, "rival": 1 - n, **row, **rival} for n in (1, 0)]
    record.add_fact(
        "confirmation",
        {
            "num_trials": 4, "winner": 1, "metric": "val_macro_f1", "num_seeds": 2,
            "candidates": candidates,
        },
    )  # fmt: skip
    shown = report(tmp_path).shown
    assert "No clear winner: trial 1 has the best mean, 0.6500, not told from trial 0" in shown
    assert "0.6500 [0.1000, 1.2000]" in shown


def test_what_a_backbone_costs_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    record = make_record(
        tmp_path,
        costs={
            "mobilenet_v2": {"latency_ms": 3.0, "size_mib": 9.0},
            "resnet50": {"latency_ms": 17.0, "size_mib": 90.0},
        },
    )
    fill(record)
    assert "val_macro_f1 against latency of one image" in report(tmp_path).shown


# Who may read it


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        [
            (f"{index}.png", label, f"ann_smith_{index}", f"{EVIL}\u202e&amp;", split)
            for index, (label, split) in enumerate(
                [(EVIL, "train"), ("'\"><img src=x>", "val"), (EVIL, "test")]
            )
        ],
        columns=list(COLUMNS),
    )
    manifest = Manifest(tmp_path, frame)
    record = make_record(
        tmp_path, manifest_digest=manifest.digest, versions={EVIL: f"</style>{EVIL}"}
    )
    manifest.write(record.sweep.folder / "manifest.csv")
    fill(record)
    page = report(tmp_path)
    assert EVIL in page.shown
    assert "'\"><img src=x>" in page.shown
    assert "\u202e" not in page.shown  # which would turn the line around
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("style"), tags.count("img")) == (1, 1, 0)
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]


def test_no_host_folder_or_group_is_named(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    fill(record)
    report(tmp_path)
    source = (tmp_path / "page.html").read_text("utf-8")
    for secret in (RUN_BY, str(tmp_path), "ann_smith", "/data/"):
        assert secret not in source, secret


def test_the_page_names_nothing_outside_itself_and_its_policy_is_of_its_own_text(
    tmp_path: Path,
) -> None:
    fill(make_record(tmp_path))
    page = report(tmp_path)
    ids = set(page.attributes("id"))
    assert {link.removeprefix("#") for link in page.attributes("href")} <= ids
    assert page.attributes("src") == []
    assert page.attributes("style") == []
    [policy] = [c for c in page.attributes("content") if c.startswith("default-src")]
    for kind in ("style", "script"):
        text = "".join(text for tag, text in page.texts if tag == kind)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


# Bundles


def bundle_of(record: Record, folder: Path, **changes: Any) -> Path:
    """A bundle's files but the models, as far as a report reads them."""
    folder.mkdir()
    trial = record.trial(0)
    config = {
        "format": 2,
        "classes": ["glioma", EVIL],
        "input": {"image_size_px": 96},
        "temperature": 1.5,
        "digests": {"model.onnx": "d" * 64},
        "trial": {"sweep": record.sweep.name, "number": 0, "seed": trial.seed, "epoch": 8},
        "data": {"pack_digest": "b" * 64, "manifest_digest": "a" * 64},
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    figures = {"macro_f1": {"value": 0.8123, "low": 0.7, "high": 0.9}}
    log = [{"date": "2026-11-22T18:52:20+00:00", "as": "evaluated", "figures": figures, "run": 2}]
    (folder / "evaluations.json").write_text(json.dumps(log))
    internal = {
        **figures,
        "confusion": {"classes": ["glioma", EVIL], "counts": [[9, 1], [2, 8]]},
        "calibration": {
            "reliability_after": [
                {"confidence": 0.9, "accuracy": 0.8, "num_images": 5},
                {"x": EVIL},
            ]
        },
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(
        json.dumps({"bundle": {"model_digest": "d" * 64}, "internal": internal})
    )
    (folder / "explanation").mkdir()
    (folder / "explanation" / "map.png").write_bytes(b"\x89PNG\r\n\x1a\nmap")
    (folder / "explanation" / "page.png").write_bytes(f"<svg>{EVIL}</svg>".encode())
    (folder.parent / "beside.png").write_bytes(b"\x89PNG\r\n\x1a\nbeside")
    cases = [
        {"kind": "wrong", "label": EVIL, "files": {"grad_cam": {"overlay": name}}}
        for name in ("map.png", "page.png", "../../beside.png", "/etc/hostname")
    ]
    (folder / "explanation" / "explanation.json").write_text(
        json.dumps({"model": {"model.onnx": "d" * 64}, "images": cases, "tests": {"deletion": 0.4}})
    )
    return folder


def test_a_bundles_results_stand_beside_the_search(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    fill(record)
    bundle = bundle_of(record, tmp_path / "winner")
    page = report(tmp_path, "swept", "--bundle", str(bundle))
    assert "0.812 [0.70, 0.90]" in page.shown
    assert "look 2, which is no first one, at these test images" in page.shown
    assert "After temperature scaling" in page.shown
    assert "deletion 0.4" in page.shown
    assert [tag for tag, _ in page.elements].count("script") == 1
    # Not without being asked for.
    assert page.attributes("src") == []


def test_images_are_shown_only_where_asked_for_and_only_the_bundles_own(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    fill(record)
    bundle = bundle_of(record, tmp_path / "winner")
    page = report(tmp_path, "swept", "--bundle", str(bundle), "--images")
    data = base64.b64encode(b"\x89PNG\r\n\x1a\nmap").decode()
    assert page.attributes("src") == [f"data:image/png;base64,{data}"]
    [policy] = [c for c in page.attributes("content") if c.startswith("default-src")]
    assert policy.endswith("img-src data:")


def test_results_of_another_model_are_left_out(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    fill(record)
    bundle = bundle_of(record, tmp_path / "winner", digests={"model.onnx": "e" * 64})
    page = report(tmp_path, "swept", "--bundle", str(bundle))
    assert "After temperature scaling" not in page.shown
    assert "deletion 0.4" not in page.shown


# Several sweeps


def test_sweeps_of_the_same_images_stand_side_by_side(tmp_path: Path) -> None:
    for name in ("one", "other"):
        fill(make_record(tmp_path, name))
    page = report(tmp_path, "one", "other")
    assert "one and other: sweep report" in page.shown
    assert "Side by side" in page.shown
    keys = {key.split(":")[0] for key in page.attributes("data-t")}
    assert keys == {"s0", "s1"}
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))


# What is refused


Make = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("make", "arguments", "line"),
    [
        (
            lambda p: (
                fill(make_record(p, "one")), fill(make_record(p, "two", pack_digest="f" * 64))
            ),
            ["one", "two", "--out", "page.html"],
            "one has pack_digest bbbbbbbbbbbb and two ffffffffffff: write a report of each",
        ),
        (
            lambda p: (fill(make_record(p, "one")), fill(make_record(p, "two", metric="val_loss"))),
            ["one", "two", "--out", "page.html"],
            "one by val_macro_f1, two by val_loss: write a report of each",
        ),
        (
            lambda p: fill(make_record(p, "one")),
            ["one", "one", "--out", "page.html"],
            "a report names each sweep once",
        ),
        (
            lambda p: make_record(p, "one"),
            ["one", "--out", "page.html"],
            "a trial of one must have reported val_macro_f1",
        ),
        (
            lambda p: fill(make_record(p, "one")),
            ["one", "--out", "sweep.yaml"],
            "got sweep.yaml: give a name that ends in .html",
        ),
        (
            lambda p: fill(make_record(p, "one")),
            ["one", "--out", "nowhere/page.html"],
            "a report goes into a folder that can be written",
        ),
        (
            lambda p: fill(make_record(p, "one")),
            ["one", "--out", "page.html", "--images"],
            "--images shows overlays of a bundle; got no bundle",
        ),
        (
            lambda p: (record := make_record(p, "one"), fill(record),
                       bundle_of(record, p / "b", data={})),
            ["one", "--out", "page.html", "--bundle", "b"],
            "b was not made of their trials and images",
        ),
    ],
    ids=["other images", "other metric", "twice", "nothing yet", "no page", "no folder",
         "no bundle", "other bundle"],
)  # fmt: skip
def test_a_mistake_ends_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Make,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    assert line in refused(capsys, tmp_path, *arguments)


# In a browser


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two sweeps, one of a hundred trials, with names that try to run, and a bundle."""
    storage = tmp_path_factory.mktemp("hundred")
    record = make_record(storage, versions={EVIL: EVIL})
    rng = np.random.default_rng(0)
    with record.being_written():
        fill(record)
        for _ in range(96):
            num_epochs, stopped = ((1, "asha"), (3, "asha"), (9, "max_epochs"))[rng.integers(0, 3)]
            add_trial(record, list(rng.random(num_epochs)), stopped)
    fill(make_record(storage, "other"))
    bundle = bundle_of(record, storage / "winner")
    out = storage / "page.html"
    main(["report", "swept", "other", "--storage", str(storage), "--bundle", str(bundle), "--out",
          str(out)])  # fmt: skip
    assert out.stat().st_size < 2**20
    return out


@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_of_and_loads_nothing(
    hundred: Path, tmp_path: Path
) -> None:
    with headless_chromium(tmp_path) as browser:
        for scheme in ("light", "dark"):
            browser.call(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}],
            )
            browser.events.clear()
            browser.open(hundred)
            browser.evaluate("dispatchEvent(new Event('beforeprint'))")
            assert browser.complaints() == []
            assert browser.requests() == [hundred.as_uri()]
        for width_px in (400, 1200):
            browser.call(
                "Emulation.setDeviceMetricsOverride",
                width=width_px, height=900, deviceScaleFactor=1, mobile=False,
            )  # fmt: skip
            # No part of it makes the page scroll sideways.
            assert browser.evaluate("document.documentElement.scrollWidth") == width_px
        # It would be seen: a script that is not the page's own, and an image from elsewhere.
        bad = tmp_path / "bad.html"
        source = hundred.read_text("utf-8")
        added = '<script>alert(1)</script><img src="https://example.org/a.png">'
        bad.write_text(source.replace("</main>", f"{added}</main>", 1), "utf-8")
        browser.events.clear()
        browser.open(bad)
        assert any("script" in line for line in browser.complaints())
        assert any("example.org" in line for line in browser.complaints())


@pytest.mark.slow
def test_a_trial_is_found_in_all_plots_and_tables_sort_by_keyboard(
    hundred: Path, tmp_path: Path
) -> None:
    with headless_chromium(tmp_path) as browser:
        browser.open(hundred)
        # The keyboard: focus on a row points its trial out; Enter keeps it; arrows go on.
        browser.evaluate("document.querySelector('.sortable tbody tr').focus()")
        press(browser, "Enter")
        first = browser.evaluate("document.activeElement.dataset.t")
        marks = browser.evaluate(f"document.querySelectorAll('svg [data-t=\"{first}\"]').length")
        shown = browser.evaluate("document.querySelectorAll('.over > *').length")
        assert shown == marks > 5
        press(browser, "ArrowDown")
        assert browser.evaluate("document.activeElement.rowIndex") == 2
        press(browser, "Escape")
        browser.evaluate("document.activeElement.blur()")
        assert browser.evaluate("document.querySelectorAll('.over > *').length") == 0
        # Sorted by trial, up, then down; what has no value is last either way.
        column = (
            "[...document.querySelector('.sortable').tBodies[0].rows]"
            ".map(row => +row.cells[0].textContent)"
        )
        browser.evaluate("document.querySelector('.sortable th button').focus()")
        press(browser, "Enter")
        assert browser.evaluate(column) == list(range(100))
        press(browser, "Enter")
        assert browser.evaluate(column) == list(range(99, -1, -1))
        head = "document.querySelector('.sortable th').getAttribute('aria-sort')"
        assert browser.evaluate(head) == "descending"
        # The pointer near a mark: its trial's row, as a note.
        browser.evaluate("document.querySelector('#s0-history').scrollIntoView()")
        at = browser.evaluate(
            "(() => { const box = document.querySelector('figure use[data-t=\"s0:0\"]')"
            ".getBoundingClientRect(); return [box.x + 3, box.y + 3]; })()"
        )
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
        told = (
            "new Promise(done => setTimeout("
            "() => done(document.getElementById('tip').textContent), 300))"
        )
        assert browser.evaluate(told).startswith("trial0statecompleteval_macro_f10.7200")
        # A range of the last axis, which is the metric: its better half.
        browser.evaluate("document.querySelector('.upright').scrollIntoView({block: 'center'})")
        box = browser.evaluate(
            "(() => { const b = [...document.querySelectorAll('#s0 .grip')].at(-1)"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y, b.height]; })()"
        )
        for kind, share in (("mousePressed", 0.02), ("mouseMoved", 0.5), ("mouseReleased", 0.5)):
            browser.call(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1] + share * box[2],
                button="left", buttons=1, clickCount=1,
            )  # fmt: skip
        kept = browser.evaluate(
            "[...document.querySelectorAll('#s0 .sortable tr:not(.off)')].slice(1)"
            ".map(row => +row.cells[2].textContent)"
        )
        assert 10 < len(kept) < 90
        # Half way up an axis from 0 to 1.
        assert min(kept) > 0.47
        assert f"{len(kept)} of 99" in browser.evaluate(
            "document.querySelector('.count').textContent"
        )
        press(browser, "Escape")
        assert browser.evaluate("document.querySelectorAll('.off').length") == 0
        assert browser.complaints() == []


def press(browser: Any, key: str) -> None:
    code = {"Enter": 13, "Escape": 27, "ArrowDown": 40}[key]
    text = {"text": "\r"} if key == "Enter" else {}
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
            **(text if kind == "keyDown" else {}),
        )  # fmt: skip


def test_nothing_of_the_sweep_is_changed(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    fill(record)
    before = [dataclasses.asdict(trial) for trial in record.trials()]
    report(tmp_path)
    assert [dataclasses.asdict(trial) for trial in Record.open(record.sweep).trials()] == before
    names = {re.sub(r"-(wal|shm)$", "", path.name) for path in record.sweep.folder.iterdir()}
    assert names == {"study.db", "sweep.yaml"}
