"""Every mistake in a sweep file ends in one line: file, dotted key, rule, value, remedy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler

from lightning_modules.data.phantom import PhantomSettings
from lightning_modules.errors import InputError
from lightning_modules.stages import BACKBONES
from lightning_modules.strict_yaml import MAX_YAML_BYTES
from search.config import dump_sweep, load_sweep
from search.space import Choice, Float, Int
from search.sweep import DataSettings, SchedulerSettings, Sweep, TrainingSettings, TrialParams

ROOT = Path(__file__).resolve().parents[1]
SWEEP_FILES = sorted((ROOT / "experiments").rglob("*.yaml"))
MINIMAL = "name: s\ndata: {phantom: {}}\n"


def load_text(folder: Path, text: str, overrides: dict[str, Any] | None = None) -> Sweep:
    path = folder / "sweep.yaml"
    path.write_bytes(text.encode())
    return load_sweep(path, overrides)


def message_of(folder: Path, text: str, overrides: dict[str, Any] | None = None) -> str:
    """The message without the file's name, which must come first."""
    with pytest.raises(InputError) as error:
        load_text(folder, text, overrides)
    start = f"{folder / 'sweep.yaml'}: "
    assert str(error.value).startswith(start)
    return str(error.value).removeprefix(start)


TOP_LEVEL = (
    "augmentation, data, metric, name, objectives, params, resources, scheduler, search, seed, "
    "space, storage, study_url, training, weights"
)
WEIGHTS_RULE = "weights must be imagenet, random, a path, or a list of these; got"

