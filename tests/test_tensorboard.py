"""What TensorBoard shows: read from event files, asked of its server, and seen in a browser."""

import dataclasses
import http.client
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_modules.data.phantom import PhantomSettings
from search.results import open_sweep
from search.space import Choice, Float, Int
from search.study.record import Record
from search.sweep import DataSettings, SearchSettings, Sweep, TrialParams
from search.tuning.events import EpochDone, TrialEnded, TrialStarted
from search.tuning.standing import Standing
from search.tuning.sweep_board import SweepBoard
from search.watch import tensorboard_command, tunnel_command

BY_TRIALS = "all trials/1 best so far by trials"
BY_SECONDS = "all trials/2 best so far by seconds"
OWN = "all trials/3 best of each trial"


def make_sweep(folder: Path, **settings: Any) -> Sweep:
    return Sweep(
        name="shown",
        storage=str(folder),
        data=DataSettings(phantom=PhantomSettings()),
        search=SearchSettings(num_trials=3),
        **settings,
    )


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def play(standing: Standing, board: SweepBoard, clock: Clock, number: int, *values: float) -> None:
    """A trial whose epochs take ten seconds each."""
    name, params = f"{number:05d}", dataclasses.asdict(TrialParams())
    events: list[Any] = [TrialStarted(trial=number, name=name, params=params, epochs_done=0)]
    for index, value in enumerate(values):
        best = max(values[: index + 1])
        events.append(
            EpochDone(
                trial=number, name=name, epoch=index + 1, max_epochs=12, metric="val_macro_f1",
                value=value, best=best, metrics={}, next_rung=None, cutoff=None, features="",
                left_s=None,
            )
        )  # fmt: skip
    events.append(
        TrialEnded(
            event="finished", trial=number, name=name, reason="max_epochs", epochs=len(values),
            metric="val_macro_f1", value=values[-1], best=max(values), cutoff=None,
        )
    )  # fmt: skip
    for event in events:
        clock.now_s += 10 if isinstance(event, EpochDone) else 0
        standing.take(event)
        board.show(event)


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(tag)]


def columns(run: Path) -> Any:
    events = EventAccumulator(str(run))
    events.Reload()
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content).experiment


def test_the_best_so_far_grows_with_trials_and_with_time(tmp_path: Path) -> None:
    sweep, clock = make_sweep(tmp_path), Clock()
    standing = Standing(sweep, clock=clock)
    board = SweepBoard(standing)
    board.start()
    play(standing, board, clock, 0, 0.5, 0.4)
    play(standing, board, clock, 1, 0.3)
    board.close()
    run = sweep.folder / "tensorboard" / "sweep"
    assert scalars(run, BY_TRIALS) == [(1, 0.5), (2, 0.5)]
    assert scalars(run, BY_SECONDS) == [(10, 0.5), (20, 0.5), (30, 0.5)]
    assert scalars(run, OWN) == [(1, 0.5), (2, 0.3)]


def test_a_resumed_sweep_goes_on_where_its_curves_end(tmp_path: Path) -> None:
    sweep, clock = make_sweep(tmp_path), Clock()
    standing = Standing(sweep, clock=clock)
    board = SweepBoard(standing)
    board.start()
    play(standing, board, clock, 0, 0.5)
    board.close()
    # What the record holds is what this standing knows; the clock of a new process starts anew.
    standing._start_s = clock()
    # Nor is it up within the same second: TensorBoard orders files by the second of their opening.
    time.sleep(1)
    again = SweepBoard(standing)
    again.start()
    play(standing, again, clock, 1, 0.6)
    again.close()
    run = sweep.folder / "tensorboard" / "sweep"
    assert scalars(run, BY_SECONDS) == [(10, 0.5), (10, 0.5), (20, 0.6), (20, 0.6)]
    assert scalars(run, BY_TRIALS) == [(1, 0.5), (2, 0.6)]


