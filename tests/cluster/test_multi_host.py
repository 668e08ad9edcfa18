"""A job on a cluster of three hosts, as a user runs it: up, submit, a host lost and given back, fetch, down.

The hosts are namespaces of this machine, each with its own network, processes, home, /tmp, shared memory and
sshd. Everything else is real: Ray's launcher over SSH, the shipped cluster file, the shipped stub.
HEADRACE_TEST_SUBNET chooses other addresses.
"""

import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from namespaces import DEFAULT_SUBNET, Hosts, HostsError, Plan, hosts, missing

from cluster.doctor_sockets import gives_pages

ROOT = Path(__file__).resolve().parents[2]
HEAD, ROLLOUT, MIXED = 1, 2, 3  # the head trains; one host samples, one samples and scores
STEPS, BATCH, GROUP = 5000, 16, 4  # more steps than there is time for: the test ends the run
JOB = f"""
[run]
name = "multi-host"
steps = {STEPS}
batch_size = {BATCH}
evaluate_prompts = 8
checkpoint_every = 10

[model.scratch]
hidden_size = 64
layers = 2
heads = 2
max_length = 32

[task]
kind = "reversal"
length = 4
train_size = 256
heldout_size = 16
demonstrations = 256

[warmup]
steps = 5
batch_size = 32

[[reward]]
kind = "task"
name = "gold"

[rollout]
actors = 2
cores = 1.2  # a host has two: no other has room for the actor of the lost one
group_size = {GROUP}
max_new_tokens = 8
start_timeout_s = 300

[optimizer]
lr = 1e-3
"""
_REASON = missing()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(_REASON), reason=f"no hosts can be made here: {_REASON}"),
]