# What is added to a valid file, and what is said about it.
BAD_SETTINGS = {
    # Keys.
    "sed: 1": "unknown key 'sed'; did you mean seed?",
    "zzz: 1": f"unknown key 'zzz'; known are {TOP_LEVEL}",
    "7: 1": f"unknown key 7; known are {TOP_LEVEL}",
    "training: {max_epoch: 3}": "unknown key 'max_epoch' in training; did you mean max_epochs?",
    "training: {zzz: 3}": (
        "unknown key 'zzz' in training; known are compile, max_epochs, precision, warmup_epochs"
    ),
    "params: {drop_out: 0}": "unknown key 'drop_out' in params; did you mean dropout?",
    "space: {droput: [0.3]}": "unknown key 'droput' in space; did you mean dropout?",
    "space: {lr: {hgih: 1}}": "unknown key 'hgih' in space.lr; did you mean high?",
    "weights: {resnet: random}": "unknown key 'resnet' in weights; did you mean resnet50?",
    # Types.
    "training: 3": "training must be a mapping of settings; got 3",
    "params: null": "params must be a mapping of settings; got null",
    "search: [1]": "search must be a mapping of settings; got [1]",
    "params: {lr: fast}": "params.lr must be a number; got 'fast'",
    "params: {lr: 1e-4x}": "params.lr must be a number; got '1e-4x'",
    "params: {lr: true}": "params.lr must be a number; got True",
    "params: {lr: null}": "params.lr must be a number; got null",
    "params: {lr: .nan}": "params.lr must be a number; got nan",
    "params: {lr: -.inf}": "params.lr must be a number; got -inf",
    "params: {lr: 1e999}": "params.lr must be a number; got inf",
    "params: {unfreeze_depth: two}": "params.unfreeze_depth must be a whole number; got 'two'",
    "params: {unfreeze_depth: true}": "params.unfreeze_depth must be a whole number; got True",
    "params: {unfreeze_depth: 2.5}": "params.unfreeze_depth must be a whole number; got 2.5",
    "params: {unfreeze_depth: [2]}": "params.unfreeze_depth must be a whole number; got [2]",
    "seed: 2024-01-01": "seed must be a whole number; got datetime.date(2024, 1, 1)",
    "seed: 10000000000000000": "seed must be within plus or minus 2**53; got 10000000000000000",
    f"seed: {'9' * 400}": f"seed must be within plus or minus 2**53; got {'9' * 77}...",
    f"seed: 0x{'f' * 5000}": (
        "seed must be within plus or minus 2**53; got a number too long to print"
    ),
    "metric: 5": "metric must be text; got 5",
    "search: {sampler: no}": "search.sampler must be text; got False",
    "storage: null": "storage must be text; got null",
    'storage: "a\\0b"': "storage must be text; got 'a\\x00b'",
    'study_url: "sqlite:///a\\nb"': "study_url must be text; got 'sqlite:///a\\nb'",
    "storage: ~nobody-of-this-name/sweeps": "paths must not start with ~NAME; write them out",
    # Limits.
    "seed: -1": "seed must be in [0, 2147483647]; got -1",
    "training: {max_epochs: 0}": "training.max_epochs must be in [1, 10000]; got 0",
    "training: {warmup_epochs: 12.5}": "training.warmup_epochs must be in [0, 12]; got 12.5",
    "search: {num_trials: 1000001}": "search.num_trials must be in [1, 1000000]; got 1000001",
    "objectives: val_macro_f1": (
        "objectives must be a metric and a cost, such as [val_macro_f1, latency_ms]; got "
        "'val_macro_f1'"
    ),
    "objectives: [val_macro_f1, latency]": (
        "the second of objectives must be one of latency_ms, size_mib; got 'latency'; did you mean "
        "latency_ms?"
    ),
    "objectives: [latency_ms, val_macro_f1]": (
        "the first of objectives must be one of val_macro_f1, val_accuracy, val_loss; got "
        "'latency_ms'"
    ),
    "metric: val_loss\nobjectives: [val_macro_f1, latency_ms]": (
        "metric must be the first of objectives, val_macro_f1; got 'val_loss': leave one of them "
        "out"
    ),
    "search: {sampler: tpe}\nobjectives: [val_macro_f1, latency_ms]": (
        "search.sampler must be gp, random, or grid with two objectives; got tpe, which knows one"
    ),
    "space: {dropout: [0.3]}\nobjectives: [val_macro_f1, latency_ms]": (
        "objectives need several backbones in space.backbone, since latency_ms is the backbone's "
        "alone; got mobilenet_v2"
    ),
    "search: {keep_trials: 0}": "search.keep_trials must be in [1, 10000]; got 0",
    "search: {max_concurrent_trials: 0}": (
        "search.max_concurrent_trials must be in [1, 100000]; got 0"
    ),
    "search: {time_budget_s: 0}": "search.time_budget_s must be in [1, 100000000]; got 0",
    "resources: {cpus_per_trial: 0}": "resources.cpus_per_trial must be in [1, 1024]; got 0",
    "resources: {gpus_per_trial: 1.5}": (
        "resources.gpus_per_trial must be in [0, 1]: a trial trains on one device or a fraction "
        "of one; got 1.5"
    ),
    "scheduler: {grace_period_epochs: 13}": (
        "scheduler.grace_period_epochs must be in [1, 12]; got 13"
    ),
    "scheduler: {reduction_factor: 1}": "scheduler.reduction_factor must be in [2, 100]; got 1",
    "augmentation: {noise: 2}": "augmentation.noise must be in [0, 1]; got 2.0",
    "params: {unfreeze_depth: 6}": "params.unfreeze_depth must be in [0, 5]; got 6",
    "params: {unfreeze_depth: -1}": "params.unfreeze_depth must be in [0, 5]; got -1",
    "params: {dropout: 0.96}": "params.dropout must be in [0, 0.95]; got 0.96",
    "params: {batch_size: 1}": "params.batch_size must be in [2, 4096]; got 1",
    "space: {unfreeze_depth: {low: -1, high: 5}}": (
        "space.unfreeze_depth.low must be in [0, 5]; got -1"
    ),
    "space: {unfreeze_depth: {low: 0, high: 6}}": (
        "space.unfreeze_depth.high must be in [0, 5]; got 6"
    ),
    "space: {unfreeze_depth: [2, 6]}": "space.unfreeze_depth must be in [0, 5]; got 6",
    # Names.
    "params: {backbone: resnet5O}": (
        "params.backbone must be one of mobilenet_v2, resnet50, efficientnet_b0, resnet152, vgg16, "
        "vit_b_16; got 'resnet5O'; did you mean resnet50?"
    ),
    "space: {backbone: [mobilenet_v2, vgg]}": (
        "space.backbone must be one of mobilenet_v2, resnet50, efficientnet_b0, resnet152, vgg16, "
        "vit_b_16; got 'vgg'; did you mean vgg16?"
    ),
    "metric: val_f1": (
        "metric must be one of val_macro_f1, val_accuracy, val_loss; got 'val_f1'; "
        "did you mean val_macro_f1?"
    ),
    "search: {sampler: bohb}": (
        "search.sampler must be one of tpe, gp, cma_es, random, grid; got 'bohb'"
    ),
    "training: {precision: fp16}": (
        "training.precision must be one of auto, 32-true, bf16-mixed; got 'fp16'"
    ),
    "data: {phantom: {}, class_balance: balanced}": (
        "data.class_balance must be one of weighted_loss, balanced_sampling, none; got 'balanced'; "
        "did you mean balanced_sampling?"
    ),
    "name: a b": (
        "name must be 1 to 64 letters, digits, dots, dashes, or underscores, a letter or digit "
        "first; got 'a b'"
    ),
    "name: ../up": (
        "name must be 1 to 64 letters, digits, dots, dashes, or underscores, a letter or digit "
        "first; got '../up'"
    ),
    f"name: {'x' * 90}": (
        "name must be 1 to 64 letters, digits, dots, dashes, or underscores, a letter or digit "
        f"first; got '{'x' * 76}..."
    ),
    "name: null": "name must be text; got null",
    # Data.
    "data: null": "data must be a mapping of settings; got null",
    "data: {}": "data must have either path or phantom; got neither",
    "data: {path: a, phantom: {}}": "data must have either path or phantom; got both",
    "data: {phantom: {num_patients: 1}}": (
        "data.phantom.num_patients must be at least 5, got 1: raise it"
    ),
    "data: {phantom: {}, skip_bad_images: 1}": "data.skip_bad_images must be true or false; got 1",
    "data: {phantom: {}, image_size_px: 16}": "data.image_size_px must be in [32, 1024]; got 16",
    "data: {phantom: {}, source_weights: 2}": (
        "data.source_weights must be a mapping of names to values; got 2"
    ),
    "data: {phantom: {}, source_weights: {1: 2}}": (
        "data.source_weights must have text as its keys; got 1: quote it"
    ),
    "data: {phantom: {}, source_weights: {a: heavy}}": (
        "data.source_weights.a must be a number; got 'heavy'"
    ),
    "data: {phantom: {}, source_weights: {a: 1, b: 0}}": (
        "data.source_weights.b must be in [0.001, 1000]; got 0"
    ),
    "data: {phantom: {}, source_weights: {a: -1}}": (
        "data.source_weights.a must be in [0.001, 1000]; got -1"
    ),
    "data: {phantom: {}, image_size_px: 100}\nparams: {backbone: vit_b_16}\n"
    "space: {dropout: [0.3]}": (
        "data.image_size_px must be a multiple of 16 for vit_b_16, which cuts images into patches; "
        "got 100: take 96 or 112"
    ),
    # Weights.
    "weights: 3": f"{WEIGHTS_RULE} 3 for mobilenet_v2",
    "weights: []": f"{WEIGHTS_RULE} [] for mobilenet_v2",
    "weights: ''": f"{WEIGHTS_RULE} '' for mobilenet_v2",
    "weights: [imagenet, 1]": f"{WEIGHTS_RULE} ['imagenet', 1] for mobilenet_v2",
    "weights: {mobilenet_v2: random, resnet50: 4}": f"{WEIGHTS_RULE} 4 for resnet50",
    "weights: {resnet50: random}": (
        "weights must name initial weights for mobilenet_v2, which is searched"
    ),
    # The space.
    "space: {}": "space must map at least one param to its values; got {}",
    "space: null": "space must map at least one param to its values; got null",
    "space: [lr]": "space must map at least one param to its values; got ['lr']",
    "space: {lr: 3}": "space.lr must be a list of choices or a mapping of low and high; got 3: "
    "a param that is not to be searched is left out of space",
    "space: {lr: {low: 1e-2}}": "space.lr must have high, or be a list of choices",
    "space: {lr: {low: 1e-2, high: 1e-4}}": (
        "space.lr.low must be below high, got 0.01 and 0.0001: widen the range, or give a single "
        "value as a fixed setting"
    ),
    "space: {lr: {low: 1e-4, high: slow}}": "space.lr.high must be a number; got 'slow'",
    "space: {lr: {low: 1e-4, high: 1e-2, log: 1}}": "space.lr.log must be true or false; got 1",
    "space: {dropout: {low: 0, high: 0.5, log: true}}": (
        "space.dropout.low must be above 0 with log, got 0.0: raise it, or set log to false"
    ),
    "space: {batch_size: {low: 16, high: 64, log: true}}": (
        "space.batch_size.log is for real numbers; give choices such as [16, 32, 64]"
    ),
    "space: {dropout: {choices: [0.1, 0.3], low: 0}}": (
        "space.dropout.choices goes alone, without low, high, or log"
    ),
    "space: {dropout: {choices: 0.3}}": "space.dropout.choices must be a list; got 0.3",
    "space: {dropout: [0.3, 0.3]}": (
        "space.dropout.choices must be unique, got 0.3 twice: remove one"
    ),
    "space: {dropout: []}": (
        "space.dropout.choices must be a list with at least one value, got (): add values"
    ),
    "space: {backbone: {low: 0, high: 1}}": (
        "unknown key 'low' in space.backbone; known are choices"
    ),
    "space: {backbone: [resnet50]}": (
        "params.backbone, the baseline's value, must lie in space.backbone ['resnet50']; "
        "got mobilenet_v2: set params.backbone"
    ),
    "space: {lr: {low: 1e-5, high: 1e-4, log: true}}": (
        "params.lr, the baseline's value, must lie in space.lr [1e-05, 0.0001]; got 0.001: "
        "set params.lr"
    ),
}