def test_every_param_is_a_column_and_the_searched_ones_come_first(tmp_path: Path) -> None:
    space = {
        "backbone": Choice(choices=("resnet50", "vit_b_16")),
        "unfreeze_depth": Int(low=3, high=5),
        "lr": Float(low=1e-4, high=1e-2, log=True),
        "batch_size": Choice(choices=(16, 64)),
    }
    sweep = make_sweep(tmp_path, space=space, params=TrialParams(unfreeze_depth=0, batch_size=32))
    board = SweepBoard(Standing(sweep))
    board.start()
    board.close()
    experiment = columns(sweep.folder / "tensorboard" / "sweep")
    infos = {info.name: info for info in experiment.hparam_infos}
    assert set(infos) == set(TrialParams.__dataclass_fields__)
    assert {name for name, info in infos.items() if info.differs} == set(space)
    # HParams leaves out what is not among these values: the baseline has to be.
    assert list(infos["backbone"].domain_discrete) == ["mobilenet_v2", "resnet50", "vit_b_16"]
    assert list(infos["batch_size"].domain_discrete) == [16, 32, 64]
    depths = infos["unfreeze_depth"].domain_interval
    assert (depths.min_value, depths.max_value) == (0, 5)
    assert list(infos["dropout"].domain_discrete) == [0.3]


def test_a_disk_that_takes_no_events_does_not_end_the_sweep(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    sweep.folder.mkdir()
    (sweep.folder / "tensorboard").write_text("in the way")
    standing = Standing(sweep)
    board = SweepBoard(standing)
    board.start()
    play(standing, board, Clock(), 0, 0.5)
    board.close()


@pytest.mark.slow
def test_pictures_of_pure_noise_stay_below_a_megabyte() -> None:
    """Nothing is larger as PNG: so no trial's is, at any image size and any number of classes."""
    from PIL import Image
    from torch import rand

    from search.tuning.figures import draw_confusion, draw_pairs, draw_reliability, tile
    from search.tuning.pictures import MAX_MISTAKES, MAX_VIEW_PX, NUM_VIEWS

    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (MAX_MISTAKES, 224, 224), dtype=np.uint8)
    colour = rng.integers(0, 256, (MAX_MISTAKES, 224, 224, 3), dtype=np.uint8)
    views = tile(rand(NUM_VIEWS, 1, MAX_VIEW_PX, MAX_VIEW_PX))
    probabilities = rng.dirichlet([1.0] * 10, 500)
    pictures = [
        draw_pairs(grey, list(colour), ["stroke, taken for no_stroke 0.93"] * MAX_MISTAKES),
        draw_confusion(rng.integers(0, 99, (10, 10)), tuple(f"class_{i}" for i in range(10))),
        draw_reliability(probabilities, rng.integers(0, 10, 500)),
        *[views] * 3,
    ]
    num_bytes = 0
    for picture in pictures:
        buffer = io.BytesIO()
        pixels = picture.transpose(1, 2, 0)
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
        num_bytes += buffer.tell()
    assert num_bytes < 1_000_000


@pytest.mark.slow
def test_a_caption_is_cut_where_the_pictures_end() -> None:
    from search.tuning.figures import draw_pairs

    image = np.zeros((32, 32), np.uint8)
    overlay = np.zeros((32, 32, 3), np.uint8)
    short, long = (draw_pairs([image], [overlay], ["名 $x^2$" * n]) for n in (1, 100))
    assert short.shape == long.shape
    assert short.shape[0] == 3


def test_mistakes_are_the_most_confident_first() -> None:
    from search.tuning.pictures import worst_mistakes

    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.55, 0.45]])
    labels = np.array([0, 0, 0, 1])
    assert worst_mistakes(probabilities, labels, 8) == [1, 2, 3]
    assert worst_mistakes(probabilities, labels, 2) == [1, 2]
    assert worst_mistakes(probabilities, probabilities.argmax(axis=1), 8) == []


