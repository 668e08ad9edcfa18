"""The cluster files: by Ray's own schema and command line, and by running what they run on a host."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "cluster" / "launch"
RAY_FILES = sorted(path for path in LAUNCH.glob("*.yaml") if not path.name.startswith("kuberay"))
KUBERAY_FILES = sorted(LAUNCH.glob("kuberay*.yaml"))
ROLES = {"headrace_learner", "headrace_rollout", "headrace_scoring"}


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def ray_start_options(words: list[str]) -> dict[str, Any]:
    """What Ray's own command line reads in `ray start WORDS`; fails on an option that it does not have."""
    from click import Context
    from ray.scripts.scripts import start

    options, rest, _ = start.make_parser(Context(start)).parse_args(words)
    assert not rest
    return dict(options)


def test_there_is_a_file_for_each_kind_of_cluster() -> None:
    assert {path.stem for path in RAY_FILES} == {"aws", "aws-cpu", "gcp", "gcp-cpu", "local-ssh"}
    assert {path.stem for path in KUBERAY_FILES} == {"kuberay-rayjob", "kuberay-rayjob-cpu"}


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.stem)
def test_ray_accepts_it(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(path))
    validate_config(prepared)
    workers = sum(kind["min_workers"] for kind in prepared["available_node_types"].values())
    assert 2 <= workers <= prepared["max_workers"]