@pytest.mark.parametrize(("setting", "message"), BAD_SETTINGS.items(), ids=range(len(BAD_SETTINGS)))
def test_a_bad_setting_gives_its_line(tmp_path: Path, setting: str, message: str) -> None:
    given_keys = yaml.safe_load(setting).keys()
    # A setting of the minimal file is replaced, not given twice.
    kept = [line for line in MINIMAL.splitlines() if line.split(":")[0] not in given_keys]
    assert message_of(tmp_path, "\n".join([*kept, setting])) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping of settings; got null"),
        ("- name: s", "must be a mapping of settings; got [{'name': 's'}]"),
        ("just words", "must be a mapping of settings; got 'just words'"),
        ("name: s", "data must say which images: data.path, or data.phantom"),
        ("data: {phantom: {}}", "name must be given"),
        ("name: s\nname: t", "line 2: 'name' is given twice; remove one"),
        (
            "name: s\ntraining:\n  max_epochs: 3\n  max_epochs: 4",
            "line 4: 'max_epochs' is given twice; remove one",
        ),
        ('"a\\nb": 1\n"a\\nb": 2', "line 2: 'a\\nb' is given twice; remove one"),
        ("? [1]\n: 2", "line 1: a key must be a word"),
        (
            "name: &n s\nstorage: *n",
            "line 2: aliases are not supported; write the value out",
        ),
        (
            "name: {",
            "must be YAML; while parsing a flow node expected the node content, but found "
            "'<stream end>' in \"<unicode string>\", line 1, column 8: name: { ^",
        ),
        ("seed: 2024-13-01", "must be YAML; month must be in 1..12"),
        (
            "seed: !!python/object/apply:os.system [exit]",
            "line 1: tags are not supported; got "
            "'tag:yaml.org,2002:python/object/apply:os.system': leave it out",
        ),
        # PyYAML's constructors fail on these with errors of any kind.
        (
            "seed: !!bool x",
            "line 1: tags are not supported; got 'tag:yaml.org,2002:bool': leave it out",
        ),
        (
            "name: !%1b[31mred x",
            "line 1: tags are not supported; got '!\\x1b[31mred': leave it out",
        ),
        # It takes these for 3,723 and 3,723.5, and does not finish with long ones.
        ("name: a\nseed: 1:2:3", "line 2: '1:2:3' is a number in base 60 to YAML; quote it"),
        ("seed: 1:2:3.5", "line 1: '1:2:3.5' is a number in base 60 to YAML; quote it"),
    ],
)
def test_a_file_that_is_no_mapping_of_settings_gives_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    assert message_of(tmp_path, text) == message