class Cluster:
    """Three hosts, the cluster file that names them, and Ray's commands on it."""

    def __init__(self, made: Hosts, folder: Path) -> None:
        self.hosts = made
        self.folder = folder
        self.file = folder / "cluster.yaml"
        self.token = folder / "auth_token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        (folder / "jobs").mkdir()
        (folder / "jobs" / "job.toml").write_text(JOB)
        (folder / "ray").mkdir()
        self.file.write_text(yaml.safe_dump(self._config()))
        # Ray's notes on the cluster stay in this folder too.
        self.environment = os.environ | {
            "RAY_TMPDIR": str(folder / "ray"),
            "TMPDIR": str(folder / "ray"),
            "NO_COLOR": "1",
        }

    def _config(self) -> dict[str, Any]:
        """The shipped file with these hosts' addresses, as a user would edit it."""
        text = (ROOT / "cluster" / "launch" / "local-ssh.yaml").read_text()
        plan = self.hosts.plan
        for index, shipped in ((HEAD, "192.0.2.10"), (ROLLOUT, "192.0.2.11"), (MIXED, "192.0.2.12")):
            text = text.replace(shipped, plan.address(index))
        config: dict[str, Any] = yaml.safe_load(text)
        config["cluster_name"] = plan.name
        # Workers whose head is gone end after this time instead of a minute.
        commands = config["worker_start_ray_commands"]
        commands[-1] = f"RAY_gcs_rpc_server_reconnect_timeout_s=20 {commands[-1]}"
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(plan.key)}
        config["file_mounts"] |= {
            "~/.ray/auth_token": str(self.token),
            "~/headrace/jobs": str(self.folder / "jobs"),
        }
        return config

    def ray(self, *words: str, seconds: float = 180) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [Path(sys.executable).parent / "ray", *words],
            check=False,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )

    def submit(self, *words: str) -> "subprocess.Popen[str]":
        """`ray submit`, in the background: what it prints goes to submit.log."""
        stub = ROOT / "cluster" / "submit.py"
        with (self.folder / "submit.log").open("w") as log:
            return subprocess.Popen(
                [Path(sys.executable).parent / "ray", "submit", self.file, stub, "--", *words],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def resources(self) -> dict[str, float]:
        """What the cluster has, as Ray on the head knows."""
        script = (
            "import json, logging, ray; ray.init('auto', logging_level=logging.ERROR, log_to_driver=False); "
            "print(json.dumps(ray.cluster_resources()))"
        )
        output = self.hosts.run(HEAD, f"python -c {shlex.quote(script)}")
        (answer,) = (line for line in output.splitlines() if line.startswith("{"))  # Ray prints events too
        found: dict[str, float] = json.loads(answer)
        return found

    def actors(self, index: int, name: str) -> int:
        """Processes of a kind of actor on a host."""
        try:
            return int(self.hosts.run(index, f"pgrep -c -f '^ray::{name}' || true").splitlines()[-1])
        except HostsError:
            return 0

    def run_folder(self, name: str) -> Path:
        """A run folder on the head, as this machine finds it."""
        return self.hosts.plan.home(HEAD) / "headrace" / "runs" / name


def wait_for(
    what: Callable[[], bool], seconds: float, said: str, process: Any = None, log: Any = None
) -> None:
    """Wait until something is so; fails with what was printed if the process ends before."""
    deadline = time.monotonic() + seconds
    while not what():
        printed = log.read_text()[-6000:] if log is not None else ""
        assert process is None or process.poll() is None, f"ended before {said}:\n{printed}"
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {said}\n{printed}"
        time.sleep(0.5)


def _plan(subnet: str) -> Plan:
    """Names that belong to the subnet, so that tests with different ones can run side by side."""
    name = f"t{int(ipaddress.ip_network(subnet).network_address) >> 8:06x}"
    return Plan(name, subnet, 3, Path(f"/var/tmp/headrace-{name}"))


def _sweep(plan: Plan) -> None:
    """Take down the hosts of a test that was killed before it could."""
    owner = plan.folder / "owner"
    if owner.exists() and not Path(f"/proc/{owner.read_text()}").exists():
        Hosts(plan).down()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    plan = _plan(os.environ.get("HEADRACE_TEST_SUBNET", DEFAULT_SUBNET))
    _sweep(plan)
    with hosts(plan) as made:
        (plan.folder / "owner").write_text(str(os.getpid()))
        cluster = Cluster(made, folder)
        up = cluster.ray("up", "--yes", str(cluster.file))
        assert up.returncode == 0, up.stdout
        yield cluster


def test_all_hosts_come_with_their_roles(cluster: Cluster) -> None:
    wait_for(lambda: "headrace_scoring" in cluster.resources(), 120, "all hosts are there")
    found = cluster.resources()
    assert {name: found.get(f"headrace_{name}") for name in ("learner", "rollout", "scoring")} == {
        "learner": 1,
        "rollout": 2,
        "scoring": 1,
    }
    for index in (HEAD, ROLLOUT, MIXED):
        token = cluster.hosts.plan.home(index) / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        commands = cluster.hosts.run(index, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        assert cluster.token.read_text() not in commands
    assert cluster.token.read_text() not in cluster.file.read_text()


def test_the_dashboard_is_on_loopback_and_asks_for_the_token(cluster: Cluster) -> None:
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((cluster.hosts.plan.address(HEAD), 8265), timeout=5)
    script = """
import json, urllib.error, urllib.request
job = json.dumps({"entrypoint": "touch /tmp/entered"}).encode()
request = urllib.request.Request("http://127.0.0.1:8265/api/jobs/", job, {"Content-Type": "application/json"})
try:
    print(urllib.request.urlopen(request, timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
    answer = cluster.hosts.run(HEAD, f"python -c {shlex.quote(script)}").splitlines()[-1]
    assert answer in ("401", "403")


def test_no_port_of_any_host_gives_pages_without_the_token(cluster: Cluster) -> None:
    """Every port that a host listens at is asked from outside, as a port scan would."""
    script = """
import psutil
found = psutil.net_connections("tcp")
print(*sorted({c.laddr.port for c in found if c.status == "LISTEN" and not c.laddr.ip.startswith("127.")}))
"""
    for index in (HEAD, ROLLOUT, MIXED):
        ports = cluster.hosts.run(index, f"python -c {shlex.quote(script)}").splitlines()[-1].split()
        assert len(ports) > 3, "Ray listens at several"
        address = cluster.hosts.plan.address(index)
        assert [port for port in ports if gives_pages(address, int(port))] == []


def test_a_users_mistake_comes_back_with_its_status(cluster: Cluster) -> None:
    stub = str(ROOT / "cluster" / "submit.py")
    done = cluster.ray("submit", str(cluster.file), stub, "--", "train", "jobs/absent.toml")
    assert done.returncode == 1  # all that `ray submit` can say
    assert "headrace: jobs/absent.toml: there is no such file" in done.stdout
    exact = subprocess.run(
        [sys.executable, stub, "--cluster", cluster.file, "--", "train", "jobs/absent two.toml"],
        check=False,
        cwd=ROOT,
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert exact.returncode == 2, exact.stderr
    assert "headrace: jobs/absent two.toml: there is no such file" in exact.stdout


@pytest.mark.parametrize(
    ("program", "look"),
    [("tmux", "tmux capture-pane -p -J"), ("screen", "cat ~/screenlog.0 2>/dev/null || true")],
)
def test_under_tmux_or_screen_it_goes_on_without_the_connection(
    program: str, look: str, cluster: Cluster
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (.ci/hosts.sh installs it)")
    stub = str(ROOT / "cluster" / "submit.py")
    done = cluster.ray("submit", f"--{program}", str(cluster.file), stub, "--", "train", "jobs/absent.toml")
    assert done.returncode == 0, done.stdout  # the connection is over, and the run has its own terminal
    wait_for(
        lambda: "there is no such file" in cluster.hosts.run(HEAD, look),
        60,
        "the run's words are on its terminal",
    )


def test_a_job_of_rays_own_list_runs_and_says_how_it_ended(cluster: Cluster) -> None:
    words = "python ~/headrace/cluster/submit.py train jobs/absent.toml"
    said = cluster.hosts.run(
        HEAD, f"ray job submit --address http://127.0.0.1:8265 -- {words} || echo status=$?", seconds=200
    )
    assert "jobs/absent.toml: there is no such file" in said
    assert "status=1" in said


def trained_by(run: Path) -> set[str]:
    """The rollout actors of whose groups one was trained on; a line that is being written does not count."""
    lines = (run / "rollouts.jsonl").read_text().split("\n")[:-1]
    return {row["actor"] for row in map(json.loads, lines) if "group" in row}


def test_a_run_survives_a_lost_host_and_uses_it_again(cluster: Cluster, tmp_path: Path) -> None:
    process = cluster.submit("train", "jobs/job.toml", "--run-dir", "runs/lost")
    log, run = cluster.folder / "submit.log", cluster.run_folder("lost")

    def steps() -> int:
        path = run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def until(what: Callable[[], bool], seconds: float, said: str) -> None:
        wait_for(what, seconds, said, process, log)

    try:
        until(lambda: steps() >= 4, 300, "three steps")  # the first row is the evaluation before training
        where = {
            name: [cluster.actors(index, name) for index in (HEAD, ROLLOUT, MIXED)]
            for name in ("LearnerWorker", "RolloutWorker", "ScoringWorker")
        }
        assert where == {
            "LearnerWorker": [1, 0, 0],
            "RolloutWorker": [0, 1, 1],
            "ScoringWorker": [0, 0, 1],
        }
        cluster.hosts.stop(ROLLOUT)
        lost_at = steps()
        until(lambda: steps() >= lost_at + 3, 240, "three steps more without the lost host")
        cluster.hosts.start(ROLLOUT)
        cluster.hosts.wait(ROLLOUT)
        events = run / "events.log"
        until(lambda: " joined in the place of rollout-" in events.read_text(), 300, "a successor joined")
        assert cluster.actors(ROLLOUT, "RolloutWorker") == 1  # on the host that came back
        joined_at = steps()
        until(lambda: steps() >= joined_at + 3, 120, "three steps more with the host that came back")
        joined = re.search(r"(\S+) joined in the place of rollout-", events.read_text())
        assert joined is not None
        until(lambda: joined[1] in trained_by(run), 120, f"training on a group of {joined[1]}")
        cluster.hosts.run(HEAD, "pkill -INT -f 'cluster.cli train'")
        assert process.wait(120) == 1, log.read_text()[-6000:]  # a run that was stopped is not complete
    finally:
        process.kill()
        process.wait()
    assert "step" in log.read_text()  # progress came back while it ran

    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["groups_trained"] == summary["steps"] * BATCH // GROUP
    assert summary["groups_dropped"] == 0  # no sample was lost with the host
    assert (summary["actors_lost"], summary["actors_joined"]) == (1, 1)
    assert summary["lag_max"] <= summary["lag_bound"]
    assert summary["sync_probe_max_abs_diff"] < 1e-3
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    trained = [row["group"] for row in rows if "group" in row]
    assert len(set(trained)) == len(trained) == summary["groups_trained"]

    there = f"~/headrace/runs/lost/checkpoints/step_{summary['steps']:06d}/policy/"
    fetched = tmp_path / "policy"
    fetched.mkdir()
    done = cluster.ray("rsync-down", str(cluster.file), there, f"{fetched}/")
    assert done.returncode == 0, done.stdout
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(fetched)
    assert model.get_input_embeddings().num_embeddings == len(AutoTokenizer.from_pretrained(fetched))


def test_down_leaves_no_ray_behind(cluster: Cluster) -> None:
    done = cluster.ray("down", "--yes", str(cluster.file))
    assert done.returncode == 0, done.stdout
    # The workers' processes end when they have missed the head for a while.
    for index in (HEAD, ROLLOUT, MIXED):
        wait_for(
            lambda index=index: cluster.hosts.run(index, "pgrep -c raylet || true").split()[-1] == "0",
            150,
            f"Ray has ended on host {index}",
        )
