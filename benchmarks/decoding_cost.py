"""What decoding strategies cost beside plain sampling. Writes decoding_cost.json.

    python benchmarks/decoding_cost.py [--rounds 5]

One rollout actor with vLLM, without Ray, on one thread. The policy is a Llama of 4 layers and width 128 from
random weights that never ends a response, so all strategies sample as many tokens, in batches as large: a
strategy that writes longer or shorter would otherwise change what a token costs. The reward model is as
large, and reads its tokens. A round samples each prompt of a batch once, all at the same time, and
`seconds_per_token` is its wall clock divided by the tokens sampled. The critic is a value head on the
policy's own backbone. Best-of-n is set against one sample of each prompt, and with all scores against one
sample and its score. Medians over rounds.
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
from actors.end_tokens import end_tokens
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
BATCHES = (4, 16, 64)
MAX_BATCH = max(BATCHES)
KINDS = ("reward_tokens", "value", "reward_text")


def build(folder: Path) -> tuple[Path, Path]:
    """A policy that never ends by itself, with a value head beside it, and a reward model."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    settings = ScratchSettings(hidden_size=128, layers=4, heads=4, max_length=LENGTH)
    policy = build_scratch_model(settings, ALPHABET, folder / "policy", seed=0)
    weights = load_file(policy / "model.safetensors")
    never_end(weights, sorted(end_tokens(str(policy))))
    save_file(weights, policy / "model.safetensors", {"format": "pt"})
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


def never_end(weights: dict[str, torch.Tensor], ends: list[int]) -> None:
    """Hidden channel 0 is large at every token and counts against the end tokens alone. In place."""
    weights["model.embed_tokens.weight"][:, 0] = 20.0
    head = weights["lm_head.weight"]
    head[:, 0] = 0.0
    head[ends] = 0.0
    head[ends, 0] = -10.0


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


async def measure(folder: Path, batches: dict[int, list[Prompt]], count: int) -> dict[int, dict[str, Any]]:
    """By batch and strategy; every strategy in an engine of its own, one after another."""
    policy, reward_model = build(folder)
    settings = RolloutSettings(kv_cache_gib=0.25, max_num_seqs=MAX_BATCH * N, threads=1)
    common: dict[str, Any] = {"dtype": "float32", "max_length": LENGTH, "seed": 0, "device": "cpu"}
    found: dict[int, dict[str, Any]] = {batch: {} for batch in batches}
    model = load_reward_model(reward_model)
    plain = RolloutWorker("rollout-0", str(policy), settings, SyncSettings(), **common)
    await plain.start()
    try:
        for batch, prompts in batches.items():
            for name, samples in (("sample", 1), (f"best_of_{N}", N)):
                timed, groups = await rounds(plain, prompts, samples, count)
                found[batch][name] = summary(timed) | {"score_seconds": score_seconds(model, groups, count)}
    finally:
        await plain.stop()
    for kind in KINDS:
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
            for batch, prompts in batches.items():
                timed, _ = await rounds(guided, prompts, 1, count)
                found[batch][kind] = summary(timed)
        finally:
            await guided.stop()
    return found


def score_seconds(model: Any, groups: list[SampledGroup], count: int) -> float:
    """What scoring all completions takes: the median after one time that is not counted."""
    items = [(g.prompt.text, one.text, one.finished) for g in groups for one in g.completions]
    seconds = []
    for _ in range(count + 1):
        began = time.perf_counter()
        model.score(items)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def ratios_of(found: dict[str, Any]) -> dict[str, float]:
    """Guidance against plain sampling, per token; best of n against one sample, without and with scores."""
    plain, best = found["sample"], found[f"best_of_{N}"]
    guided = {f"{kind}_per_token": found[kind]["seconds_per_token"] for kind in KINDS}
    return {name: seconds / plain["seconds_per_token"] for name, seconds in guided.items()} | {
        f"best_of_{N}": best["seconds"] / plain["seconds"],
        f"best_of_{N}_with_scores": (best["seconds"] + best["score_seconds"])
        / (plain["seconds"] + plain["score_seconds"]),
    }


def main() -> None:
    """Measure, add the ratios, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "decoding_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    stolen = StolenTime(began)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(4, 30, (MAX_BATCH, 12), generator=generator).tolist()
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(ALPHABET)]
    prompts = [
        Prompt(f"line {i}", (1, *ids), "".join(names[one] for one in ids)) for i, ids in enumerate(letters)
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(
            measure(Path(folder), {batch: prompts[:batch] for batch in BATCHES}, options.rounds)
        )
    ratios = {batch: ratios_of(measured) for batch, measured in found.items()}
    result = {
        "command": "python benchmarks/decoding_cost.py",
        "machine": describe(),
        "stolen": stolen.share(time.monotonic()),
        "rounds": options.rounds,
        "top_k": TOP_K,
        "new_tokens": NEW_TOKENS,
        "measured_by_batch": found,
        "ratios_by_batch": ratios,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