def test_bytes_that_are_no_text_give_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(b"name: \xff")
    with pytest.raises(InputError) as error:
        load_sweep(path)
    reason = "'utf-8' codec can't decode byte 0xff in position 6: invalid start byte"
    assert str(error.value) == f"{path}: must be YAML; {reason}"


def test_nesting_without_end_gives_one_line(tmp_path: Path) -> None:
    message = message_of(tmp_path, "[" * 1000)
    assert message.startswith("must be YAML; maximum recursion depth exceeded")


def test_a_missing_file_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    with pytest.raises(InputError) as error:
        load_sweep(path)
    assert str(error.value) == f"the sweep file must exist; nothing at {path}"


def test_a_file_that_cannot_be_read_gives_one_line() -> None:
    path = Path("/proc/self/mem")  # nothing is mapped at its start
    if not path.is_file():
        pytest.skip("needs Linux")
    with pytest.raises(InputError) as error:
        load_sweep(path)
    assert str(error.value) == f"{path}: must be YAML; [Errno 5] Input/output error"


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    with path.open("wb") as file:
        file.write(MINIMAL.encode() + b"#")
        file.truncate(MAX_YAML_BYTES + 1)
    with pytest.raises(InputError) as error:
        load_sweep(path)
    assert str(error.value) == f"{path}: a sweep file must be below 256 KiB; is it one?"


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), (".5e-1", 0.05), ("1", 1.0), ("'2'", 2.0)]
)
def test_what_yaml_takes_for_text_is_a_number_all_the_same(
    tmp_path: Path, text: str, value: float
) -> None:
    sweep = load_text(tmp_path, MINIMAL + f"params: {{weight_decay: {text}}}")
    assert sweep.params.weight_decay == value
    assert isinstance(sweep.params.weight_decay, float)


