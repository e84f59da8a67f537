"""Every mistake of the user ends in one line on stderr and exit code 2, before Ray starts."""

import dataclasses
import json
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import urllib.error
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml
from PIL import Image
from rich.console import Console

from lightning_modules.errors import InputError
from search import commands
from search.cli import main
from search.config import dump_sweep, load_sweep
from search.study.record import Record
from search.study.recorded import Epoch, State
from search.tuning.faults import AlikeFailuresError

COMMANDS = ("launch", "resume", "top", "report", "export", "predict")

# Eight images a class, so that any split finds enough; one backbone, so that one is built.
SWEEP = """
name: tiny
data: {path: images, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2}
space:
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder and caches that no other test sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not start: where a check is missing, fail at once."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the one line says that a command ends with."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("neurosweep: ")
    assert not ray.is_initialized()
    return line.removeprefix("neurosweep: ")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def sweep_file(text: str = SWEEP) -> Path:
    path = Path("sweep.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def image(path: Path, grey: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (32, 32), grey).save(path)
    return path


def images(*classes: str) -> Path:
    """A folder of class folders beside the sweep file."""
    for number, name in enumerate(classes):
        for index in range(8):
            image(Path(f"images/{name}/{index}.png"), 10 * number + index)
    return Path("images")


def manifest(text: str, *, images_in: str = "images") -> Path:
    """A manifest.csv of which every image exists."""
    for line in text.splitlines()[1:]:
        image(Path(images_in) / line.split(",")[0])
    path = Path(images_in) / "manifest.csv"
    path.write_text(text, encoding="utf-8")
    return path


# The command line itself


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: neurosweep {command} ")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"neurosweep {project['version']}\n"


def test_without_a_command_all_of_them_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(f"\n    {command} " in said.err for command in COMMANDS)


@pytest.mark.parametrize("value", ["many", "0", "-1"])
def test_an_option_that_makes_no_sense_is_refused_with_the_usage(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["top", "tiny", "--num", value])
    assert caught.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: neurosweep top ")
    assert line.startswith("neurosweep top: error: argument --num: ")
    assert repr(value) in line


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(InputError, match="the sweep file must exist"):
        main(["launch", "missing.yaml", "--debug"])


def test_trials_that_fail_alike_end_with_their_traceback_and_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        with commands.said_how_to_go_on(Console(), "neurosweep resume s", if_there=Path()):
            raise AlikeFailuresError("Traceback of the trial")

    monkeypatch.setattr(commands, "top", fail)
    with pytest.raises(SystemExit) as caught:
        main(["top", "s"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "Traceback of the trial",
        "neurosweep: the first trials failed alike, before any epoch: mend the code, then "
        "`neurosweep resume s` runs them again",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("search.num_trials", "--set must be KEY=VALUE, such as search.num_trials=16"),
        ("=16", "--set must be KEY=VALUE"),
        ("search.num_trials=[1", "--set search.num_trials must be a YAML value; got '[1'"),
        ("search.num_trails=16", "unknown key 'num_trails' in search; did you mean num_trials?"),
        ("search.num_trials=many", "search.num_trials must be a whole number; got 'many'"),
        ("search=16", "search must be a mapping of settings; got 16"),
        # lr's range is three points of a grid.
        ("search.sampler=grid", "at most 4 with the grid sampler, the baseline and 3 points; got"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "launch", sweep_file(), "--set", text)


# The sweep file


def test_a_missing_sweep_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "launch", "missing.yaml") == (
        "the sweep file must exist; nothing at missing.yaml"
    )


def test_a_file_name_that_the_system_refuses_is_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "File name too long" in refused(capsys, "launch", "x" * 300)


def test_an_unknown_key_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep_file(SWEEP + "trainig: {max_epochs: 3}\n")
    assert refused(capsys, "launch", path) == (
        "sweep.yaml: unknown key 'trainig'; did you mean training?"
    )


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    written = load_sweep(sweep_file(SWEEP.replace("1.0e-4", "1e-4").replace("1.0e-2", "1E-2")))
    assert written == load_sweep(sweep_file(SWEEP))


def test_a_range_upside_down_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep_file(SWEEP.replace("low: 1.0e-4, high: 1.0e-2", "low: 1.0e-2, high: 1.0e-4"))
    assert refused(capsys, "launch", path).startswith(
        "sweep.yaml: space.lr.low must be below high, got 0.01 and 0.0001: "
    )


@pytest.mark.parametrize("depth", ["{low: 0, high: 6}", "{low: -1, high: 5}", "[2, 6]"])
def test_a_depth_beyond_the_stages_is_refused(
    depth: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "launch", sweep_file(SWEEP + f"  unfreeze_depth: {depth}\n"))
    assert re.search(r"space\.unfreeze_depth\S* must be in \[0, 5\]; got (6|-1)$", line)


def test_a_sampler_that_has_nothing_to_search_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = sweep_file(SWEEP.split("space:")[0] + "space: {unfreeze_depth: [2, 3]}\n")
    line = refused(capsys, "launch", path, "--set", "search.sampler=cma_es")
    assert "search.sampler cma_es must have a range to search; space has only choices" in line


def leaves(settings: object, dotted: str = "") -> Iterator[str]:
    """Dotted names of every setting below a dataclass."""
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        name = dotted + field.name
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{name}.")
        else:
            yield name


def test_the_reference_names_every_setting_with_its_default() -> None:
    readme = Path(__file__).parents[1] / "experiments/README.md"
    blocks = re.findall(r"```yaml\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    reference = next(block for block in blocks if "grace_period_epochs" in block)
    written = load_sweep(sweep_file(reference))
    minimal = load_sweep(sweep_file("name: my_sweep\ndata: {path: my_images}\n"))
    assert written == minimal
    document = yaml.safe_load(reference)
    for name in leaves(minimal):
        below = document
        for part in name.split("."):
            assert part in below, name
            below = below[part]
    phantom = next(block for block in blocks if "slices_per_patient" in block)
    simulated = load_sweep(sweep_file("name: simulated\n" + phantom)).data.phantom
    assert simulated == load_sweep(sweep_file("name: s\ndata: {phantom: {}}\n")).data.phantom
    assert set(leaves(simulated)) == set(yaml.safe_load(phantom)["data"]["phantom"])


# Images


def test_a_data_folder_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "launch", sweep_file())
    assert f"{Path('images').resolve()}: " in line
    assert "got nothing of the kind there; check the path" in line
    # The name is still free: the same line again.
    assert refused(capsys, "launch", sweep_file()) == line


def test_an_empty_class_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    (images("stroke", "no_stroke") / "no_tumor").mkdir()
    assert "got none in 'no_tumor'; add" in refused(capsys, "launch", sweep_file())


def test_a_single_class_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    images("stroke")
    line = refused(capsys, "launch", sweep_file())
    assert "a classifier needs at least two classes; got 1: 'stroke'; add" in line


def test_a_group_in_two_splits_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    manifest("path,label,group_id,split\n1.png,a,Doe,train\n2.png,b,Doe,val\n")
    line = refused(capsys, "launch", sweep_file())
    assert "a group (patient) lies in one split only; got 1 group(s)" in line
    assert "Doe" not in line


def test_a_path_listed_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    manifest("path,label\n1.png,a\n1.png,b\n")
    line = refused(capsys, "launch", sweep_file())
    assert "every path is listed once; got '1.png' in rows 1 and 2; remove one" in line


def test_images_that_cannot_be_read_are_listed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    images("stroke", "no_stroke")
    Path("images/stroke/8.png").write_bytes(b"")
    Path("images/no_stroke/9.jpg").write_bytes(b"junk")
    line = refused(capsys, "launch", sweep_file())
    assert (
        "got 2 of 18 that are not: '9.jpg' in class 'no_stroke' (is not a PNG, JPEG or TIFF file)"
        in line
    )
    assert "'8.png' in class 'stroke' (is not" in line
    assert line.endswith("or leave them out with --skip-bad-images")


def test_images_that_cannot_be_read_are_skipped_on_request() -> None:
    from search.data import prepare_data

    images("stroke", "no_stroke")
    Path("images/stroke/8.png").write_bytes(b"")
    found, pack = prepare_data(load_sweep(sweep_file(), {"data.skip_bad_images": True}))
    assert tuple(pack.skipped) == ("stroke/8.png",)
    assert len(found.frame) == len(pack.images()) == 16


@pytest.mark.parametrize("side_px", [8_500, 10_000, 60_000])  # below, between, above Pillow's own
def test_an_image_bomb_is_refused_without_a_warning_beside(
    side_px: int, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)
    images("stroke", "no_stroke")
    Path("images/stroke/bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
    )
    line = refused(capsys, "launch", sweep_file())
    assert "got 1 of 17 that are not: 'bomb.png' in class 'stroke' (" in line
    assert [str(warning.message) for warning in recwarn] == []


# Storage


def test_storage_that_cannot_be_written_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    images("stroke", "no_stroke")
    Path("file").touch()  # to root, any folder can be written, but nobody can write below a file
    line = refused(capsys, "launch", sweep_file(), "--storage", "file/below")
    assert line == (
        f"storage must be a folder that can be written; {Path('file/below/tiny').resolve()}: "
        "Not a directory: give another with `--storage`"
    )


def test_a_file_in_the_place_of_the_sweeps_folder_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("sweeps").mkdir()
    Path("sweeps/tiny").touch()
    line = refused(capsys, "launch", sweep_file())
    assert f"{Path('sweeps/tiny').resolve()}: File exists: " in line


def test_a_name_that_is_taken_offers_to_resume_or_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched(Path("sweeps"))
    line = refused(capsys, "launch", sweep_file())
    assert "the sweep's name must be new; " in line
    assert "`neurosweep resume tiny` goes on with it, `--name` takes another" in line


def test_what_a_killed_launch_left_does_not_take_the_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("sweeps/tiny").mkdir(parents=True)
    for name in ("manifest.csv", "study.db", ".lock"):
        Path("sweeps/tiny", name).touch()
    # Refused for the images, which are looked at later.
    assert "got nothing of the kind there" in refused(capsys, "launch", sweep_file())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount, folder = shutil.which("mount"), tmp_path / "disk"
    folder.mkdir()
    command = [mount or "", "-t", "tmpfs", "-o", "size=1m", "neurosweep", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("free_bytes", [0, 90_000], ids=["at once", "by the record"])
def test_a_full_disk_is_refused_with_what_to_do(
    free_bytes: int, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images("stroke", "no_stroke")
    free_to_fill = shutil.disk_usage(small_disk).free - free_bytes
    (small_disk / "full").write_bytes(b"\0" * free_to_fill)
    line = refused(capsys, "launch", sweep_file(), "--storage", small_disk)
    assert "No space left on device" in line or "disk is full" in line
    assert "free space" in line
    # With room, the same command is not refused for what it left.
    (small_disk / "full").unlink()
    assert not (small_disk / "tiny/sweep.yaml").exists()


# Weights


def test_imagenet_weights_without_a_network_say_where_to_put_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    images("stroke", "no_stroke")
    line = refused(capsys, "launch", sweep_file(), "--weights", "imagenet")
    assert line.startswith("imagenet weights of mobilenet_v2 could not be downloaded (")
    assert "Name or service not known" in line
    assert re.search(r"put torchvision's mobilenet_v2-\w+\.pth into ", line)
    assert "`--weights FILE_OR_FOLDER`, or start from `--weights random`" in line


def test_weights_of_another_network_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    torch.save({"encoder.weight": torch.zeros(3)}, "weights.pth")
    images("stroke", "no_stroke")
    line = refused(capsys, "launch", sweep_file(), "--weights", "weights.pth")
    assert "must be a state dict of torchvision's mobilenet_v2: " in line
    assert "1 keys foreign (first: encoder.weight)" in line


# Sweeps that were launched


def launched(storage: Path, name: str = "tiny") -> Record:
    """A sweep as one leaves it that was launched and has not started a trial."""
    sweep = load_sweep(sweep_file(), {"name": name, "storage": str(storage.resolve())})
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "sweep.yaml").write_text(dump_sweep(sweep), encoding="utf-8")
    return Record.create(sweep, {})


def run_trial(record: Record, values: list[float], state: State, reason: str) -> None:
    """Draw a trial that reports these values and ends; one that is running goes on."""
    trial = record.draw()
    for number, value in enumerate(values, start=1):
        epoch = Epoch(
            epoch=number,
            metrics={"val_macro_f1": value, "val_loss": 1 - value, "val_accuracy": value},
            confusion=[],
            last=None,
            best=None,
            stopped="",
            features="from the cache",
            ran_on="here",
        )
        record.add_epoch(trial.number, epoch)
    if state != "running":
        record.finish(trial.number, state, reason)


@pytest.mark.parametrize("command", [("resume",), ("top",), ("export",)])
def test_a_sweep_that_is_not_there_is_answered_with_those_that_are(
    command: tuple[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("out",) if command == ("export",) else ()
    assert ": there are none, and " in refused(capsys, *command, "large", *arguments)
    launched(Path("sweeps"), "small")
    launched(Path("sweeps"), "tiny")
    line = refused(capsys, *command, "large", *arguments)
    assert "no sweeps/large/sweep.yaml: there are small, tiny, and `--storage` says where" in line


def ranking(out: str) -> list[int]:
    """The trials' numbers in a printed table, top down."""
    return [int(number) for number in re.findall(r"^\s*(\d{5}) ", out, re.MULTILINE)]