@pytest.mark.parametrize(
    ("connection", "expected"),
    [
        ("", None),
        ("192.0.2.7 50000 192.0.2.1 22", "@192.0.2.1"),
        ("192.0.2.7 50000 2001:db8::1 2222", "-p 2222 {user}@2001:db8::1"),
        ("a b $(reboot) 22", None),
    ],
)
def test_who_came_by_ssh_is_told_the_tunnel(
    connection: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", connection)
    monkeypatch.setenv("LOGNAME", "ada")
    found = tunnel_command()
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith("ssh -N -L 6006:localhost:6006 ")
        assert found.endswith(expected.format(user="ada"))


def test_the_command_survives_a_blank_in_the_path(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "a b")
    folder = f"'{sweep.folder}/tensorboard'"
    assert tensorboard_command(sweep) == f"tensorboard --host 127.0.0.1 --logdir {folder}"


# The server and a browser


@pytest.fixture(scope="module")
def address(tiny_sweeps: Path) -> Iterator[str]:
    """Where TensorBoard, started with the printed command, shows a sweep that has run."""
    words = tensorboard_command(open_sweep("tiny", tiny_sweeps)).split()
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:], "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        said = ""
        while "http://" not in said:
            line = server.stdout.readline()
            assert line, f"TensorBoard ended: {said}"
            said += line
        found = re.search(r"http://(127\.0\.0\.1:\d+)/", said)  # and nowhere else
        assert found is not None, said
        yield found[1]
    finally:
        server.terminate()
        server.communicate(timeout=60)


def ask(address: str, path: str, question: Any = None) -> Any:
    connection = http.client.HTTPConnection(address, timeout=60)
    if question is None:
        connection.request("GET", path)
    else:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(question), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    return json.loads(answer.read())


@pytest.mark.cluster
def test_the_hparams_tab_has_every_trial_with_its_best_value(
    address: str, tiny_sweeps: Path
) -> None:
    record = Record.open(open_sweep("tiny", tiny_sweeps))
    trials = record.trials()
    found = ask(address, "/data/plugin/hparams/experiment", {"includeMetrics": True})
    params = [info["name"] for info in found["hparamInfos"]]
    assert params[0] == "lr"  # searched
    assert set(params) == set(TrialParams.__dataclass_fields__)
    metrics = [info["name"]["tag"] for info in found["metricInfos"]]
    assert metrics[0] == "best/val_macro_f1"
    question = {
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"hparam": name, "includeInResult": True} for name in params],
        "startIndex": 0,
        "sliceSize": 100,
    }
    deadline_s = time.monotonic() + 60  # until the server has read all runs
    while True:
        groups = ask(address, "/data/plugin/hparams/session_groups", question)["sessionGroups"]
        if len(groups) == len(trials) or time.monotonic() > deadline_s:
            break
        time.sleep(0.5)
    shown = {group["name"]: group for group in groups}
    assert set(shown) == {trial.name for trial in trials}
    for trial in trials:
        group = shown[trial.name]
        assert group["hparams"] == pytest.approx(dataclasses.asdict(trial.params), nan_ok=True)
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        f1 = [epoch.metrics["val_macro_f1"] for epoch in trial.epochs]
        losses = [epoch.metrics["val_loss"] for epoch in trial.epochs]
        assert values["best/val_macro_f1"] == pytest.approx(max(f1))
        assert values["best/val_loss"] == pytest.approx(min(losses))


@pytest.mark.cluster
def test_the_layout_of_custom_scalars_begins_with_the_sweep(address: str) -> None:
    layout = ask(address, "/data/plugin/custom_scalars/layout")["category"]
    assert [category["title"] for category in layout] == ["the sweep", "the trials, by epoch"]
    tags = [chart["multiline"]["tag"] for chart in layout[0]["chart"]]
    assert tags == [[f"^{BY_TRIALS}$"], [f"^{BY_SECONDS}$"], [f"^{OWN}$"]]
    for (pattern,) in tags:
        there = ask(address, "/data/plugin/scalars/tags")["sweep"]
        assert [tag for tag in there if re.search(pattern, tag)] == [pattern[1:-1]]


@pytest.mark.cluster
def test_the_first_page_begins_with_the_sweep_in_a_browser(address: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    page = subprocess.run(
        [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--enable-logging=stderr", "--virtual-time-budget=30000", "--dump-dom",
            f"http://{address}/",
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Uncaught" not in page.stderr
    text = re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", "\n", page.stdout)
    shown = [line.strip() for line in text.splitlines() if line.strip()]
    groups = [shown.index("all trials"), shown.index("best")]
    assert groups == sorted(groups)
    assert "1 best so far by trials" in " ".join(shown)
    # Runs, in the order of the list.
    assert shown.index("sweep") < shown.index("00000-mobilenet_v2-d0")