def test_a_whole_number_may_be_written_as_a_real_one(tmp_path: Path) -> None:
    sweep = load_text(tmp_path, MINIMAL + "search: {num_trials: 1e2}")
    assert sweep.search.num_trials == 100
    assert isinstance(sweep.search.num_trials, int)


def test_a_space_becomes_domains_in_the_files_order(tmp_path: Path) -> None:
    sweep = load_text(
        tmp_path,
        MINIMAL
        + "space:\n"
        + "  lr: {low: 1e-4, high: 1e-2, log: true}\n"
        + "  batch_size: [16, 32]\n"
        + "  unfreeze_depth: {low: 1, high: 4}\n"
        + "  backbone: {choices: [resnet50, mobilenet_v2]}\n",
    )
    assert list(sweep.space.items()) == [
        ("lr", Float(low=1e-4, high=1e-2, log=True)),
        ("batch_size", Choice(choices=(16, 32))),
        ("unfreeze_depth", Int(low=1, high=4)),
        ("backbone", Choice(choices=("resnet50", "mobilenet_v2"))),
    ]


def test_relative_paths_start_from_the_file_and_storage_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    text = (
        "name: s\ndata: {path: ../images}\nstorage: out\n"
        "weights: {mobilenet_v2: w.pth, resnet50: [/abs/w.pth, imagenet, random, w]}\n"
    )
    sweep = load_text(tmp_path / "file", text)
    assert sweep.data.path == str(tmp_path / "images")
    assert sweep.storage == str(tmp_path / "cwd/out")
    assert sweep.folder == tmp_path / "cwd/out/s"
    assert sweep.weights == {
        "mobilenet_v2": str(tmp_path / "file/w.pth"),
        "resnet50": ("/abs/w.pth", "imagenet", "random", str(tmp_path / "file/w")),
    }


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sweep = load_text(tmp_path, "name: s\ndata: {path: ~/images}\nstorage: ~/sweeps\nweights: ~/w")
    assert sweep.data.path == str(tmp_path / "home/images")
    assert sweep.storage == str(tmp_path / "home/sweeps")
    assert sweep.weights["resnet50"] == str(tmp_path / "home/w")


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    text = MINIMAL + "search: {num_trials: 9, sampler: random}\n"
    overrides = {"search.num_trials": 4, "training.max_epochs": 5, "seed": 3, "weights": "random"}
    sweep = load_text(tmp_path, text, overrides)
    assert sweep.search.num_trials == 4
    assert sweep.search.sampler == "random"
    assert sweep.training.max_epochs == 5
    assert sweep.seed == 3
    assert sweep.weights == dict.fromkeys(BACKBONES, "random")


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    message = message_of(tmp_path, MINIMAL, {"search.num_trials": 0})
    assert message == "search.num_trials must be in [1, 1000000]; got 0"
    message = message_of(tmp_path, MINIMAL, {"search.num_trails": 4})
    assert message == "unknown key 'num_trails' in search; did you mean num_trials?"


