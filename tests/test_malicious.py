"""Files made to harm end in one line: no code is run, no file made elsewhere, no memory taken."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import sqlite3
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from fuzz_records import sum_anew
from PIL import Image

from lightning_modules.bundle import load_bundle
from lightning_modules.data.decode import decode_image
from lightning_modules.data.manifest import read_manifest
from lightning_modules.errors import InputError
from lightning_modules.pickled_bombs import refuse_bombs
from lightning_modules.state_dicts import read_state_dict
from lightning_modules.strict_yaml import load_yaml
from search.card.model_card import write_card
from search.cli import main
from search.config import dump_sweep, load_sweep
from search.study.record import Record
from search.study.recorded import CheckpointFile, Epoch
from search.study.sweep_files import LocalFiles
from search.tuning.checkpoint import AtomicCheckpointIO
from search.tuning.checkpoint_files import is_whole

MakeBundle = Callable[..., Path]
SWEEP = """
name: tiny
data: {path: images, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2}
space: {lr: {low: 1.0e-4, high: 1.0e-2, log: true}}
"""
SLOWEST_S = 10.0
MOST_MIB = 300


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """Every test here ends soon, and takes little memory."""
    # CPU time: the machine may have other work.
    before, start_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < MOST_MIB
    assert time.process_time() - start_s < SLOWEST_S


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command ends with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("neurosweep: ")
    assert line.isprintable()
    return line


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        function()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def images(folder: Path = Path("images"), count: int = 4) -> None:
    rng = np.random.default_rng(0)
    for label in ("stroke", "no_stroke"):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (32, 32)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


def sweep_file(text: str = SWEEP) -> Path:
    Path("sweep.yaml").write_text(text)
    return Path("sweep.yaml")


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, ("trace",)


# Weights and checkpoints


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_a_file_of_weights_that_would_run_code_is_refused_at_launch(
    form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    images()
    if form == "pickle":
        Path("w.pth").write_bytes(pickle.dumps({"a": Payload()}, protocol=2))
    else:
        content = {"a": torch.ones(1), "b": Payload()}
        torch.save(content, "w.pth", _use_new_zipfile_serialization=form == "torch")
    line = refused(capfd, "launch", sweep_file(), "--weights", "w.pth")
    assert "must hold tensors only" in line
    assert not Path("trace").exists()
    assert not Path("sweeps/tiny").exists()


class Allocated:
    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("is_new", [True, False])
def test_a_gigabyte_in_a_hundred_bytes_is_not_allocated(is_new: bool) -> None:
    for number, bomb in enumerate(
        (
            Allocated(bytearray, 2**33),
            Allocated(__import__("codecs").encode, Allocated(bytes, b"a" * 100), "hex_codec"),
        )
    ):
        path = Path(f"{number}.pth")
        torch.save({"a": bomb}, path, _use_new_zipfile_serialization=is_new)
        assert path.stat().st_size < 4096
        assert "must hold tensors only" in message_of(lambda path=path: read_state_dict(path))
        assert "must hold tensors" in message_of(
            lambda path=path: AtomicCheckpointIO(LocalFiles(".")).load_checkpoint(path)
        )


def key_of_tuples(depth: int) -> bytes:
    """A pickled dictionary whose key is two of two of two ..., each one stored once."""
    levels = b"".join(b"q%ch%c\x86" % (level, level) for level in range(depth))
    return b"\x80\x02}" + b"N\x85" + levels + b"K\x01s."


def test_a_key_that_takes_for_ever_to_hash_is_refused() -> None:
    assert pickle.loads(key_of_tuples(3)) == {((((None,),) * 2,) * 2,) * 2: 1}
    for name, depth in (("shallow", 8), ("deep", 60)):
        with zipfile.ZipFile(f"{name}.pth", "w") as archive:
            archive.writestr("archive/data.pkl", key_of_tuples(depth))
            archive.writestr("archive/version", "3")
            archive.writestr("archive/byteorder", "little")
    # Of 2**60 items: torch would hash them until it is killed.
    with (
        pytest.raises(InputError, match="must hold tensors only"),
        Path("deep.pth").open("rb") as f,
    ):
        refuse_bombs(f)
    with Path("shallow.pth").open("rb") as sound:
        refuse_bombs(sound)
        assert len(torch.load(sound, weights_only=True)) == 1
    assert "must hold tensors only" in message_of(lambda: read_state_dict(Path("deep.pth")))
    assert "must hold tensors and plain values" in message_of(
        lambda: AtomicCheckpointIO(LocalFiles(".")).load_checkpoint("deep.pth")
    )


def zipped(path: Path, pickled: bytes, name: str = "archive/data.pkl") -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, pickled)
        archive.writestr("archive/version", "3")
    return path.read_bytes()


def test_what_hides_from_a_look_at_a_file_is_refused() -> None:
    allocation = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R."
    torch.save({"a": Allocated(bytearray, 2**33)}, "old.pth", _use_new_zipfile_serialization=False)
    sound = zipped(Path("sound.pth"), b"\x80\x02}.")
    end = sound.rindex(b"PK\x05\x06")
    hidden = {
        # torch goes by the first bytes of a file, a reader of archives by the last.
        "appended": Path("old.pth").read_bytes() + sound,
        "capitals": zipped(Path("x.pth"), allocation, "archive/DATA.PKL"),
        "directory": sound[:end] + b" " * 9 + sound[end:],
        # Not on torch's own list of what not to call, but nothing that tensors need.
        "class": zipped(Path("x.pth"), b"\x80\x02ctorch\nTensor\nK\x01\x85R."),
        # torch would show the list that it is told to call.
        "list": zipped(Path("x.pth"), b"\x80\x02]q\x00(K\x01K\x02e)R."),
        "empty stack": zipped(Path("x.pth"), b"\x80\x02R."),
    }
    for name, content in hidden.items():
        line = message_of(lambda content=content: refuse_bombs(io.BytesIO(content)))
        assert line == "must hold tensors only (no pickled objects)", name
    refuse_bombs(io.BytesIO(sound))


def test_what_tensors_need_is_not_refused() -> None:
    plain = {"epoch": 3, "lr": [1e-3, None, True], "name": "a", "betas": (0.9, 0.999)}
    for is_new in (True, False):
        content = {
            "state_dict": torch.nn.Linear(2, 2).state_dict(),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "kind": torch.float16,
            "size": torch.ones(2, 3).shape,
            "random": torch.get_rng_state(),
            **plain,
        }
        torch.save(content, "w.pth", _use_new_zipfile_serialization=is_new)
        with Path("w.pth").open("rb") as file:
            refuse_bombs(file)
            assert torch.load(file, weights_only=True)["betas"] == (0.9, 0.999)


def test_compressed_tensors_are_not_inflated() -> None:
    torch.save({"a": torch.zeros(2**24)}, "w.pth")
    with zipfile.ZipFile("w.pth") as sound, zipfile.ZipFile("bomb.pth", "w", 8) as bomb:
        for name in sound.namelist():
            bomb.writestr(name, sound.read(name))
    assert Path("bomb.pth").stat().st_size < 2**20
    assert "must not be compressed" in message_of(lambda: read_state_dict(Path("bomb.pth")))
    read_state_dict(Path("w.pth"))


def test_an_archive_is_not_unpacked() -> None:
    with tarfile.open("w.pth", "w") as tar:
        for name in ("../trace", "sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps({})
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert message_of(lambda: read_state_dict(Path("w.pth"))).startswith("weights w.pth ")
    assert not Path("../trace").exists()


def test_a_safetensors_header_of_a_terabyte_is_not_read() -> None:
    for claimed in (2**24 + 1, 2**40, 2**63):
        Path("w.safetensors").write_bytes(struct.pack("<Q", claimed) + b"{}" + b" " * 2**16)
        line = message_of(lambda: read_state_dict(Path("w.safetensors")))
        assert "must have a header of at most 16777216 bytes" in line


def test_a_class_named_in_a_lightning_checkpoint_is_not_built() -> None:
    # Lightning's load_from_checkpoint imports and calls what `_instantiator` names.
    hostile = {"_instantiator": "os.mkdir", "_class_path": "os.mkdir", "path": "trace"}
    content = {
        "state_dict": {},
        "hyper_parameters": hostile,
        "hparams_name": "kwargs",
        "pytorch-lightning_version": "2.6.6",
    }
    torch.save(content, "w.ckpt")
    assert (
        AtomicCheckpointIO(LocalFiles(".")).load_checkpoint("w.ckpt")["hyper_parameters"] == hostile
    )
    torch.save({**content, "callbacks": Payload()}, "w.ckpt")
    assert "must hold tensors and plain values" in message_of(
        lambda: AtomicCheckpointIO(LocalFiles(".")).load_checkpoint("w.ckpt", weights_only=False)
    )
    assert not Path("trace").exists()


# Records


def launched(checkpoint: CheckpointFile | None = None) -> Record:
    """A sweep with one finished trial."""
    images()
    sweep = load_sweep(sweep_file(), {"storage": str(Path("sweeps").resolve())})
    sweep.folder.mkdir(parents=True)
    from search.data import prepare_data

    manifest, pack = prepare_data(sweep)
    manifest.write(sweep.folder / "manifest.csv")
    (sweep.folder / "sweep.yaml").write_text(dump_sweep(sweep))
    origin = {"origin": "random", "path": None, "digest": "0" * 64, "seed": 0}
    facts = {
        "manifest_digest": manifest.digest,
        "pack_digest": pack.digest,
        "weights": {"mobilenet_v2": origin},
        "versions": {},
        "skipped_images": [],
    }
    record = Record.create(sweep, facts)
    record.add_epoch(
        record.draw().number,
        Epoch(
            epoch=1,
            metrics={"val_macro_f1": 0.5},
            confusion=[],
            last=None,
            best=checkpoint,
            stopped="max_epochs",
            features="cached",
            ran_on="here",
        ),
    )
    return record


def checkpoint_at(path: Path, content: object) -> CheckpointFile:
    folder = Path("sweeps/tiny").resolve()
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    target.rename("kept.ckpt")
    return CheckpointFile(path=str(path), digest=digest, epoch=1)


def test_a_checkpoint_that_would_run_code_is_not_exported(
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = Path("trials/00000/best.ckpt")
    Path("scratch").mkdir()
    torch.save({"state_dict": {}, "x": Payload()}, "kept.ckpt")
    digest = hashlib.sha256(Path("kept.ckpt").read_bytes()).hexdigest()
    record = launched(CheckpointFile(path=str(path), digest=digest, epoch=1))
    (record.sweep.folder / path).parent.mkdir(parents=True)
    Path("kept.ckpt").rename(record.sweep.folder / path)
    line = refused(capfd, "export", "tiny", "out")
    assert "must hold tensors and plain values" in line
    torch.save({"state_dict": 5}, record.sweep.folder / path)
    assert "is torn or changed" in refused(capfd, "export", "tiny", "out")
    assert not Path("trace").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize("path", ["../../secret.ckpt", "/etc/hostname", "a/../../x", "", "a\x1bb"])
@pytest.mark.parametrize("command", ["top", "export"])
def test_a_checkpoint_path_that_leaves_the_sweep_is_refused(
    path: str, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}}, "secret.ckpt")
    digest = hashlib.sha256(Path("secret.ckpt").read_bytes()).hexdigest()
    launched(CheckpointFile(path=path, digest=digest, epoch=1))
    line = refused(capfd, command, "tiny", *(["out"] if command == "export" else []))
    assert "a checkpoint lies in the sweep's folder, not at " in line


def test_a_checkpoint_that_is_a_link_is_not_whole() -> None:
    Path("secret.ckpt").write_bytes(b"secret")
    Path("link.ckpt").symlink_to("secret.ckpt")
    digest = hashlib.sha256(b"secret").hexdigest()
    assert is_whole(LocalFiles("."), CheckpointFile(path="secret.ckpt", digest=digest, epoch=1))
    assert not is_whole(LocalFiles("."), CheckpointFile(path="link.ckpt", digest=digest, epoch=1))


def rewrite(*statements: str) -> None:
    with closing(sqlite3.connect("sweeps/tiny/study.db")) as database:
        for statement in statements:
            database.execute(statement)
        with contextlib.suppress(sqlite3.OperationalError):  # no such table
            sum_anew(database)
        database.commit()


@pytest.mark.parametrize(
    "statement",
    [
        # Counts for ever when it is read.
        "CREATE VIEW endless AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) "
        "SELECT i FROM n",
        "CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM trials; END",
        "ALTER TABLE trials ADD COLUMN bomb TEXT GENERATED ALWAYS AS (hex(zeroblob(500000000)))",
    ],
)
def test_a_database_that_computes_is_refused(
    statement: str, capfd: pytest.CaptureFixture[str]
) -> None:
    launched()
    rewrite(statement)
    assert "a sweep's record must hold tables alone; " in refused(capfd, "top", "tiny")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trial_user_attributes SET value_json = '[' WHERE key = 'params'",
        "UPDATE trial_user_attributes SET value_json = '{\"lr\": \"../..\"}' WHERE key = 'params'",
        "UPDATE trial_user_attributes SET value_json = '-1' WHERE key = 'seed'",
        "UPDATE trial_user_attributes SET value_json = '\"{}\"' WHERE key = 'epoch_00001'",
        "UPDATE trials SET number = '../../x'",
        "UPDATE trials SET number = 7",
        "UPDATE trials SET state = 'RUINED'",
        "DELETE FROM trial_user_attributes WHERE key = 'params'",
        "UPDATE study_user_attributes SET value_json = '5' WHERE key = 'weights'",
        "DROP TABLE trial_user_attributes",
    ],
)
def test_a_record_that_was_tampered_with_ends_in_one_line(
    statement: str, capfd: pytest.CaptureFixture[str]
) -> None:
    launched()
    rewrite(statement)
    assert "a sweep's record must be what was written; " in refused(capfd, "top", "tiny")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trials SET datetime_complete = 'yesterday'",
        "UPDATE trial_params SET param_value = 'x'",
        "UPDATE trial_params SET param_name = 'y'",
        "UPDATE trial_intermediate_values SET intermediate_value = 'x'",
        "UPDATE trial_intermediate_values SET intermediate_value = 1e999",
        "UPDATE trial_system_attributes SET value_json = '5'",
    ],
)
def test_what_samplers_would_fail_on_ends_in_one_line(
    statement: str, capfd: pytest.CaptureFixture[str]
) -> None:
    launched()
    rewrite(statement)
    assert "a sweep's record must be what was written; " in refused(capfd, "resume", "tiny")


def test_text_of_a_record_does_not_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    record = launched()
    record.finish(record.draw().number, "failed", "\x1b]0;owned\x07\x1b[2J")
    main(["top", "tiny"])
    assert "\x1b" not in capfd.readouterr().out


# YAML


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [1]\nb: [*a, *a]", "aliases are not supported"),
        ("[" * 5000, "maximum recursion depth exceeded"),
        ("- " * 5000, "maximum recursion depth exceeded"),
        ("seed: 1" + ":1" * 100_000, "is a number in base 60"),
        (f"name: a\nseed: '{'1' * 200_000}x'\ndata: {{path: x}}", "seed must be a whole number"),
        ("name: !!python/object/apply:os.mkdir [trace]", "tags are not supported"),
        ("name: a" + "\n#" + "x" * 2**18, "must be below 256 KiB"),
        ("name: !%1b[31m x", r"tags are not supported; got '!\x1b[31m'"),
    ],
)
def test_a_yaml_bomb_ends_in_one_line(
    text: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert reason in refused(capfd, "launch", sweep_file(text))
    assert not Path("trace").exists()


@pytest.mark.slow
def test_the_largest_yaml_is_read_in_time() -> None:
    # As many values as its bytes can be.
    assert len(load_yaml("[" + "a," * (2**17 - 1) + "]")) == 2**17 - 1


# Images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra: bytes, width: int = 32, height: int = 32) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * height))
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_text_and_profiles_in_a_png_are_not_inflated() -> None:
    zeros = zlib.compress(bytes(2**28), 9)
    for extra in (
        chunk(b"zTXt", b"key\0\0" + zeros),
        chunk(b"iCCP", b"icc\0\0" + zeros),
        chunk(b"iTXt", b"key\0\1\0\0\0" + zeros),
        *[chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**20)))] * 100,
    ):
        with contextlib.suppress(InputError):
            assert decode_image(png(extra), 32).shape == (32, 32)


@pytest.mark.parametrize("length", [2**31, 2**32 - 1, 10**6])
def test_a_png_chunk_that_lies_about_its_length_is_not_allocated(length: int) -> None:
    data = png()
    place = data.index(b"IDAT") - 4
    lying = data[:place] + struct.pack(">I", length) + data[place + 4 :]
    with contextlib.suppress(InputError):
        assert decode_image(lying, 32).shape == (32, 32)


def test_a_jpeg_of_a_million_scans_is_refused_unread() -> None:
    file = io.BytesIO()
    Image.new("L", (512, 512), 100).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rfind(b"\xff\xda") : -2]
    decode_image(data, 32)
    bomb = data[:-2] + scan * 1_000_000 + data[-2:]
    assert message_of(lambda: decode_image(bomb, 32)) == (
        f"has {data.count(scan[:2]) + 1_000_000} JPEG scans, more than 64 an image"
    )


def tiff(entries: dict[int, tuple[int, int]], tail: bytes = b"") -> bytes:
    """A TIFF file of one directory: tag, to its type and value."""
    rows = [struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in entries.items()]
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + b"".join(rows) + bytes(4) + tail


def test_a_tiff_whose_strips_lie_is_refused() -> None:
    sound = {256: (3, 32), 257: (3, 32), 258: (3, 8), 259: (3, 1), 262: (3, 1), 277: (3, 1)}
    for changes in (
        {273: (4, 2**32 - 1), 278: (3, 32), 279: (4, 1024)},
        {273: (4, 8), 278: (3, 32), 279: (4, 2**32 - 1)},
        {273: (4, 8), 278: (4, 2**32 - 1), 279: (4, 1)},
        {257: (4, 2**32 - 1), 273: (4, 8), 278: (3, 32), 279: (4, 1024)},
        {277: (3, 65535), 273: (4, 8), 278: (3, 32), 279: (4, 1024)},
    ):
        data = tiff(dict(sorted((sound | changes).items())))
        message_of(lambda data=data: decode_image(data, 32))


def test_the_pages_of_a_tiff_are_not_walked() -> None:
    page = Image.new("L", (32, 32), 7)
    file = io.BytesIO()
    page.save(file, "TIFF", save_all=True, append_images=[page] * 300)
    assert (decode_image(file.getvalue(), 32) == 7).all()


# Manifests


@pytest.mark.parametrize(
    "text",
    [
        "path,label" + "," * 30_000_000 + "\n",
        "path,label\n1.png,a" + "," * 30_000_000 + "\n",
        'path,label\n"' + "\n" * 30_000_000,
        'path,"' + '\n","' * 3_000_000,
    ],
    ids=["header", "first row", "quoted lines", "header of lines"],
)
def test_a_manifest_of_endless_columns_is_refused(text: str) -> None:
    Path("manifest.csv").write_text(text)
    del text
    message_of(lambda: read_manifest(Path("manifest.csv")))


# Bundles


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"temperature": 10**400}, "temperature is not a number in "),
        ({"temperature": 1e-300}, "temperature is not a number in "),
        ({"parity": {"differences": {"model.onnx": 10**400}}}, "a number beyond all others"),
        ({"settings": nested(900)}, "nested more than 32 deep"),
        ({"leakage": "\x1b]0;owned\x07"}, "text with control characters"),
        ({"settings": {"\x1b[2J": 1}}, "text with control characters"),
        ({"backbone": "\ud800"}, "text with control characters"),
    ],
)
def test_a_description_that_would_break_what_reads_it_is_refused(
    changes: dict[str, Any], reason: str, capfd: pytest.CaptureFixture[str], make_bundle: MakeBundle
) -> None:
    images()
    line = refused(capfd, "predict", make_bundle(**changes), "images/stroke/0.png")
    assert reason in line


@pytest.mark.parametrize(
    "changes", [{"members": 5}, {"members": {"a": 1}}, {"trial": [1]}, {"search": {"space": 3}}]
)
def test_a_card_is_written_of_any_description(
    changes: dict[str, Any], make_bundle: MakeBundle
) -> None:
    assert write_card(make_bundle(**changes)).is_file()


def test_numbers_of_an_evaluation_may_be_beyond_all_floats(make_bundle: MakeBundle) -> None:
    folder = make_bundle()
    (folder / "evaluations.json").write_text(json.dumps([{"figures": {"f1": 10**400}}]))
    assert "not defined" in write_card(folder).read_text()


def test_files_that_a_description_names_are_not_opened(make_bundle: MakeBundle) -> None:
    Path("secret").write_text("secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    folder = make_bundle()
    config = json.loads((folder / "config.json").read_text())
    config["digests"]["../secret"] = digest
    config["backbone"] = "../secret"
    (folder / "config.json").write_text(json.dumps(config))
    load_bundle(folder)


@pytest.mark.parametrize("name", ["explanation", "explanation/explanation.json"])
def test_an_explanation_is_not_written_through_a_link(
    name: str, capfd: pytest.CaptureFixture[str], make_bundle: MakeBundle
) -> None:
    images()
    folder = make_bundle(backbone="mobilenet_v2")
    Path("elsewhere").mkdir()
    if name == "explanation":
        (folder / name).symlink_to(Path("elsewhere").resolve())
    else:
        Path("elsewhere/kept").write_text("kept")
        (folder / "explanation").mkdir()
        (folder / name).symlink_to(Path("elsewhere/kept").resolve())
    for out in ([], ["--out", "other"]):
        line = refused(capfd, "explain", folder, "images/stroke/0.png", *out)
        assert "a bundle's files are its own; " in line
    assert [path.read_text() for path in Path("elsewhere").iterdir()] in ([], ["kept"])