def test_top_ranks_best_first_and_failed_last(capsys: pytest.CaptureFixture[str]) -> None:
    record = launched(Path("sweeps"))
    run_trial(record, [0.2, 0.6, 0.5], "complete", "max_epochs")
    run_trial(record, [0.7], "pruned", "asha")
    run_trial(record, [0.9], "failed", "out of memory")
    run_trial(record, [0.8, 0.3], "complete", "max_epochs")
    run_trial(record, [0.65], "running", "")
    out = printed(capsys, "top", "tiny")
    assert ranking(out) == [3, 1, 4, 0, 2]
    assert "trial 00000 is the baseline" in out
    assert "1 running, or interrupted; then `neurosweep resume tiny` goes on with them" in out
    rows = {int(line.split()[0]): line for line in out.splitlines() if ranking(line)}
    assert rows[0].split()[1:4] == ["complete", "0.6000", "2/3"]
    assert rows[1].split()[1:4] == ["stopped", "0.7000", "1/1"]
    assert "failed: out of memory" in rows[2]
    # The baseline's params are the file's, 1e-3; the others' are drawn.
    assert rows[0].split()[4] == "0.001"
    assert ranking(printed(capsys, "top", "tiny", "--num", "2")) == [3, 1]


def test_top_finds_a_sweep_by_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    run_trial(launched(Path("elsewhere")), [0.5], "complete", "max_epochs")
    out = printed(capsys, "top", "elsewhere/tiny")
    assert ranking(out) == [0]
    assert "resume" not in out
    assert ranking(printed(capsys, "top", "tiny", "--storage", "elsewhere")) == [0]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[None]:
    """The sweep as another process holds it that runs it."""
    run_trial(launched(Path("sweeps")), [0.5], "running", "")
    code = (
        "import fcntl, sys; file = open('sweeps/tiny/.lock', 'w');"
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    yield
    other.communicate()


@pytest.mark.usefixtures("held")
def test_top_looks_on_while_another_process_runs_the_sweep(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ranking(printed(capsys, "top", "tiny")) == [0]


@pytest.mark.usefixtures("held")
def test_a_sweep_that_runs_is_not_run_twice(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "resume", "tiny")
    assert line.startswith("a sweep runs in one process at a time; another runs tiny: ")


def test_a_record_that_is_gone_or_torn_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    launched(Path("sweeps"))
    database = Path("sweeps/tiny/study.db")
    database.write_bytes(b"junk" * 1000)
    assert "study.db must be readable and writable; " in refused(capsys, "top", "tiny")
    database.unlink()
    assert "a sweep's record must exist; no study.db in " in refused(capsys, "top", "tiny")


# Bundles


@pytest.mark.parametrize("command", [("launch", "sweep.yaml", "--export"), ("export", "tiny")])
def test_a_bundle_is_not_written_over_what_exists(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    launched(Path("sweeps"))
    Path("out").mkdir()
    Path("out/thesis.tex").touch()
    line = refused(capsys, *command, "out")
    assert line == "a bundle goes into a new folder; out exists: give another"


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_place_that_takes_no_bundle_is_refused_before_the_sweep_runs(
    out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    line = refused(capsys, "launch", sweep_file(), "--export", out)
    assert line.startswith("a bundle goes into a new folder; ")
    assert not Path("sweeps").exists()


def test_a_bundle_needs_a_trial_that_has_finished(capsys: pytest.CaptureFixture[str]) -> None:
    run_trial(launched(Path("sweeps")), [0.5], "running", "")
    line = refused(capsys, "export", "tiny", "out")
    assert line == ("a trial of tiny must have finished; none has: `neurosweep resume tiny`")
    line = refused(capsys, "export", "tiny", "out", "--trial", "7")
    assert line == "--trial must be a trial of the sweep, 0 to 0; got 7"


def test_predict_names_the_likeliest_class_of_each_image(
    make_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    light, black = image(Path("a/light.png"), 255), image(Path("a/black.png"), 0)
    folder = make_bundle(classes=["bright", "dark"])
    out = printed(capsys, "predict", folder, light, black)
    rows = [line.split() for line in out.splitlines() if ".png" in line]
    # Logits are 2 and -2, or the reverse: 1 / (1 + exp(-4)) = 0.982.
    assert rows == [["light.png", "bright", "0.982"], ["black.png", "dark", "0.982"]]


def test_a_folder_that_is_no_bundle_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = image(Path("a/1.png"))
    line = refused(capsys, "predict", "a", path)
    assert line.startswith("a bundle must hold config.json; none in a: give the folder that ")


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.safetensors"])
@pytest.mark.parametrize("change", ["one byte", "gone", "a link"])
def test_a_bundle_that_was_changed_is_refused(
    make_bundle: Callable[..., Path], name: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_bundle() / name
    data = file.read_bytes()
    file.unlink()
    if change == "one byte":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif change == "a link":
        Path("elsewhere").write_bytes(data)
        file.symlink_to(Path("elsewhere").resolve())
    line = refused(capsys, "predict", "bundle", image(Path("1.png")))
    assert f"bundle/{name} is missing or changed: export it again" in line


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["a", "b", "c"]},
        {"classes": ["a"]},
        {"classes": []},
        {"input": {"image_size_px": 64}},
        {"input": {}},
        {"format": 99},
        {"digests": []},
    ],
)
def test_a_bundle_whose_description_does_not_fit_is_refused(
    make_bundle: Callable[..., Path], change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_bundle() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "bundle" in refused(capsys, "predict", "bundle", image(Path("1.png")))


def test_an_image_that_is_none_is_named(
    make_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    good = image(Path("1.png"))
    Path("2.png").write_bytes(b"junk")
    folder = make_bundle()
    line = refused(capsys, "predict", folder, good, "2.png")
    assert line == "2.png is not a PNG, JPEG, TIFF, DICOM, or NIfTI file"
    line = refused(capsys, "predict", folder, good, "3.png")
    assert line == "an image to classify must exist; there is no 3.png"
    Path("folder").mkdir()
    assert refused(capsys, "predict", folder, "folder") == "folder is not a plain file"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("completion bash >&-", 0),
        ("completion bash | true", 141),  # which is gone long before
        ("top nosuch", 2),
        ("top nosuch 2>&-", 2),
        ("nonsense", 2),
        ("--version", 0),
    ],
)
def test_a_process_ends_with_its_code_whoever_listens(tmp_path: Path, line: str, code: int) -> None:
    command = f"set -o pipefail; {sys.executable} -m search.cli {line}"
    run = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