EVERYTHING = """
name: everything
seed: 7
metric: val_loss
study_url: postgresql://host/study
weights: {mobilenet_v2: [/w/mobilenet_v2.pth, random], resnet50: imagenet}
data:
  path: /images
  group_pattern: '(P\\d+)'
  class_balance: none
  skip_bad_images: true
  source_weights: {figshare: 2, br35h: 0.5}
params: {lr: 2e-5, batch_size: 16}
space:
  lr: {low: 1e-6, high: 1e-2, log: true}
  dropout: {low: 0, high: 0.7}
  unfreeze_depth: {low: 0, high: 3}
  batch_size: [8, 16]
  backbone: [resnet50, mobilenet_v2]
augmentation: {noise: 0.0625}
training: {max_epochs: 9, warmup_epochs: 0.25, precision: 32-true}
search: {num_trials: 5, sampler: random, max_concurrent_trials: 2, time_budget_s: 3600.5}
scheduler: null
resources: {cpus_per_trial: 2, gpus_per_trial: 0.25}
"""


@pytest.mark.parametrize("text", [MINIMAL, EVERYTHING])
def test_a_dumped_sweep_loads_as_the_same(tmp_path: Path, text: str) -> None:
    sweep = load_text(tmp_path, text)
    (tmp_path / "elsewhere").mkdir()
    again = load_text(tmp_path / "elsewhere", dump_sweep(sweep))
    assert again == sweep
    assert list(again.space) == list(sweep.space)


def test_defaults_are_the_baseline(tmp_path: Path) -> None:
    sweep = load_text(tmp_path, MINIMAL)
    assert sweep.params == TrialParams()
    assert sweep.data == DataSettings(phantom=PhantomSettings())
    assert sweep.weights == dict.fromkeys(BACKBONES, "imagenet")
    assert (sweep.metric, sweep.mode) == ("val_macro_f1", "max")
    assert sweep.backbones == ("mobilenet_v2", "resnet50")


def test_there_are_sweep_files() -> None:
    assert "quickstart.yaml" in [path.name for path in SWEEP_FILES]


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda path: path.name)
def test_every_sweep_file_of_the_project_loads(path: Path) -> None:
    assert load_sweep(path).name == path.stem


def rungs_of(grace: int, factor: int, max_epochs: int) -> tuple[int, ...]:
    return Sweep(
        name="s",
        data=DataSettings(),
        training=TrainingSettings(max_epochs=max_epochs),
        scheduler=SchedulerSettings(grace_period_epochs=grace, reduction_factor=factor),
    ).rung_epochs


@pytest.mark.parametrize(
    ("grace", "factor", "max_epochs", "rungs"),
    [
        (1, 3, 27, (1, 3, 9, 27)),
        (3, 3, 81, (3, 9, 27, 81)),
        (3, 3, 12, (3, 9, 12)),
        (2, 2, 6, (2, 4, 6)),
        (1, 2, 1, (1,)),
        (5, 2, 5, (5,)),
    ],
)
def test_rungs_are_a_factor_apart_and_the_last_epoch_comes_last(
    grace: int, factor: int, max_epochs: int, rungs: tuple[int, ...]
) -> None:
    assert rungs_of(grace, factor, max_epochs) == rungs


