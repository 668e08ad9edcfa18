"""`headrace generate` and `headrace evaluate` as they are used, with Ray and vLLM."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_reward_model import plain_score, save_reward_model

from cluster.cli import main
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
torch.set_num_threads(1)
ALPHABET = "abcdefghij="
PROMPTS = ["ab=", "cde=", "fghij=", "a="]
SMALL = ["--max-new-tokens", "10", "--set", "rollout.kv_cache_gib=0.05", "--set", "rollout.max_num_seqs=64"]
TOP_K, WEIGHT = 6, 40.0
Worth = Callable[[list[int], list[int]], float]
"""Of a prompt's tokens and a response's, the candidate being the last of them."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of a run: the policy, and a value head on it."""
    from safetensors.torch import save_file

    step = tmp_path_factory.mktemp("run") / "checkpoints" / "step_000001"
    settings = ScratchSettings(hidden_size=64, layers=2, heads=2, max_length=32)
    build_scratch_model(settings, ALPHABET, step / "policy", seed=0)
    generator = torch.Generator().manual_seed(0)
    head = {"weight": torch.randn((1, 64), generator=generator), "bias": torch.tensor([0.5])}
    save_file(head, step / "value_head.safetensors")
    (step / "learner.json").write_text("{}")
    (step.parent / "latest.json").write_text(json.dumps({"step": 1, "folder": step.name}))
    return step


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": one, "id": one}) + "\n" for one in PROMPTS))
    (tmp_path / "mine.py").write_text(
        "def distinct(prompt, completion, row):\n    return len(set(completion))\n\n\n"
        "def short(prompt, completion, row):\n    return -len(completion)\n"
    )
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_best_of_n_writes_the_best_and_says_what_it_chose_from(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "best.jsonl"
    arguments = ["--policy", checkpoint.parents[1], "--prompts", prompts, "--out", out]
    chosen = ["--strategy", "best-of-n", "--n", 6, "--samples", 2, "--reward", f"{tmp_path}/mine.py:distinct"]
    assert main(["generate", *map(str, arguments + chosen), *SMALL]) == 0
    found = rows(out)
    assert [row["prompt"] for row in found] == [one for one in PROMPTS for _ in range(2)]
    for row in found:
        assert row["id"] == row["prompt"]
        assert row["score"] == len(set(row["completion"])) == max(row["candidate_scores"])
        assert len(row["candidate_scores"]) == 6
        assert row["tokens"] <= 10
        assert row["policy"].startswith("policy@")
    assert not list(tmp_path.glob("*.partial.jsonl"))


@torch.no_grad()
def guided_by_hand(model: Any, row: dict[str, Any], tokenizer: Any, worth: Worth) -> tuple[list[int], int]:
    """The argmax over the top k of logit + w·worth(prompt, prefix∘token), token by token, without caches.

    Beside it how many tokens are not the policy's likeliest.
    """
    prompt, response, changed = tokenizer(row["prompt"])["input_ids"], [], 0
    while len(response) < 10 and (not response or response[-1] != tokenizer.eos_token_id):
        logits = model(torch.tensor([prompt + response])).logits[0, -1]
        candidates = logits.topk(TOP_K).indices.tolist()
        totals = [float(logits[one]) + WEIGHT * worth(prompt, [*response, one]) for one in candidates]
        response.append(candidates[int(np.argmax(totals))])
        changed += response[-1] != candidates[0]
    return response, changed


def check_guided(found: list[dict[str, Any]], policy: Path, worth: Worth) -> None:
    """Every response is the one that the guide asks for, and the guide had a say."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert [row["prompt"] for row in found] == PROMPTS
    changed = 0
    for row in found:
        response, others = guided_by_hand(model, row, tokenizer, worth)
        assert row["completion"] == tokenizer.decode(response, skip_special_tokens=True)
        assert row["tokens"] == len(response)
        changed += others
    assert changed > 5, "the guide must have changed something"


def test_value_guided_decoding_takes_what_the_critic_likes(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    """Without a temperature each token is the argmax over the top k of logit + w·V(prefix∘token)."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "guided.jsonl"
    arguments = ["--policy", checkpoint, "--prompts", prompts, "--out", out, "--temperature", 0]
    chosen = ["--strategy", "value-guided", "--top-k", TOP_K, "--guidance-weight", WEIGHT]
    assert main(["generate", *map(str, arguments + chosen), *SMALL]) == 0
    backbone = AutoModelForCausalLM.from_pretrained(checkpoint / "policy").eval()
    end = AutoTokenizer.from_pretrained(checkpoint / "policy").eos_token_id
    head = load_file(checkpoint / "value_head.safetensors")

    def value(prompt: list[int], response: list[int]) -> float:
        """Of the prefix itself where the last token ends it."""
        ids = prompt + (response[:-1] if response[-1] == end else response)
        states = backbone(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return float(states[0, -1] @ head["weight"][0] + head["bias"])

    check_guided(rows(out), checkpoint / "policy", value)


@pytest.mark.parametrize("by", ["tokens", "text"])
def test_reward_guided_decoding_takes_what_the_reward_likes(
    by: str, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    """The same with r(prefix∘token): of a reward model on the policy's tokens, and of a function of the text.

    Its tokens are the policy's, so the end token is read as the end by the reward model; a function sees the
    text without it. The score of a whole response is that of the reward that guided.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_reward_model(tmp_path / "rm", seed=5, alphabet=ALPHABET)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "policy")

    def of_tokens(prompt: list[int], response: list[int]) -> float:
        """The head on the last token, whichever that is: a classifier itself would skip padding."""
        states = classifier.model(torch.tensor([[*prompt, *response]])).last_hidden_state
        return float(classifier.score(states[0, -1]))

    def of_text(_: list[int], response: list[int]) -> float:
        return len(set(tokenizer.decode(response, skip_special_tokens=True)))

    given, worth = {
        "tokens": (["--reward-model", folder], of_tokens),
        "text": (["--reward", f"{tmp_path}/mine.py:distinct"], of_text),
    }[by]
    out = tmp_path / "guided.jsonl"
    arguments = ["--policy", checkpoint, "--prompts", prompts, "--out", out, "--temperature", 0]
    chosen = ["--strategy", "reward-guided", "--top-k", TOP_K, "--guidance-weight", WEIGHT]
    assert main(["generate", *map(str, arguments + chosen + given), *SMALL]) == 0
    found = rows(out)
    check_guided(found, checkpoint / "policy", worth)
    for row in found:
        if by == "text":
            assert row["score"] == len(set(row["completion"]))
        else:
            plain = plain_score(folder, row["prompt"], row["completion"], row["finished"])
            assert row["score"] == pytest.approx(plain, abs=1e-4)


def test_an_evaluation_writes_tables_samples_and_a_picture(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation"
    arguments = ["--policy", checkpoint / "policy", "--prompts", prompts, "--out", out, "--samples", 8]
    judged = ["--reward", f"{tmp_path}/mine.py:distinct", "--gold", f"{tmp_path}/mine.py:short"]
    assert main(["evaluate", *map(str, arguments + judged), "--pass-threshold", "5", *SMALL]) == 0
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    pool = rows(out / "samples.jsonl")
    assert [row["prompt"] for row in pool] == PROMPTS
    rewards = np.array([row["rewards"] for row in pool])
    assert rewards.tolist() == [[len(set(text)) for text in row["responses"]] for row in pool]
    assert found["reward"]["mean"] == pytest.approx(rewards.mean())
    assert found["components"]["gold"]["mean"] == pytest.approx(
        -np.mean([len(text) for row in pool for text in row["responses"]])
    )
    curve = {row["n"]: row for row in found["best_of_n"]}
    assert curve[8]["reward"]["mean"] == pytest.approx(rewards.max(axis=1).mean())
    assert found["pass_at_k"]["rows"][0]["mean"] == pytest.approx((rewards >= 5).mean())
    assert (out / "best_of_n.png").stat().st_size > 10_000
    for row in pool:
        assert all(0 < n <= 10 for n in row["tokens"])
        assert all(n >= len(text) for n, text in zip(row["tokens"], row["responses"], strict=True))

    # The same policy against itself, with other draws.
    again = tmp_path / "again"
    arguments = ["--policy", checkpoint / "policy", "--prompts", prompts, "--out", again, "--samples", 8]
    against = ["--against", str(out), "--seed", "1"]
    assert main(["evaluate", *map(str, arguments + judged), *against, *SMALL]) == 0
    compared = json.loads((again / "evaluation.json").read_text(encoding="utf-8"))["against"]
    assert compared["win_rates"].keys() == found["components"].keys()
    assert all(0 <= rate["raw"] <= 1 for rate in compared["win_rates"].values())


def test_soft_best_of_n_goes_on_after_an_interrupt(checkpoint: Path, tmp_path: Path) -> None:
    """A low λ takes the best, as best-of-n does; what was done before the interrupt is not done again.

    The command is started as by a shell in the background: with SIGINT ignored.
    """
    words = [f"{a}{b}=" for a in "abcd" for b in "efghij"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in words))
    (tmp_path / "mine.py").write_text(
        "import time\n\n\ndef slow(prompt, completion, row):\n    time.sleep(0.1)\n"
        "    return len(set(completion))\n"
    )
    out, partial = tmp_path / "soft.jsonl", tmp_path / "soft.partial.jsonl"
    arguments = ["--policy", checkpoint, "--prompts", tmp_path / "prompts.jsonl", "--out", out]
    chosen = ["--strategy", "soft-best-of-n", "--n", 3, "--soft-temperature", 0.01]
    reward = ["--reward", f"{tmp_path}/mine.py:slow"]
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "generate",
        *map(str, arguments + chosen + reward),
        *SMALL,
    ]
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heard)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and stopped.poll() is None:
        if partial.exists() and partial.read_text().count("\n") > 2:
            break
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 1, said
    assert "the same command goes on" in said
    kept = [line for row in rows(partial)[1:] for line in row["lines"]]
    assert 0 < len(kept) < len(words)
    assert not out.exists()

    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    found = rows(out)
    assert [row["prompt"] for row in found] == words
    assert all(row in found for row in kept)
    for row in found:
        assert row["strategy"] == "soft-best-of-n"
        assert row["score"] == max(row["candidate_scores"])
