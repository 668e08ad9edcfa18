"""Two ranks and one, at every ZeRO stage, give the same losses and the same weights."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from learner_ranks import run_ranks
from tiny_learner import make_groups, make_job, save_model, take_steps, weights_of

from learner.engine import interface_of
from learner.worker import LearnerJob, LearnerWorker

pytestmark = pytest.mark.integration

PPO = {"epochs": 2, "minibatches": 3, "entropy_coef": 0.01}
CASES = [
    (f"ZeRO {stage}, {kind}, {value_model}", {"zero_stage": stage}, kind, value_model)
    for stage, kind, value_model in [
        (0, "llama", "head"),
        (1, "llama", "head"),
        (2, "llama", "critic"),
        (3, "llama", "head"),
        (3, "qwen2", "critic"),
    ]
]
COMPARED = (
    "loss/policy",
    "loss/value",
    "policy/entropy",
    "optimizer/grad_norm",
    "kl/token",
    "advantage/std",
    "return/mean",
    "mismatch/ess",
    "value/explained_variance",
)


def train(rank: int, world_size: int, jobs: list[LearnerJob], batches: list[Any]) -> Any:
    """Each job in turn, in one process group: (last metrics, weights, probe) of each."""
    results = []
    for job in jobs:
        worker = LearnerWorker(rank, world_size, job)
        worker.start("", 0)  # the group is there already
        demonstrations = [((1, 2), (3, 4, 5)), ((6,), (7, 8)), ((9,), (1, 1, 1))]
        warmup = worker.warmup_updates([demonstrations, demonstrations[:1]])
        worker.finish_warmup()
        rows = take_steps(worker, batches)
        results.append((rows[-1] | warmup[-1], weights_of(worker), worker.probe([[1, 2, 3]])))
        worker.stop()
    return results


def open_ports(rank: int, world_size: int) -> tuple[str, set[str]]:
    """The interface that gloo was told to use, and the addresses at which this rank listens."""
    connections = psutil.Process().net_connections("tcp")
    listening = {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    return os.environ["GLOO_SOCKET_IFNAME"], listening


def test_ranks_of_one_machine_listen_on_loopback_alone() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
    for interface, listening in run_ranks(open_ports, 2):
        assert interface == "lo"
        assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_shards_change_neither_losses_nor_weights(tmp_path: Path) -> None:
    """Two steps of PPO with 6 updates each, after two supervised ones; the second supervised batch and some
    minibatches leave a rank without samples, which then runs dummies.
    """
    folders = {kind: save_model(tmp_path / kind, kind) for kind in ("llama", "qwen2")}
    batches = [
        make_groups(folders["llama"], groups=3, size=2, seed=seed, version=seed, reference_shift=-0.1)
        for seed in range(2)
    ]
    jobs = [
        make_job(
            folders[kind],
            learner=learner | {"micro_batch_tokens": 16},
            ppo=PPO | {"value_model": value_model},
            warmup={"steps": 2, "lr": 1e-3},
        )
        for _, learner, kind, value_model in CASES
    ]
    (alone,) = run_ranks(train, 1, jobs, batches, timeout_s=200)
    together = run_ranks(train, 2, jobs, batches, timeout_s=200)
    assert len(alone) == len(CASES)
    first_llama = alone[0]
    for (name, _, _, _), one, rank_0, rank_1 in zip(CASES, alone, *together, strict=True):
        for key in (*COMPARED, "warmup/loss"):
            assert one[0][key] == pytest.approx(rank_0[0][key], rel=2e-3, abs=2e-5), f"{name}: {key}"
            assert rank_0[0][key] == pytest.approx(rank_1[0][key], rel=1e-9), f"{name}: {key}"
        for parameter, weight in one[1].items():
            np.testing.assert_allclose(
                weight, rank_0[1][parameter], atol=5e-5, err_msg=f"{name}: {parameter}"
            )
        assert one[2][0] == pytest.approx(rank_0[2][0], abs=1e-4)
    # The stages agree with each other as well, where nothing but the stage differs.
    for other in (1, 3):
        for parameter, weight in first_llama[1].items():
            np.testing.assert_allclose(weight, alone[other][1][parameter], atol=5e-5, err_msg=parameter)
