"""`headrace plan`: calibration on a run whose truth is known, predictions for other settings, the command."""

import json
import struct
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.calibrate import Calibration, calibrate, measure, overlap, simulate_as, within_group
from cluster.cli import main
from cluster.config import JobConfig
from cluster.config_file import dump_config, parse_config
from cluster.plan import Option, Request, choose, describe_sizes, make_plan
from cluster.plan_memory import derive_sizes, estimate, model_size
from cluster.plan_model import Workload, dump_workload, load_workload
from cluster.sim_results import SimResult, Steady, plant_of
from cluster.simulate import Simulation

JOB = """
[run]
batch_size = 64
steps = 40
[model.scratch]
max_length = 4096
[task]
kind = "reversal"
[[reward]]
kind = "task"
[rollout]
actors = 1
group_size = 4
max_new_tokens = 2000
[scheduler]
window = 2
[learner]
threads = 2
"""

TRUTH = (
    Workload.model_validate({})
    .changed("lengths", kind="lognormal", median=60.0, sigma=0.7, within_group=0.3)
    .changed("generation", token_s=[[1.0, 0.004], [256.0, 0.03]], prompt_tokens=12.0)
    .changed("scoring", call_s=0.01, group_s=0.004)
    .changed("learner", step_s=0.3, token_s=2e-4, variation=0.05)
    .changed("sync", publish_s=0.08, load_s=0.1, probe_s=0.06)
    .changed("sharing", cores=2.0, learner=2.0, actor=1.0, scoring=0.25)
)


def job(*overrides: str) -> JobConfig:
    return parse_config(JOB, overrides)


def write_run(folder: Path, config: JobConfig, truth: Workload = TRUTH, seed: int = 5) -> SimResult:
    """A run folder as the controller writes it, of a simulated run."""
    simulation = Simulation(
        plant_of(config), truth, steps=config.run.steps, seed=seed, spans_of_steps=config.run.steps
    )
    rows: list[dict[str, Any]] = []
    note = simulation._notes.step

    def traced(step: int, taken: Any, *rest: Any) -> Any:
        for flight, _ in taken:
            rows.append(
                {
                    "learner_step": step + 1,
                    "group": flight.group_id,
                    "actor": flight.actor,
                    "attempts": 1,
                    "dispatched_s": flight.dispatched,
                    "sampled_s": flight.sampled,
                    "scored_s": flight.scored,
                    "prompt_tokens": 12,
                    "lengths": list(flight.lengths),
                }
            )
        return note(step, taken, *rest)

    simulation._notes.step = traced  # type: ignore[method-assign]
    result = simulation.run()
    publishing = [span for span in result.spans if span.kind == "publishing"]
    for record in result.records:
        row = {"learner_step": record.step + 1, "train_from_s": record.started, "train_to_s": record.ended}
        sent = [span for span in publishing if span.start >= record.ended - 1e-9]
        if sent and record.publish_s:
            row |= {"publish_from_s": sent[0].start, "publish_to_s": sent[0].end}
            if record.sync_s:
                row["loaded_s"] = sent[0].end + record.sync_s
        rows.append(row)
    folder.mkdir()
    (folder / "config.toml").write_text(dump_config(config))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [
        {"learner_step": r.step + 1, "lag/mean": r.lag_mean, "timing_s/sync_load": 0.1}
        for r in result.records
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return result


# ---- calibration -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "run"
    write_run(folder, job())
    return folder


@pytest.fixture(scope="module")
def calibrated(run_dir: Path) -> Calibration:
    return calibrate(run_dir, cores=2.0)


def test_the_run_itself_is_given_back_within_a_tenth(calibrated: Calibration) -> None:
    found = calibrated
    assert found.simulated.step_s == pytest.approx(found.measured.step_s, rel=0.1)
    assert found.simulated.lag_mean == pytest.approx(found.measured.lag_mean, rel=0.1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["scheduler.window=0"],
        ["scheduler.window=1"],
        ["scheduler.window=6"],
        ["rollout.actors=2"],
        ["run.batch_size=128"],
        ["run.batch_size=32", "scheduler.window=4"],
        ["rollout.max_groups_in_flight=4", "scheduler.window=3"],
    ],
)
def test_other_settings_are_foretold_within_a_fifth(
    calibrated: Calibration, tmp_path: Path, overrides: list[str]
) -> None:
    workload = calibrated.workload
    config = job(*overrides)
    write_run(tmp_path / "other", config, seed=9)
    truth = measure(tmp_path / "other")
    foretold = simulate_as(workload, plant_of(config), config.run.steps)
    assert foretold.step_s == pytest.approx(truth.step_s, rel=0.2)
    assert foretold.lag_mean == pytest.approx(truth.lag_mean, rel=0.2, abs=0.05)


