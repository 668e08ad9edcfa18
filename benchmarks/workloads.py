"""Workloads for the staleness benchmarks, with data, reward and a warmed-up policy made from scratch.

All are reversals (spell a word backwards) by a Llama of 0.8 million parameters:

- tail: four words in five have 6 letters, some 16, one in twenty 48: a synchronous step waits for those;
- verifier: 8 letters, and a reward that takes its time: lognormal, 8 ms a completion, at times a second;
- even: 10 letters, no tail and a quick reward: sampling takes longer than training.
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.tasks.reversal import END_OF_PROMPT, LETTERS

WORKLOADS = ("tail", "verifier", "even")
_TRAIN, _HELDOUT, _DEMONSTRATIONS, _CORRUPTION = 4096, 256, 16384, 0.3


def prefix_reward(_prompt: Any, completion: str, row: Mapping[str, Any]) -> float:
    """Share of letters right before the first wrong one; a letter too many costs as much as one too few."""
    wanted = str(row["answer"])
    right = next((i for i, (a, b) in enumerate(zip(completion, wanted, strict=False)) if a != b), None)
    prefix = min(len(completion), len(wanted)) if right is None else right
    return max(0, prefix - max(0, len(completion) - len(wanted))) / len(wanted)


def slow_prefix_reward(prompt: Any, completion: str, row: Mapping[str, Any]) -> float:
    """`prefix_reward` after a wait that depends on the completion alone: the same in every run."""
    digest = hashlib.sha256(f"{prompt}{completion}".encode()).digest()
    uniform = (int.from_bytes(digest[:6], "big") + 0.5) / 2**48
    normal = math.sqrt(2) * _inverse_erf(2 * uniform - 1)
    time.sleep(min(1.0, 0.004 * math.exp(1.2 * normal)))
    return prefix_reward(prompt, completion, row)


def _inverse_erf(x: float) -> float:
    """To about 0.002, by Winitzki's approximation."""
    a, logarithm = 0.147, math.log(1 - x * x)
    half = 2 / (math.pi * a) + logarithm / 2
    return math.copysign(math.sqrt(math.sqrt(half * half - logarithm / a) - half), x)


def write_data(workload: str, seed: int, folder: Path) -> None:
    """train.jsonl, heldout.jsonl and demonstrations.jsonl of a workload."""
    rng = random.Random(f"{workload} {seed}")
    seen: set[str] = set()

    def word() -> str:
        while True:
            letters = "".join(rng.choices(LETTERS, k=_length(workload, rng)))
            if letters not in seen:
                seen.add(letters)
                return letters

    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("heldout", _HELDOUT), ("train", _TRAIN)):
        words = [word() for _ in range(count)]
        _write(folder / f"{name}.jsonl", [{"prompt": w + END_OF_PROMPT, "answer": w[::-1]} for w in words])
    rows = []
    for _ in range(_DEMONSTRATIONS):
        letters = word()
        answer = letters[::-1]
        if rng.random() < _CORRUPTION:
            answer = "".join(rng.choice(LETTERS) if rng.random() < 0.5 else letter for letter in answer)
        rows.append({"prompt": letters + END_OF_PROMPT, "completion": answer})
    _write(folder / "demonstrations.jsonl", rows)


def _length(workload: str, rng: random.Random) -> int:
    if workload == "tail":
        return rng.choices((6, 16, 48), (0.8, 0.15, 0.05))[0]
    return {"verifier": 8, "even": 10}[workload]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(workload: str, data: Path, model: str) -> str:
    """The job: everything but seed, steps, threads and what a benchmark varies."""
    longest = {"tail": 52, "verifier": 12, "even": 14}[workload]
    function = "slow_prefix_reward" if workload == "verifier" else "prefix_reward"
    source = f'path = "{model}"' if model else "[model.scratch]\nhidden_size = 128\nmax_length = 112"
    return f"""
[run]
batch_size = 128
evaluate_prompts = {_HELDOUT}
evaluate_samples = 3
checkpoint_every = 0
[model]
{source}
[data]
train = "{data}/train.jsonl"
heldout = "{data}/heldout.jsonl"
[[reward]]
kind = "function"
name = "gold"
function = "{Path(__file__).resolve()}:{function}"
[rollout]
group_size = 8
max_new_tokens = {longest}
cores = 0.5
[correction]
ratio = "behaviour"
weights = "none"
[scoring]
missing_eos_penalty = 0.2
[optimizer]
lr = 1e-4
critic_lr = 5e-4
warmup_updates = 5
[ppo]
minibatches = 2
epochs = 1
value_coef = 0.5
kl_coef = 0.02
[monitor]
console = "plain"
wandb = "disabled"
samples_every = 0
"""


WARM_UP = """
[learner]
threads = 2
[warmup]
steps = 220
batch_size = 128
lr = 2.5e-3
data = "{data}/demonstrations.jsonl"
"""
