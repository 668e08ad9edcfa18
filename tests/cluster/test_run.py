"""Whole runs on all the real parts, as a user starts them: by the command line, in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SMALL = """
[run]
name = "small"
steps = 4
batch_size = 32
evaluate_prompts = 24
checkpoint_every = 2

[model.scratch]
hidden_size = 64
layers = 2
heads = 2
max_length = 32

[task]
kind = "reversal"
length = 4
train_size = 256
heldout_size = 24
demonstrations = 256

[warmup]
steps = 5
batch_size = 32

[[reward]]
kind = "task"
name = "gold"

[rollout]
group_size = 4
max_new_tokens = 8

[optimizer]
lr = 1e-3

[monitor]
wandb = "disabled"
"""
SUMMARY_KEYS = (
    *("status", "objective", "steps", "wall_s", "reward_initial", "reward_final", "kl_final"),
    *("tokens_generated", "tokens_trained", "groups_dispatched", "groups_trained", "groups_dropped"),
    *("lag_bound", "lag_max", "lag_mean", "trainer_wait_fraction", "rollout_wait_fraction"),
    *("sync_s_mean", "sync_probe_max_abs_diff", "padding_fraction", "versions"),
)


class Run:
    """A `headrace train` process and its run folder."""

    def __init__(self, folder: Path, config: str, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "job.toml").write_text(config)
        self.run_dir = folder / "run"
        command = [sys.executable, "-m", "cluster.cli", "train", str(folder / "job.toml")]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [*command, "--run-dir", str(self.run_dir), *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.family: set[psutil.Process] = set()

    def finish(self, seconds: float = 300) -> str:
        """Wait for the end, give what was printed; fails if any process is left behind."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        _, alive = psutil.wait_procs(self.family, timeout=20)
        assert not alive, f"left behind: {alive}"
        return output

    def wait_for(self, what: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "did not happen in time"
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
            time.sleep(0.2)

    def listening(self) -> set[str]:
        """Addresses at which processes of the run accept connections, from this host or from others."""
        processes = {self.process.pid} | {
            child.pid for child in psutil.Process(self.process.pid).children(recursive=True)
        }
        found = {
            connection.laddr.ip
            for connection in psutil.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and connection.pid in processes
        }
        assert found, "a Ray that listens nowhere is none"
        return found

    def child(self, name: str) -> psutil.Process:
        """The living process of the run that has this name in its command line."""
        found: list[psutil.Process] = []

        def look() -> bool:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it may end while it is asked
                    if name in " ".join(process.cmdline()):
                        found.append(process)
            return bool(found)

        self.wait_for(look, 30)
        return found[0]

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        path = self.run_dir / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def steps(self) -> list[int]:
        return [row["learner_step"] for row in self.rows()]

    def json(self, name: str) -> Any:
        return json.loads((self.run_dir / name).read_text())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(config: str, *arguments: str) -> Run:
        runs.append(Run(tmp_path / "job", config, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()


def test_a_run_with_a_slow_learner_keeps_its_bound_and_leaves_what_it_promises(
    start: Callable[..., Run],
) -> None:
    # Three passes in two minibatches make the learner slower than rollout, so the queue fills to the window.
    slow = ("--set", "ppo.epochs=3", "--set", "ppo.minibatches=2", "--set", "run.evaluate_every=2")
    judged = ("--set", "run.evaluate_samples=2", "--set", "run.pass_threshold=1")
    run = start(SMALL, "--set", "scheduler.window=2", "--set", "monitor.wandb=offline", *slow, *judged)
    output = run.finish()
    assert run.process.returncode == 0, output
    summary = run.json("summary.json")
    assert summary.keys() >= set(SUMMARY_KEYS)
    assert summary["status"] == "completed"
    assert (summary["steps"], summary["lag_bound"]) == (4, 2)
    assert 1 <= summary["lag_max"] <= 2
    assert summary["groups_trained"] == summary["groups_dispatched"] == 4 * 32 // 4
    assert summary["sync_probe_max_abs_diff"] < 1e-3
    assert summary["padding_fraction"] < 0.05
    trained = [row for row in run.rows() if "lag/max" in row]
    assert [row["learner_step"] for row in trained] == [1, 2, 3, 4]
    for row in trained:
        assert row["lag/max"] <= 2
        assert row["ppo/first_ratio_deviation"] < 1e-4
        assert row["monitor/unknown_metrics"] == 0
        assert row["lag/in_flight_mean"] + row["lag/in_queue_mean"] == pytest.approx(row["lag/mean"])
        assert sum(row.get(f"mismatch/tokens_by_lag/{lag}", 0) for lag in range(3)) > 0
    assert trained[0]["mismatch/kl_by_lag/0"] < 1e-6  # both engines still had the very same weights
    measured = [row for row in run.rows() if row.get("heldout/reward") is not None]
    assert [row["learner_step"] for row in measured] == [0, 2, 4]  # that of step 2 after later steps, maybe
    for row in measured:
        assert 0 <= row["heldout/pass_at/1"] <= row["heldout/pass_at/2"] <= 1
        assert row["monitor/unknown_metrics"] == 0
    assert summary["pass_at"]["final"]["2"] == measured[-1]["heldout/pass_at/2"]
    assert json.loads((run.run_dir / "evaluations" / "step_000002.json").read_text())["version"] == 2
    assert {path.name for path in (run.run_dir / "checkpoints").glob("step_*")} >= {"step_000004"}
    best = run.json("checkpoints/best.json")
    assert (run.run_dir / "checkpoints" / best["folder"] / "policy").is_dir()
    times = run.rows("rollouts.jsonl")
    assert sorted(row["group"] for row in times if "group" in row) == list(range(4 * 32 // 4))
    assert [row["learner_step"] for row in times if "group" not in row] == [1, 2, 3, 4]
    report = (run.run_dir / "report.html").read_text()
    assert report.count("data:image/") >= 6
    assert list((run.run_dir / "wandb").glob("offline-run-*"))
    assert run.run_dir.stat().st_mode & 0o777 == 0o700

    from transformers import AutoModelForCausalLM, AutoTokenizer

    newest = run.run_dir / "checkpoints" / run.json("checkpoints/latest.json")["folder"]
    assert newest.name == "step_000004"
    model = AutoModelForCausalLM.from_pretrained(newest / "policy")
    tokenizer = AutoTokenizer.from_pretrained(newest / "policy")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_lost_actors_have_successors_and_an_interrupted_run_goes_on_where_it_was(
    start: Callable[..., Run],
) -> None:
    # A wide window keeps groups under way at any moment at which the interrupt may come.
    wide = ("--set", "run.checkpoint_every=0", "--set", "scheduler.window=3")
    run = start(SMALL, "--set", "run.steps=5000", *wide)
    run.wait_for(lambda: len(run.rows()) >= 3)
    assert {address.split("%")[0] for address in run.listening()} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    lose_actors(run)
    run.process.send_signal(signal.SIGINT)
    output = run.finish()
    assert run.process.returncode == 1, output
    summary = run.json("summary.json")
    assert summary["status"] == "interrupted", output
    assert (summary["actors_lost"], summary["actors_joined"]) == (3, 2)
    trained = [row["group"] for row in run.rows("rollouts.jsonl") if "group" in row]
    assert len(trained) == len(set(trained)) == summary["groups_trained"]
    assert summary["lag_max"] <= summary["lag_bound"]
    done = summary["steps"]
    state = run.json(f"checkpoints/step_{done:06d}/state.json")
    first_reward = run.rows()[0]["heldout/reward"]

    # So many steps train whatever was under way: the window's groups and those of the step itself.
    end = done + 4
    resumed = start(SMALL, "--set", f"run.steps={end}", *wide, "--resume")
    output = resumed.finish()
    assert resumed.process.returncode == 0, output
    summary = resumed.json("summary.json")
    assert (summary["status"], summary["steps"]) == ("completed", end)
    assert summary["reward_initial"] == pytest.approx(first_reward)  # of the first start, not measured anew
    assert resumed.steps == list(range(end + 1))
    moments = [row["train_to_s"] for row in resumed.rows("rollouts.jsonl") if "group" not in row]
    assert moments == sorted(moments)  # one clock over both starts
    assert len(moments) == end
    assert "mismatch/engine" in resumed.rows()[done + 1]  # what the first start measured is remembered
    # Each prompt handed out is trained once, lost actors or not: those under way at the interrupt came first,
    # none is left over.
    final = resumed.json(f"checkpoints/step_{end:06d}/state.json")
    assert state["pending"]
    assert final["pending"] == []
    handed_out = final["cursor"]["epoch"] * final["cursor"]["size"] + final["cursor"]["position"]
    assert handed_out == end * 32 // 4


def lose_actors(run: Run) -> None:
    """Kill an actor of each kind but the learner; each time others come, and training goes on."""
    successions = {  # an engine core is not missed before the successor of its predecessor has one
        "RolloutWorker": "rollout-0.2 joined in the place of rollout-0",
        "EngineCore": "rollout-0.3 joined in the place of rollout-0.2",
        "ScoringWorker": "scoring-0.2 scores in the place of scoring-0",
    }
    for lost, (victim, succession) in enumerate(successions.items(), start=1):
        run.child(victim).kill()
        run.wait_for(lambda said=succession: said in (run.run_dir / "events.log").read_text())
        run.wait_for(lambda lost=lost: run.rows()[-1].get("actors/lost") == lost)
        steps = len(run.rows())
        run.wait_for(lambda steps=steps: len(run.rows()) >= steps + 3)


OWN_DATA = """
[run]
steps = 3
batch_size = 16
evaluate_prompts = 8
[model.scratch]
hidden_size = 64
layers = 2
heads = 2
max_length = 48
tied_embeddings = true
[data]
train = "rows.jsonl"
heldout_fraction = 0.2
[[reward]]
kind = "exact"
[[reward]]
kind = "function"
function = "grade.py:grade"
name = "mine"
weight = 0.5
[rollout]
actors = 2
group_size = 4
max_new_tokens = 8
[scoring]
missing_eos_penalty = 0.1
reward_timeout_s = 3
[sync]
in_flight = "wait"
[learner]
ranks = 2
zero_stage = 3
cores = 0.5
[ppo]
value_model = "critic"
kl_control = "adaptive"
[monitor]
wandb = "disabled"
"""
GRADE = """
import time
def grade(prompt, completion, row):
    print("noise on standard output")
    if row["id"] % 11 == 3:
        raise KeyError("no grade for this one")
    if row["id"] == 5:
        time.sleep(60)
    if row["id"] == 6:
        return float("nan")
    return {"reward": len(set(completion)) / 8, "letters": len(completion)}
"""


def test_own_rows_and_reward_with_all_that_can_be_wrong_in_them(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": f"say {i}:", "answer": str(i), "id": i}) for i in range(40)]
    rows[10:10] = ["{broken", '{"answer": "no prompt"}', '{"prompt": "", "answer": "1"}']
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "grade.py").write_text(GRADE)
    run = start(OWN_DATA)
    output = run.finish()
    assert run.process.returncode == 0, output
    summary = run.json("summary.json")
    assert sum(summary["rows_quarantined"].values()) == 3
    assert [entry["line"] for entry in run.rows("quarantine.jsonl")] == [11, 12, 13]
    events = (run.run_dir / "events.log").read_text()
    assert summary["groups_trained"] == 3 * 16 // 4
    assert summary["groups_dropped"] == events.count("reward_error")
    assert {"reward/exact", "reward/mine", "reward/mine/letters"} <= run.rows()[-1].keys()
    assert summary["lag_max"] <= 1


def test_a_reward_that_always_fails_stops_the_run_with_its_reason(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "grade.py").write_text(
        "def grade(prompt, completion, row):\n    raise OSError('the judge is out')\n"
    )
    run = start(SMALL, "--set", "reward.0.kind=function", "--set", "reward.0.function=grade.py:grade")
    output = run.finish()
    assert run.process.returncode == 1
    summary = run.json("summary.json")
    assert summary["status"] == "failed"
    for said in ("'gold'", "OSError", "the judge is out"):
        assert said in summary["error"]
        assert said in output


def test_a_killed_learner_ends_the_run_and_is_named(start: Callable[..., Run]) -> None:
    run = start(SMALL, "--set", "run.steps=500", "--set", "run.checkpoint_every=2")
    run.wait_for(lambda: len(run.rows()) >= 4)
    run.child("LearnerWorker").kill()
    output = run.finish()
    assert run.process.returncode == 1
    assert "learner-0" in run.json("summary.json")["error"], output
    assert (run.run_dir / "report.html").exists()
    assert run.json("checkpoints/latest.json")["step"] >= 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "rollout.group_size=5"], ["run.batch_size = 32", "rollout.group_size = 5"]),
        (["--resume"], ["--resume", "holds no run"]),
        (["--set", "reward.0.kind=function", "--set", "reward.0.function=absent.py:f"], ["absent.py"]),
        (["--set", "task.length=30"], ["data.heldout", "over-long"]),
    ],
)
def test_a_users_mistake_exits_with_2_and_one_message(
    start: Callable[..., Run], arguments: list[str], said: list[str]
) -> None:
    run = start(SMALL, *arguments)
    output = run.finish(60)
    assert run.process.returncode == 2, output
    assert "Traceback" not in output
    for part in said:
        assert part in output


def test_a_run_folder_is_not_overwritten(start: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "job" / "run").mkdir(parents=True)
    precious = tmp_path / "job" / "run" / "metrics.jsonl"
    precious.write_text("precious\n")
    run = start(SMALL)
    output = run.finish(60)
    assert run.process.returncode == 2
    assert "not an empty folder" in output
    assert precious.read_text() == "precious\n"