def test_rays_schema_refuses_what_it_does_not_know() -> None:
    """So that the test above can fail."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError):
        validate_config(prepare_config(load(LAUNCH / "aws.yaml") | {"file_mount": {}}))


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.stem)
def test_the_package_and_the_token_get_onto_every_host(path: Path) -> None:
    mounts = load(path)["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"  # a path, which is not the token
    sources = {there: here for there, here in mounts.items() if there != "~/.ray/auth_token"}
    for there, here in sources.items():
        assert there == f"~/headrace/{here}"
        assert (ROOT / here).exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    needed = packages | {project["project"]["readme"], *project["project"]["license-files"]}
    assert needed | {"pyproject.toml", "requirements.lock"} <= set(sources.values())


@pytest.mark.parametrize("path", [*RAY_FILES, *KUBERAY_FILES], ids=lambda path: path.stem)
def test_no_secret_stands_in_it(path: Path) -> None:
    text = path.read_text()
    assert "RAY_AUTH_TOKEN=" not in text
    assert not re.search(r"\b[0-9a-fA-F]{24,}\b", text)
    assert not re.search(r"(key|secret|password)\s*[:=]\s*[A-Za-z0-9+/]{20,}", text, re.IGNORECASE)


@pytest.mark.parametrize(
    "path", [one for one in RAY_FILES if one.stem != "local-ssh"], ids=lambda path: path.stem
)
def test_cloud_machines_have_the_roles_as_resources(path: Path) -> None:
    kinds = load(path)["available_node_types"]
    roles = {name: set(kind["resources"]) & ROLES for name, kind in kinds.items()}
    assert set().union(*roles.values()) == ROLES
    assert roles[load(path)["head_node_type"]] == {"headrace_learner"}  # run folder and checkpoints lie there
    gpus = [kind["resources"].get("GPU", 0) for kind in kinds.values()]
    if path.stem == "gcp":
        assert all(gpus)
    if path.stem.endswith("-cpu"):
        assert not any(gpus)
        assert "install cpu" in " ".join(load(path)["setup_commands"])


def test_the_dockerfile_copies_what_the_cluster_files_mount() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {
        word for line in lines if line.startswith("COPY") for word in line.split()[1:-1] if word[0] != "-"
    }
    assert copied == set(load(LAUNCH / "local-ssh.yaml")["file_mounts"].values()) - {"~/.ray/auth_token"}


# ---- what a host runs --------------------------------------------------------------------------------------

RAY = """#!/bin/bash
printf '%s\\n' "$RAY_AUTH_MODE" "$RAY_enable_autoscaler_v2" "$PYTHONPATH" "$OMP_NUM_THREADS" "$@"
"""


class Host:
    """A home folder as Ray's file mounts leave it, with a `ray` that tells how it was called."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "headrace"
        (self.folder / "cluster").mkdir(parents=True)
        (self.folder / "cluster" / "launch").symlink_to(LAUNCH)
        for name in ("requirements.lock", "pyproject.toml"):
            (self.folder / name).symlink_to(ROOT / name)
        (home / ".ray").mkdir(mode=0o755)
        self.token = home / ".ray" / "auth_token"
        self.token.write_text("f00d")
        self.token.chmod(0o644)

    def with_environment(self) -> None:
        binaries = self.folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        (binaries / "python").symlink_to(sys.executable)
        (binaries / "ray").write_text(RAY)
        (binaries / "ray").chmod(0o755)

    def run(self, command: str, **more: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["bash", "-c", command],
            check=False,
            env=environment | more,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def ray_start(self, commands: list[str], **more: str) -> dict[str, Any]:
        """How the file's last command calls `ray start`."""
        done = self.run(commands[-1], **more)
        assert done.returncode == 0, done.stderr
        mode, autoscaler, path, threads, word, *rest = done.stdout.splitlines()
        assert (mode, path, threads, word) == ("token", str(self.folder), "", "start")
        return ray_start_options(rest) | {"autoscaler_v2": autoscaler}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    # The script finds its folder from its own place, which must not be the checkout.
    (made.folder / "cluster" / "launch").unlink()
    (made.folder / "cluster" / "launch").mkdir()
    (made.folder / "cluster" / "launch" / "host.sh").write_text((LAUNCH / "host.sh").read_text())
    return made


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.stem)
def test_the_head_starts_as_it_should(path: Path, host: Host) -> None:
    host.with_environment()
    config = load(path)
    local = config["provider"]["type"] == "local"
    head = {"provider": {"type": "local", "head_ip": "127.0.0.1"}} if local else {"provider": {"type": "aws"}}
    (host.home / "ray_bootstrap_config.yaml").write_text(json.dumps(head))  # as Ray leaves it there
    options = host.ray_start(config["head_start_ray_commands"])
    assert options["head"]
    assert options["dashboard_host"] == "127.0.0.1"
    assert options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert options.get("node_ip_address") == ("127.0.0.1" if local else None)
    assert options.get("resources") == ('{"headrace_learner": 1}' if local else None)
    assert options["autoscaler_v2"] == ("0" if local else "")
    assert host.token.stat().st_mode & 0o777 == 0o600
    assert host.token.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.stem)
def test_a_worker_starts_as_it_should(path: Path, host: Host) -> None:
    host.with_environment()
    options = host.ray_start(load(path)["worker_start_ray_commands"], RAY_HEAD_IP="127.0.0.1")
    assert options["address"] == "127.0.0.1:6379"
    assert options["node_ip_address"] == "127.0.0.1"
    assert not options.get("head")
    assert options.get("resources") is None  # this address is none of the file's


def test_each_address_gets_its_own_roles(host: Host) -> None:
    host.with_environment()
    (command,) = load(LAUNCH / "local-ssh.yaml")["worker_start_ray_commands"][1:]
    found = {}
    for address in ("192.0.2.11", "192.0.2.12"):
        here = command.replace(address, "127.0.0.1")
        found[address] = json.loads(host.ray_start([here], RAY_HEAD_IP="127.0.0.1")["resources"])
    assert found == {
        "192.0.2.11": {"headrace_rollout": 1},
        "192.0.2.12": {"headrace_rollout": 1, "headrace_scoring": 1},
    }


def test_an_unknown_role_is_refused(host: Host) -> None:
    host.with_environment()
    done = host.run("bash ~/headrace/cluster/launch/host.sh ray start", HEADRACE_ROLES="actor")
    assert done.returncode == 1
    assert "'actor' is no role; there are learner, rollout and scoring" in done.stderr


