"""What is installed is what is in the tree, and the tree keeps to its own rules."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_modules
import search

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {"build", "dist"}  # where a wheel is built


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SHIPPED = python_files("search", "lightning_modules")
READERS = [*SHIPPED, *python_files("experiments")]
ALL = [*SHIPPED, *python_files("experiments", "cluster", "tests")]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """The top-level names of every import in a file, wherever it stands."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, under the name it is called by."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords_of(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def tracked_files() -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    # A file that is deleted and not yet committed is listed too.
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_shipped_packages_are_the_packages_in_the_tree() -> None:
    in_tree = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.rglob("__init__.py")
        if not any(
            part.startswith(".") or part in NOT_OURS for part in path.relative_to(ROOT).parts
        )
    }
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(in_tree)
    # No module lies in a folder of theirs that is not a package.
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SHIPPED}
    assert folders == in_tree


@pytest.mark.parametrize("package", [search, lightning_modules], ids=lambda p: p.__name__)
def test_imported_packages_are_this_repositorys(package: Any) -> None:
    assert [Path(folder) for folder in package.__path__] == [ROOT / package.__name__]


def test_the_distribution_cannot_be_uploaded() -> None:
    # `search` and `lightning_modules` are names that others may have.
    assert "Private :: Do Not Upload" in pyproject()["project"]["classifiers"]


def test_the_command_exists() -> None:
    module, function = pyproject()["project"]["scripts"]["neurosweep"].split(":")
    tree = tree_of(ROOT / f"{module.replace('.', '/')}.py")
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", python_files("lightning_modules"), ids=lambda path: path.stem)
def test_what_is_trained_has_never_heard_of_the_search(path: Path) -> None:
    assert not imports_of(path) & {"ray", "optuna", "search"}


def test_nobody_imports_the_other_lightning() -> None:
    # Its Callback is another class than pytorch_lightning's.
    assert [path for path in ALL if "lightning" in imports_of(path)] == []


def test_nothing_shipped_imports_what_is_not() -> None:
    beside = {"tests", "experiments", "cluster", "conftest"}
    assert [path for path in SHIPPED if imports_of(path) & beside] == []


def test_no_module_is_called_utils() -> None:
    parts = [part for path in SHIPPED for part in path.relative_to(ROOT).with_suffix("").parts]
    assert not {"utils", "util", "helpers", "common", "misc"} & set(parts)


def test_nothing_is_unpickled() -> None:
    picklers = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
    for path in READERS:
        assert not imports_of(path) & picklers, path
        for name, call in calls_of(path):
            # pandas' read_pickle, numpy's allow_pickle. pickletools looks at one, and runs nothing.
            assert "pickle" not in name.replace("pickletools.genops", ""), f"{path}:{call.lineno}"
            assert keywords_of(call).get("allow_pickle", "False") == "False", path


def test_torch_loads_tensors_only() -> None:
    loads = [
        (path, call)
        for path in READERS
        for name, call in calls_of(path)
        if name in ("torch.load", "load_from_checkpoint") or name.endswith(".load_from_checkpoint")
    ]
    assert loads, "the search below looks at something"
    for path, call in loads:
        assert keywords_of(call).get("weights_only") == "True", f"{path}:{call.lineno}"
    # Under no other name.
    for path in SHIPPED:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "load" not in {alias.name for alias in node.names}, path


def test_yaml_files_are_read_with_our_strict_loader_only() -> None:
    readers = {
        (path.name, name, keywords_of(call).get("Loader"))
        for path in SHIPPED
        for name, call in calls_of(path)
        if name.startswith("yaml.") and "load" in name
    }
    assert readers == {("strict_yaml.py", "yaml.load", "_StrictLoader")}


def test_no_text_is_run_as_code() -> None:
    for path in READERS:
        for name, call in calls_of(path):
            assert name not in ("eval", "exec", "compile", "__import__"), f"{path}:{call.lineno}"
            assert name not in ("os.system", "os.popen"), f"{path}:{call.lineno}"
            assert keywords_of(call).get("shell", "False") == "False", f"{path}:{call.lineno}"