def test_calibration_finds_lengths_and_their_correlation(calibrated: Calibration) -> None:
    lengths = calibrated.workload.lengths
    assert float(lengths.at(np.array([0.5]))[0]) == pytest.approx(60, rel=0.1)
    # log-normal: the 90 % quantile is 60 · e^(0.7 · 1.2816) = 147
    assert float(lengths.at(np.array([0.9]))[0]) == pytest.approx(147, rel=0.12)
    assert lengths.within_group == pytest.approx(0.3, abs=0.08)


def test_overlap_is_the_covered_share() -> None:
    spans, others = np.array([[0.0, 2.0], [5.0, 6.0]]), np.array([[1.0, 1.5], [1.75, 5.5]])
    # Of 0…2: .5 + .25 = .75 of 2; of 5…6: .5 of 1.
    assert overlap(spans, others).tolist() == pytest.approx([0.375, 0.5])


def test_identical_samples_of_a_prompt_are_fully_correlated_and_equal_lengths_not_at_all() -> None:
    assert within_group([[5, 5], [9, 9], [1, 1], [7, 7]]) == pytest.approx(0.95)  # the largest that is used
    assert within_group([[4, 4], [4, 4], [4, 4]]) == 0


def test_a_run_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no rollouts.jsonl; give the folder of a run"):
        calibrate(tmp_path)


def test_a_run_of_a_few_steps_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "short", job("run.steps=5"))
    with pytest.raises(ValueError, match="has 5 learner steps, fewer than the 8"):
        calibrate(tmp_path / "short")


# ---- choosing --------------------------------------------------------------------------------------------


def option(actors: int, window: Any, step_s: float, lag: float = 0.0, *, allowed: bool = True) -> Option:
    names = Steady.__dataclass_fields__
    values: dict[str, Any] = dict.fromkeys(names, 0.0) | {"lag_shares": {}, "waits": {}}
    return Option(actors, window, 1, Steady(**values | {"step_s": step_s, "lag_mean": lag}), None, allowed)


def test_the_cheapest_option_near_the_fastest_is_chosen() -> None:
    slow, near, fresh, fast = (
        option(1, 4, 3.0),
        option(2, 2, 1.04, 2.0),
        option(2, 1, 1.05, 1.0),
        option(4, 4, 1.0),
    )
    assert choose([slow, near, fresh, fast]) is fresh


def test_a_window_with_too_much_drift_is_not_chosen() -> None:
    fast, safe = option(1, 8, 1.0, allowed=False), option(1, 2, 2.0)
    assert choose([fast, safe]) is safe


def test_a_plan_leaves_out_windows_that_drift_too_far_and_says_so() -> None:
    # D(S) = .001 + .01 · S ≤ .02 up to S = 1
    drifting = TRUTH.changed("drift", engine=0.001, per_version=0.01)
    plan = make_plan(
        Request(job("scheduler.max_drift=0.02"), drifting, actors=(1, 2), windows=(0, 1, 4), steps=24)
    )
    assert plan.chosen.window in {0, 1}
    assert [o.allowed for o in plan.options] == [True, True, False] * 2
    assert "S = 4 and above drift too far" in plan.reason


# ---- memory ----------------------------------------------------------------------------------------------


def test_memory_follows_the_stated_formula() -> None:
    gib = 1024**3
    workload = TRUTH.changed("size", parameters=1e9, kv_values_per_token=1000.0)
    config = job(
        "learner.precision=bfloat16", "learner.ranks=2", "learner.zero_stage=2", "rollout.kv_cache_gib=4.0"
    )
    found = estimate(config, workload, actors=3, window=2)
    assert found is not None
    # bfloat16: weights 2e9; of gradients 2e9 and Adam's 12e9 each rank has half.
    assert found.learner == pytest.approx(2 * (2e9 + 1e9 + 6e9) / gib)
    # 256 sequences · (12 + 2000) tokens · 1000 values · 2 bytes = 1.03e9 bytes, below 4 GiB.
    assert found.rollout == pytest.approx(3 * (2e9 + 256 * 2012 * 2000) / gib)
    assert (found.scoring, found.shared) == (pytest.approx(2e9 / gib), pytest.approx(2e9 / gib))
    # (S + 2) · P = 64 groups of 4 · (12 + 60) tokens of 32 bytes.
    assert found.object_store == pytest.approx(64 * 288 * 32 / gib)
    assert estimate(config, TRUTH, actors=3, window=2) is None


def test_a_critic_and_a_discriminator_each_take_what_the_policy_takes() -> None:
    workload = TRUTH.changed("size", parameters=1e9)
    discriminator = JOB.replace('kind = "task"\n[rollout]', 'kind = "discriminator"\n[rollout]')
    plain, both = (
        estimate(parse_config(text, settings), workload, actors=1, window=0)
        for text, settings in ((JOB, []), (discriminator, ['ppo.value_model="critic"']))
    )
    assert plain is not None
    assert both is not None
    assert both.learner == pytest.approx(3 * plain.learner)
    assert (both.scoring, both.shared) == (2 * plain.scoring, 2 * plain.shared)
    assert both.rollout == plain.rollout


