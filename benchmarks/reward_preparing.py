"""Seconds and peak memory of preparing a reward model's job with 100,000 pairs. Writes reward_preparing.json.

    python benchmarks/reward_preparing.py [--pairs 100000]

Preparing is all that comes before the learner starts: rows read, checked, split, analysed, made into tokens.
Texts are of made-up words, about 200 tokens each by a byte-level BPE of 32,000 tokens that is trained on such
words. Each form is prepared in a process of its own. `memory_mib` is the highest resident memory less what
the process had before (libraries and tokenizer loaded); `text_mib` is the size of the file, `tokens_mib` that
of the table of distinct sequences, which training needs.

strings   prompt, chosen, rejected; the tokenizer's chat template is put around the prompt
messages  whole conversations in chosen and rejected, without a prompt column
"""

import argparse
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import StolenTime, describe

HERE = Path(__file__).resolve().parent
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_VOCABULARY, _END, _PAD = 32_000, "<|end|>", "<|pad|>"


class Words:
    """60,000 words of one to four syllables, the n-th as frequent as 1/n."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        syllables = [
            "".join(parts) for parts in itertools.product("bdfgklmnprst", "aeiou", ("", "n", "r", "s"))
        ]
        draw = random.Random(0)
        words = {"".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(80_000)}
        self._words = sorted(words)[:60_000]
        draw.shuffle(self._words)
        weights = (1 / n for n in range(1, len(self._words) + 1))
        self._weights = list(itertools.accumulate(weights))

    def text(self, words: int) -> str:
        """Sentences of 12 words."""
        drawn = self._rng.choices(self._words, cum_weights=self._weights, k=words)
        parts = (" ".join(drawn[start : start + 12]).capitalize() for start in range(0, words, 12))
        return ". ".join(parts) + "."


def strings(words: Words) -> Iterator[dict[str, Any]]:
    """A prompt and two replies."""
    while True:
        yield {"prompt": words.text(145), "chosen": words.text(145), "rejected": words.text(145)}


def messages(words: Words) -> Iterator[dict[str, Any]]:
    """Two conversations that begin with the same message."""
    for row in strings(words):
        asked = {"role": "user", "content": row["prompt"]}
        yield {side: [asked, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}


FORMS: dict[str, Callable[[Words], Iterator[dict[str, Any]]]] = {"strings": strings, "messages": messages}


def save_model(folder: Path) -> None:
    """A tokenizer of realistic size, and the smallest model to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = Words(1)
    raw.train_from_iterator((words.text(145) for _ in range(10_000)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=_END, pad_token=_PAD)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def prepare(file: Path, model: Path) -> dict[str, Any]:
    """Prepare a job in this process; what it took."""
    from cluster.prepare import load_tokenizer
    from cluster.reward_job.config import RewardJobConfig
    from cluster.reward_job.inputs import prepare_reward_job

    tables = {"model": {"path": str(model)}, "preferences": {"train": str(file)}}
    config = RewardJobConfig.model_validate(tables)
    load_tokenizer(model)("as in the job")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, busy = time.perf_counter(), time.process_time()
    stolen = StolenTime(began)
    inputs = prepare_reward_job(config, file.parent)
    inputs.fingerprint  # noqa: B018 - a resume asks for it
    ended = time.perf_counter()
    sequences = inputs.data.sequences
    return {
        "seconds": ended - began,
        "processor_seconds": time.process_time() - busy,
        "stolen_share": stolen.share(ended),
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "text_mib": file.stat().st_size / 2**20,
        "tokens_mib": sequences.tokens.nbytes / 2**20,
        "sequences": len(sequences),
        "tokens_a_sequence": len(sequences.tokens) / len(sequences),
        "train": len(inputs.data.chosen),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--prepare", nargs=2, type=Path, help=argparse.SUPPRESS)  # in processes of their own
    options = parser.parse_args()
    if options.prepare:
        print(json.dumps(prepare(*options.prepare)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(model)
        for form, make in FORMS.items():
            file = Path(folder) / form / "pairs.jsonl"
            file.parent.mkdir()
            with file.open("w", encoding="utf-8") as out:
                for row in itertools.islice(make(Words(0)), options.pairs):
                    out.write(json.dumps(row) + "\n")
            command = [sys.executable, str(Path(__file__).resolve()), "--prepare", str(file), str(model)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"form": form, "pairs": options.pairs, **json.loads(done.stdout.splitlines()[-1])})
            file.unlink()
            print(
                f"{form:9s} {rows[-1]['seconds']:6.1f} s, {rows[-1]['memory_mib']:6.0f} MiB for "
                f"{rows[-1]['text_mib']:.0f} MiB of text and {rows[-1]['tokens_mib']:.0f} of tokens",
                flush=True,
            )
    result = {"command": "python benchmarks/reward_preparing.py", "machine": describe(), "rows": rows}
    (HERE / "reward_preparing.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