def test_exported_programs_are_read_only_where_this_process_wrote_them() -> None:
    # torch.export.load unpickles.
    found = {
        (path.name, name)
        for path in READERS
        for name, _ in calls_of(path)
        if name in ("torch.export.load", "torch.jit.load", "torch.hub.load", "pt2_logits")
    }
    assert found == {("network_files.py", "torch.export.load"), ("export.py", "pt2_logits")}


def test_no_archive_is_unpacked_and_no_xml_is_parsed() -> None:
    parsers = {"xml", "lxml", "xmltodict", "html5lib", "tarfile"}
    for path in READERS:
        assert not imports_of(path) & parsers, path
        for name, call in calls_of(path):
            last = name.rpartition(".")[2]
            assert last not in ("extractall", "extract", "unpack_archive"), f"{path}:{call.lineno}"


def test_every_upper_bound_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("\ndependencies = [\n")[1].split("\n]\n")[0]
    lines = [line.strip() for line in block.splitlines()]
    assert len(lines) == len(pyproject()["project"]["dependencies"])
    assert [line for line in lines if "<" in line and "#" not in line] == []


# Of packages that others need: the first version without the hole, by its advisory. pip-audit asks
# a server for these; a test should not.
FLOORS = {
    "aiohttp": ("3.14.3", "CVE-2026-69244"),
    "fonttools": ("4.61", "CVE-2025-66034"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "mako": ("1.3.12", "CVE-2026-44307"),
    "protobuf": ("6.33.5", "CVE-2026-0994"),
    "requests": ("2.33", "CVE-2026-25645"),
    "urllib3": ("2.7", "CVE-2026-44432"),
    "werkzeug": ("3.1.6", "GHSA-29vq-49wr-vm6x"),
}


def test_no_pinned_version_has_a_hole_that_is_known_here() -> None:
    lines = pyproject()["tool"]["uv"]["constraint-dependencies"]
    pinned = dict(line.split("==") for line in lines)
    assert FLOORS.keys() <= pinned.keys()
    low = {name for name, (floor, _) in FLOORS.items() if Version(pinned[name]) < Version(floor)}
    assert not low
    for requirement in map(Requirement, pyproject()["project"]["dependencies"]):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_no_lock_file_is_tracked() -> None:
    locks = ("*.lock", "*lock.json", "*lock.yaml", "*lock.yml", "requirements*.txt")
    assert [path for path in tracked_files() if any(path.match(lock) for lock in locks)] == []


# Written in pieces, so that this file does not hold what it looks for.
# Not the one of the container, which is the same everywhere.
MACHINE_PATH = re.compile(
    r"(?<![\w.$}~-])/(?:home(?!/neurosweep/)|Users|root|work|mnt|scratch)" + r"/\w\w"
)
INDEX_HOSTS = (
    "pypi." + "org", "pythonhosted." + "org", "download.pytorch.org/" + "whl",
    "conda." + "anaconda", "--index-" + "url", "--extra-index-" + "url", "--find-" + "links",
)  # fmt: skip


def test_tracked_text_names_no_machines_paths_and_no_package_index() -> None:
    found, read = [], 0
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # not text
        read += 1
        for number, line in enumerate(lines, start=1):
            if MACHINE_PATH.search(line) or any(host in line for host in INDEX_HOSTS):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert read > 20
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("see /home" + "/ann/data", True),
        ('path = "/work' + '/main"', True),
        ("https://host/home" + "/page", False),
        ("~/work" + "/main", False),
        ("/home" + "/x", False),  # anybody
        ("/homework", False),
    ],
)
def test_a_machines_path_is_recognised(line: str, is_one: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is is_one


def test_the_telemetry_of_onnx_runtime_is_off(tmp_path: Path) -> None:
    # With its telemetry on, it leaves a session id in the temporary folder.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    code = "import lightning_modules.onnx_session"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(tmp_path.iterdir())