def test_sizes_are_told_by_part() -> None:
    gib = 1024**3
    workload = TRUTH.changed("size", parameters=1e9, kv_values_per_token=1000.0)
    config = job("learner.ranks=2", "learner.zero_stage=1", "rollout.kv_cache_gib=1.0")
    sizes = derive_sizes(config, workload, window=2)
    assert sizes is not None
    # float32: weights and gradients 4e9 on each rank, of Adam's 8e9 half; the cache is held to its limit.
    assert sizes.weights == pytest.approx(4e9 / gib)
    assert (sizes.rank_weights, sizes.rank_gradients) == (pytest.approx(4e9 / gib), pytest.approx(4e9 / gib))
    assert sizes.rank_optimizer == pytest.approx(4e9 / gib)
    assert sizes.kv_cache == 1.0
    assert "1e+09 parameters, a copy of the weights 3.73 GiB" in describe_sizes(sizes)
    assert "size.parameters" in describe_sizes(derive_sizes(config, TRUTH, window=2))


def test_the_size_of_a_model_is_read_from_its_folder(tmp_path: Path) -> None:
    head = json.dumps(
        {"a": {"shape": [3, 4]}, "b": {"shape": [5]}, "__metadata__": {"format": "pt"}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(68))
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    # 12 + 5 numbers; 2 · 3 layers · 2 heads · 64 / 8
    assert model_size(tmp_path) == {"parameters": 17.0, "kv_values_per_token": 96.0}
    assert model_size(tmp_path / "none") == {}


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "model.toml").write_text(dump_workload(TRUTH))
    return str(tmp_path / "job.toml"), str(tmp_path / "model.toml")


def test_a_workload_survives_its_file(files: tuple[str, str]) -> None:
    assert load_workload(Path(files[1])) == TRUTH


def test_the_command_prints_a_table_and_writes_its_files(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["plan", files[0], "--model", files[1], "--actors", "2,1", "--windows", "0,2,adaptive"]
    assert main([*command, "--steps", "20", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "recommended:" in printed
    assert "--set rollout.actors=" in printed
    plan = json.loads((out / "plan.json").read_text())
    tried = [(o["actors"], o["window"]) for o in plan["options"]][:6]
    assert tried == [(1, 0), (1, 2), (1, "adaptive"), (2, 0), (2, 2), (2, "adaptive")]
    assert plan["recommended"]["step_s"] <= min(o["step_s"] for o in plan["options"]) * 1.08
    assert all(o["lag_max"] <= o["window"] for o in plan["options"] if o["window"] != "adaptive")
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert tomllib.loads((out / "workload.toml").read_text())["learner"]["step_s"] == 0.3


def test_a_plan_from_a_run_says_how_well_it_was_calibrated(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "job.toml"
    other.write_text(JOB)
    command = [
        "plan",
        str(other),
        "--run-dir",
        str(run_dir),
        "--actors",
        "1",
        "--windows",
        "1",
        "--steps",
        "20",
    ]
    assert main([*command, "--set", "learner.threads=1", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "calibration: step" in printed
    assert "note: learner.threads differs from the calibration run" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of --run-dir"),
        (["--run-dir", "/nowhere"], "--run-dir /nowhere: there is no such folder"),
        (["--model", "MODEL", "--actors", "0"], "--actors '0': must be whole numbers from 1"),
        (["--model", "MODEL", "--actors", "2,x"], "--actors '2,x': must be whole numbers"),
        (["--model", "MODEL", "--windows", "-1"], "--windows '-1': must be whole numbers from 0"),
        (["--model", "MODEL", "--steps", "2"], "--steps 2: must be at least 4"),
        (["--model", "MODEL", "--cores", "-1"], "--cores -1: must be at least 0"),
        (
            ["--model", "MODEL", "--set-model", "learner.stepp_s=1"],
            "learner.stepp_s = 1: there is no such setting",
        ),
        (
            ["--model", "MODEL", "--set-model", "learner.step_s=-1.0"],
            "learner.step_s = -1.0: Input should be",
        ),
        (
            ["--model", "MODEL", "--set-model", "generation.speeds=[0.0]"],
            "generation.speeds = [0.0]: must be above 0",
        ),
        (["--model", "/nowhere.toml"], "--model /nowhere.toml: there is no such file"),
    ],
)
def test_a_users_mistake_is_named_and_exits_2(
    files: tuple[str, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [files[1] if word == "MODEL" else word for word in arguments]
    assert main(["plan", files[0], *given]) == 2
    assert message in capsys.readouterr().err
