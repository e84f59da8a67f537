"""The files of ``cluster/`` are what those who read them accept: Ray, Kubernetes, bash, and we."""

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from search.cli import parser

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
RAY_UP = sorted((CLUSTER / "ray_up").glob("*.yaml"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@cache
def kuberay_schema() -> Any:
    return read(ROOT / "tests" / "kuberay_schema.yaml")


def prepared(path: Path) -> Any:
    """A file for ``ray up`` with Ray's defaults filled in, once it has passed Ray's own check."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(path))
    validate_config(config)
    return config


def test_there_is_a_file_for_each_kind_of_cluster() -> None:
    assert [path.stem for path in RAY_UP] == ["aws", "gcp", "machines"]
    assert [path.stem for path in KUBERAY] == ["raycluster", "rayjob"]


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_accepts_the_files_for_ray_up(path: Path) -> None:
    config = prepared(path)
    started = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    # No node answers without the token, which is copied to it; the dashboard is not for everyone.
    assert started.count("RAY_AUTH_MODE=token") == 2 or (
        "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    )
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    assert "--dashboard-host=127.0.0.1" in started
    # Ray's default set-up would install another Ray.
    assert not config["setup_commands"]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_clouds_workers_are_spot_and_start_at_none_and_its_head_is_neither(name: str) -> None:
    config = prepared(CLUSTER / "ray_up" / f"{name}.yaml")
    types = config["available_node_types"]
    head, worker = types[config["head_node_type"]], types["gpu_spot"]
    assert (worker["min_workers"], worker["max_workers"]) == (0, 4)
    assert "SPOT" in str(worker["node_config"]).upper()
    assert "SPOT" not in str(head["node_config"]).upper()
    assert head["resources"]["CPU"] == 0
    assert "--num-cpus=0" in " ".join(config["head_start_ray_commands"])


def test_ray_refuses_a_misspelt_key() -> None:
    config = prepared(RAY_UP[0])
    config["max_worker"] = 1
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(config)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_the_manifests_fit_kuberays_api(path: Path) -> None:
    manifest = read(path)
    jsonschema.validate(manifest, kuberay_schema())
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    check_pods(spec["headGroupSpec"]["template"])
    for group in spec["workerGroupSpecs"]:
        check_pods(group["template"])


def check_pods(template: Any) -> None:
    """Ask Kubernetes' own schema, which knows no field that Kubernetes does not."""
    pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}}
    kubernetes_validate.validate(pods | {"template": template}, "1.37", strict=True)


def test_misspelt_keys_are_refused() -> None:
    jsonschema.Draft7Validator.check_schema(kuberay_schema())
    manifest = read(CLUSTER / "kuberay" / "raycluster.yaml")
    workers = manifest["spec"]["workerGroupSpecs"][0]
    workers["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        check_pods(workers["template"])
    manifest = read(CLUSTER / "kuberay" / "raycluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(manifest, kuberay_schema())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("restartPolicy",), "Sometimes"),
        (("tolerations", 0, "operator"), "Exist"),
        (("volumes", 0), {"name": "shared"}),
        (("containers", 0, "imagePullPolicy"), "never"),
        (("containers", 0, "resources", "limits", "memory"), "4 gigs"),
    ],
)
def test_values_that_kubernetes_does_not_know_are_refused(
    place: tuple[Any, ...], value: Any
) -> None:
    manifest = read(CLUSTER / "kuberay" / "raycluster.yaml")
    jsonschema.validate(manifest, kuberay_schema())
    pod = manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    *outer, last = place
    for key in outer:
        pod = pod[key]
    pod[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, kuberay_schema())


def test_job_and_cluster_are_of_one_kind() -> None:
    cluster = read(CLUSTER / "kuberay" / "raycluster.yaml")["spec"]
    assert read(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]["rayClusterSpec"] == cluster
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    # Ray of another version would refuse the job, and the nodes each other.
    pinned = re.search(r'"ray==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    [workers] = cluster["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 8)
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    pods = [head["template"]["spec"], workers["template"]["spec"]]
    assert pods[0]["nodeSelector"] != pods[1]["nodeSelector"]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        claims = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
        assert {"claimName": "neurosweep-shared"} in claims
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names
    assert pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    # The driver alone talks to the study.
    [password] = [v for v in pods[0]["containers"][0]["env"] if v["name"] == "PGPASSWORD"]
    assert password == {
        "name": "PGPASSWORD",
        "valueFrom": {"secretKeyRef": {"name": "neurosweep-postgresql", "key": "password"}},
    }
    assert "PGPASSWORD" not in str(pods[1])


def commands_in(path: Path) -> list[list[str]]:
    """Every neurosweep command line in a file, in its comments or its entry point."""
    text = re.sub(r"\\\n[ #]*", "", path.read_text())
    entrypoint = read(path).get("spec", {}).get("entrypoint", "")
    lines = [line for line in text.splitlines() if line.startswith("#")] + [entrypoint]
    found = re.findall(r"neurosweep ((?:launch|resume) [^;)\"'`]*)", "\n".join(lines))
    return [shlex.split(line.replace("...", "").splitlines()[0]) for line in found]


@pytest.mark.parametrize(
    ("name", "num_commands"),
    [
        ("ray_up/aws.yaml", 1),
        ("ray_up/machines.yaml", 1),
        ("kuberay/raycluster.yaml", 1),
        ("kuberay/rayjob.yaml", 2),
    ],
)
def test_the_commands_in_the_files_are_ours(name: str, num_commands: int) -> None:
    commands = commands_in(CLUSTER / name)
    assert len(commands) == num_commands
    for command in commands:
        options = parser().parse_args(command)
        assert options.address == "auto"


def test_the_batch_script_is_sound_bash() -> None:
    script = CLUSTER / "slurm.sbatch"
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert checked.stderr == ""
    for command in (
        "resume NAME --storage STORAGE --address H:1",
        "launch S --name NAME --storage STORAGE --address H:1 --data D",
    ):
        parser().parse_args(command.split())
    assert script.read_text().index("set -euo pipefail") > script.read_text().rindex("#SBATCH")


def test_the_container_is_pinned_and_runs_as_nobody_special() -> None:
    lines = (CLUSTER / "Containerfile").read_text().splitlines()
    [base] = [line for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"FROM python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    [user] = [line for line in lines if line.startswith("USER ")]
    assert user != "USER root"
    assert any(re.search(r"\buv==\d+\.\d+\.\d+", line) for line in lines)
    # All that setuptools needs is copied, after which nothing is root's.
    copied = {
        name
        for line in lines
        if line.startswith("COPY")
        for name in line.split()[2:-1]
        if line.split()[1] == "--chown=neurosweep"
    }
    assert copied == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "search",
        "lightning_modules",
        "experiments",
    }
    assert all((ROOT / name).exists() for name in copied)