def test_rungs_below_the_last_epoch_are_rays_own() -> None:
    # Ray takes a logarithm to count them. At the last epoch it stops a trial, rung or none.
    for grace in (1, 2, 3, 5):
        for factor in (2, 3, 4):
            for max_epochs in [*range(grace, 30), 81, 243, 256]:
                asha = ASHAScheduler(max_t=max_epochs, grace_period=grace, reduction_factor=factor)
                rays = sorted(epoch for epoch, _ in asha._brackets[0]._rungs)
                ours = rungs_of(grace, factor, max_epochs)
                assert ours[:-1] == tuple(epoch for epoch in rays if epoch < max_epochs)


def test_without_a_scheduler_the_last_epoch_is_the_only_rung() -> None:
    sweep = Sweep(name="s", data=DataSettings(), scheduler=None)
    assert sweep.rung_epochs == (12,)


def test_importing_the_config_imports_neither_torch_nor_ray_nor_scipys_statistics() -> None:
    heavy = ("torch", "ray", "pytorch_lightning", "torchvision", "kornia", "scipy.stats")
    code = f"import sys, search.config; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr


KNOWN_KEYS = [
    *TOP_LEVEL.split(", "),
    *("path", "phantom", "num_patients", "image_size_px", "group_pattern", "val_fraction"),
    *(
        "class_balance",
        "skip_bad_images",
        "source_weights",
        "backbone",
        "unfreeze_depth",
        "lr",
        "dropout",
    ),
    *("batch_size", "low", "high", "log", "choices", "noise", "max_epochs", "warmup_epochs"),
    *("precision", "num_trials", "sampler", "max_concurrent_trials", "grace_period_epochs"),
    *("gpus_per_trial", "mobilenet_v2", "resnet50"),
]
# Stands for a whole number that Python reads but does not print.
HUGE = "HUGE"
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-9, 99)
    | st.sampled_from([10**20, 10**400, -(2**60), HUGE])
    | st.floats()
    | st.dates()
    | st.text(max_size=5)
    | st.sampled_from(["1e-4", "a\0b", "a\nb", "~x/y", "~", "\ud800", "imagenet", "random", "./w"])
    | st.sampled_from(KNOWN_KEYS)
)
KEYS = st.sampled_from([*KNOWN_KEYS, HUGE]) | st.text(max_size=3) | st.integers(0, 3) | st.none()
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.sampled_from(TOP_LEVEL.split(", ")) | KEYS, VALUES, max_size=5)


def check_that_it_loads_or_says_why_in_one_line(folder: Path, text: str) -> None:
    path = folder / "sweep.yaml"
    path.write_text(text.replace(HUGE, "0x" + "f" * 5000), encoding="utf-8")
    try:
        sweep = load_sweep(path)
    except InputError as error:
        message = str(error)
    else:
        message = "it is a sweep"
        path.write_text(dump_sweep(sweep), encoding="utf-8")
        assert load_sweep(path) == sweep
    assert message.isprintable()  # no line break is


in_one_folder = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@in_one_folder
@given(document=DOCUMENTS)
def test_any_document_loads_or_gives_one_line(tmp_path: Path, document: dict[Any, Any]) -> None:
    valid = {"name": "s", "data": {"phantom": {}}}
    check_that_it_loads_or_says_why_in_one_line(tmp_path, yaml.safe_dump(valid | document))


@in_one_folder
@given(data=st.data())
def test_any_change_to_a_valid_document_loads_or_gives_one_line(
    tmp_path: Path, data: st.DataObject
) -> None:
    document = yaml.safe_load(EVERYTHING)
    at = document
    key = data.draw(st.sampled_from(sorted(at)))
    while isinstance(at[key], dict) and data.draw(st.integers(0, 3)):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at)))
    at[key] = data.draw(VALUES)
    check_that_it_loads_or_says_why_in_one_line(tmp_path, yaml.safe_dump(document))


@in_one_folder
@given(
    text=st.text(alphabet=st.sampled_from("ab1:-[]{},&*!?|>'\"#%@` \n\t\0\x85\u2028"), max_size=30)
)
def test_any_text_loads_or_gives_one_line(tmp_path: Path, text: str) -> None:
    check_that_it_loads_or_says_why_in_one_line(tmp_path, text)
