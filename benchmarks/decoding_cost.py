"""What decoding strategies cost beside plain sampling. Writes decoding_cost.json.

    python benchmarks/decoding_cost.py [--rounds 5] [--prompts 64]

One rollout actor with vLLM, without Ray, on one thread. The policy is a Llama of 4 layers and width 128 from
random weights; the reward model is as large, and reads its tokens. A round samples each prompt once, all at
the same time, and `seconds_per_token` is its wall clock divided by the tokens sampled. The critic is a value
head on the policy's own backbone. Best-of-n counts the candidates' scores too. Medians over rounds.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import StolenTime, describe

from actors.decoding.settings import Guidance, GuideSpec
from actors.decoding.worker import GuidedWorker
from actors.engine import end_tokens
from actors.records import Prompt, SampledGroup, SampleRequest
from actors.rollout import RolloutWorker
from actors.settings import RolloutSettings, SyncSettings
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings
from rewards.models.card import RewardCard, write_card
from rewards.models.loading import load_reward_model
from rewards.models.text import TextFormat
from rewards.settings import RewardSettings

HERE = Path(__file__).resolve().parent
ALPHABET = "abcdefghijklmnopqrstuvwxyz="
LENGTH, NEW_TOKENS, N, TOP_K = 128, 64, 16, 8


def build(folder: Path) -> tuple[Path, Path]:
    """A policy that seldom ends by itself, with a value head beside it, and a reward model."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    settings = ScratchSettings(hidden_size=128, layers=4, heads=4, max_length=LENGTH)
    policy = build_scratch_model(settings, ALPHABET, folder / "policy", seed=0)
    weights = load_file(policy / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    config = AutoConfig.from_pretrained(policy)
    config.num_labels = 1
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    card = RewardCard(
        kind="transformer",
        loss="bradley-terry",
        rule="mean",
        members=1,
        mean=[0.0],
        std=[1.0],
        length_slope=[0.0],
        text=TextFormat(max_length=LENGTH),
        labels=0,
    )
    write_card(folder / "rm", card, [])
    width = weights["model.norm.weight"].shape[0]
    save_file({"weight": torch.randn(1, width), "bias": torch.zeros(1)}, folder / "value_head.safetensors")
    return policy, folder / "rm"


def guide_of(kind: str, folder: Path, policy: Path) -> GuideSpec:
    """By the reward model's tokens, by a function of the text, or by the critic."""
    ends = sorted(end_tokens(str(policy)))
    rewards = {
        "reward_tokens": [RewardSettings(kind="model", path="rm")],
        "reward_text": [RewardSettings(kind="function", function="mine.py:score")],
        "value": [],
    }
    (folder / "mine.py").write_text("def score(prompt, completion, row):\n    return len(set(completion))\n")
    return GuideSpec(
        kind=kind,  # type: ignore[arg-type]
        ends=ends,
        end_token=ends[0],
        rewards=rewards[kind],
        directory=str(folder),
        backbone=str(policy),
        head=str(folder / "value_head.safetensors"),
    )


async def rounds(
    actor: RolloutWorker, prompts: list[Prompt], samples: int, count: int
) -> tuple[list[Any], Any]:
    """(seconds, tokens) of each round after one that is not counted, and the last round's groups."""
    timed: list[tuple[float, int]] = []
    groups: list[SampledGroup] = []
    for _ in range(count + 1):
        began = time.perf_counter()
        requests = [SampleRequest(i, one, samples, NEW_TOKENS, 1.0) for i, one in enumerate(prompts)]
        groups = list(await asyncio.gather(*(actor.sample(one) for one in requests)))
        tokens = sum(len(one.token_ids) for group in groups for one in group.completions)
        timed.append((time.perf_counter() - began, tokens))
    return timed[1:], groups


def summary(timed: list[tuple[float, int]]) -> dict[str, float]:
    """Medians."""
    return {
        "seconds": statistics.median(seconds for seconds, _ in timed),
        "tokens": statistics.median(tokens for _, tokens in timed),
        "seconds_per_token": statistics.median(seconds / tokens for seconds, tokens in timed),
    }


async def measure(folder: Path, prompts: list[Prompt], count: int) -> dict[str, Any]:
    """Every strategy in an engine of its own, one after another."""
    policy, reward_model = build(folder)
    settings = RolloutSettings(kv_cache_gib=0.25, max_num_seqs=256, threads=1)
    common: dict[str, Any] = {"dtype": "float32", "max_length": LENGTH, "seed": 0, "device": "cpu"}
    found: dict[str, Any] = {}
    plain = RolloutWorker("rollout-0", str(policy), settings, SyncSettings(), **common)
    await plain.start()
    try:
        for name, samples in (("sample", 1), (f"best_of_{N}", N)):
            timed, groups = await rounds(plain, prompts, samples, count)
            found[name] = summary(timed)
    finally:
        await plain.stop()
    model = load_reward_model(reward_model)
    items = [(g.prompt.text, one.text, one.finished) for g in groups for one in g.completions]
    model.score(items)
    began = time.perf_counter()
    model.score(items)
    found[f"best_of_{N}"]["score_seconds"] = time.perf_counter() - began
    for kind in ("reward_tokens", "value", "reward_text"):
        guided = GuidedWorker(
            "rollout-0",
            str(policy),
            settings,
            SyncSettings(),
            **common,
            guide=guide_of(kind, folder, policy),
            guidance=Guidance(top_k=TOP_K, weight=1.0),
        )
        await guided.start()
        try:
            timed, _ = await rounds(guided, prompts, 1, count)
        finally:
            await guided.stop()
        found[kind] = summary(timed)
    return found


def main() -> None:
    """Measure, add the ratios, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE / "decoding_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    stolen = StolenTime(began)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(4, 30, (options.prompts, 12), generator=generator).tolist()
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(ALPHABET)]
    prompts = [
        Prompt(f"line {i}", (1, *ids), "".join(names[one] for one in ids)) for i, ids in enumerate(letters)
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), prompts, options.rounds))
    plain = found["sample"]
    best = found[f"best_of_{N}"]
    ratios = {
        f"{kind}_per_token": found[kind]["seconds_per_token"] / plain["seconds_per_token"]
        for kind in ("reward_tokens", "value", "reward_text")
    }
    ratios[f"best_of_{N}_wall"] = (best["seconds"] + best["score_seconds"]) / plain["seconds"]
    result = {
        "machine": describe(),
        "stolen": stolen.share(time.monotonic()),
        "prompts": options.prompts,
        "rounds": options.rounds,
        "top_k": TOP_K,
        "new_tokens": NEW_TOKENS,
        "measured": found,
        "ratios": ratios,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