@pytest.mark.parametrize("command", ["install", "ray start --head"])
def test_nothing_starts_without_a_token(command: str, host: Host) -> None:
    host.with_environment()
    host.token.write_text("")
    done = host.run(f"bash ~/headrace/cluster/launch/host.sh {command}")
    assert done.returncode == 1
    assert "there is no token" in done.stderr
    assert "file_mounts" in done.stderr


def test_an_environment_that_has_everything_is_used(host: Host) -> None:
    for name in ("actors", "learner", "rewards"):
        (host.folder / name).symlink_to(ROOT / name)
    for source in (ROOT / "cluster").glob("*.py"):
        (host.folder / "cluster" / source.name).symlink_to(source)
    for _ in range(2):  # `ray up` runs it again whenever something changed
        done = host.run("bash ~/headrace/cluster/launch/host.sh install cpu", HEADRACE_ENV=sys.prefix)
        assert done.returncode == 0, done.stderr
    assert (host.folder / ".venv").readlink() == Path(sys.prefix)
    profile = (host.home / ".bashrc").read_text()
    assert profile.count("RAY_AUTH_MODE=token") == 1
    found = host.run(". ~/.bashrc; command -v ray python")
    assert found.stdout.splitlines() == [
        str(host.folder / ".venv" / "bin" / name) for name in ("ray", "python")
    ]


def test_an_environment_that_lacks_something_is_refused(host: Host, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    done = host.run("bash ~/headrace/cluster/launch/host.sh install cpu", HEADRACE_ENV=str(bare))
    assert done.returncode == 1
    assert "deepspeed is missing" in done.stderr
    assert f"HEADRACE_ENV={bare} lacks" in done.stderr


def test_stop_ends_what_has_this_hosts_address_and_nothing_else(host: Host) -> None:
    host.with_environment()
    # A run of whoever tests has this address too: only what this test started may be ended.
    tools = host.home / "tools"
    tools.mkdir()
    for name in ("pgrep", "pkill"):
        found = shutil.which(name)
        (tools / name).write_text(f'#!/bin/sh\nexec {found} -P {os.getpid()} "$@"\n')
        (tools / name).chmod(0o755)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    mine, other = (
        subprocess.Popen([*sleeper, f"--node-ip-address={address}", "x"])
        for address in ("127.0.0.1", "127.0.0.11")
    )
    try:
        # A parent that has not yet waited for `mine` still shows it, but without its words.
        done = host.run(
            "bash ~/headrace/cluster/launch/host.sh stop",
            RAY_HEAD_IP="127.0.0.1",
            PATH=f"{tools}:/usr/local/bin:/usr/bin:/bin",
        )
        assert done.returncode == 0, done.stderr
        assert mine.wait(10) != 0
        assert other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


# ---- Kubernetes --------------------------------------------------------------------------------------------
# The package has no schema of KubeRay's; these are the fields that the files use, each required or known.


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Amounts(Model):
    limits: dict[str, str]
    requests: dict[str, str]


class Container(Model):
    name: str
    image: str
    env: list[dict[str, str]] = Field(default_factory=list)
    resources: Amounts
    ports: list[dict[str, int | str]] = Field(default_factory=list)
    security_context: dict[str, Any] = Field(default_factory=dict)
    volume_mounts: list[dict[str, str]] = Field(default_factory=list)


class PodSpec(Model):
    containers: list[Container]
    automount_service_account_token: Literal[False]
    restart_policy: Literal["Never"] | None = None
    security_context: dict[str, int] = Field(default_factory=dict)
    volumes: list[dict[str, Any]] = Field(default_factory=list)


class Labelled(Model):
    labels: dict[str, str]


class Pod(Model):
    metadata: Labelled
    spec: PodSpec


class HeadGroup(Model):
    service_type: Literal["ClusterIP"]
    ray_start_params: dict[str, str]
    template: Pod


class WorkerGroup(Model):
    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: Pod


class AuthOptions(Model):
    mode: Literal["token"]


class ClusterSpec(Model):
    ray_version: str
    auth_options: AuthOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class JobSpec(Model):
    entrypoint: str
    shutdown_after_job_finishes: Literal[True]
    ttl_seconds_after_finished: int
    backoff_limit: Literal[0]
    submitter_pod_template: Pod
    ray_cluster_spec: ClusterSpec


class Named(Model):
    name: str


class RayJob(Model):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Named
    spec: JobSpec


def kuberay(path: Path) -> tuple[RayJob, dict[str, Any], dict[str, Any]]:
    job, claim, policy = yaml.safe_load_all(path.read_text())
    return RayJob.model_validate(job), claim, policy


@pytest.mark.parametrize("path", KUBERAY_FILES, ids=lambda path: path.stem)
def test_a_rayjob_is_whole(path: Path) -> None:
    job, claim, policy = kuberay(path)
    spec = job.spec.ray_cluster_spec
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
    assert spec.ray_version == pins["ray"]
    pods = [spec.head_group_spec.template, *(group.template for group in spec.worker_group_specs)]
    assert len({container.image for pod in pods for container in pod.spec.containers}) == 1
    for pod in pods:
        (container,) = pod.spec.containers  # Ray runs in the first one
        mounts = {mount["name"]: mount["mountPath"] for mount in container.volume_mounts}
        assert mounts == {"shm": "/dev/shm", "runs": "/headrace/runs"}
        volumes = {volume["name"]: volume for volume in pod.spec.volumes}
        assert volumes.keys() == mounts.keys()
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container.security_context["allowPrivilegeEscalation"] is False
        assert container.security_context["runAsNonRoot"] is True
        assert container.resources.limits == container.resources.requests  # Ray plans with the limits
        assert ("nvidia.com/gpu" in container.resources.limits) == (path.stem == "kuberay-rayjob")
    # Every pod of the run, the submitter too, is behind the policy.
    (label,) = {json.dumps(pod.metadata.labels) for pod in [*pods, job.spec.submitter_pod_template]}
    assert policy["spec"]["podSelector"]["matchLabels"] == json.loads(label)
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    inside, operator = policy["spec"]["ingress"]
    assert inside["from"] == [{"podSelector": {"matchLabels": json.loads(label)}}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]


@pytest.mark.parametrize("path", KUBERAY_FILES, ids=lambda path: path.stem)
def test_a_rayjob_starts_ray_with_options_that_ray_has(path: Path) -> None:
    job, _, _ = kuberay(path)
    spec = job.spec.ray_cluster_spec
    groups = [("head", spec.head_group_spec.ray_start_params)]
    groups += [(group.group_name, group.ray_start_params) for group in spec.worker_group_specs]
    found = {}
    for name, params in groups:
        # KubeRay writes them into a shell command just as they stand.
        line = " ".join(f"--{key}={value}" for key, value in params.items())
        found[name] = json.loads(ray_start_options(shlex.split(line))["resources"])
    assert found == {
        "head": {"headrace_learner": 1},
        "rollout": {"headrace_rollout": 1},
        "scoring": {"headrace_scoring": 1},
    }


@pytest.mark.parametrize("path", KUBERAY_FILES, ids=lambda path: path.stem)
def test_a_rayjobs_entrypoint_is_a_command_of_headrace(path: Path) -> None:
    from cluster.config_file import load_config

    words = shlex.split(kuberay(path)[0].spec.entrypoint)
    assert words[:3] == ["python", "cluster/submit.py", "train"]
    load_config(ROOT / words[3], [])
    assert words[4] == "--run-dir"
    assert words[5].startswith("runs/")  # the volume that all pods share


def test_host_sh_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", LAUNCH / "host.sh"], check=True, env=dict(os.environ))
