"""What an iteration learns from: made of its samples, kept in the run folder, read again by a resume.

    rejection   scored groups   ─► select   ─► the best of each prompt's samples
    spin        sampled groups  ─► contrast ─► each demonstration against samples for its prompt

`iterations/NNN.jsonl` has a line an example: token ids of prompt and chosen response, and with SPIN those of
the rejected one and log π_t of both. From it a resumed run goes on inside an iteration without sampling
anew.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from actors.packing import Pair
from actors.records import Group, SampledGroup, Trajectory
from cluster.iterated_job.config import RejectionSettings
from cluster.monitor import write_atomically
from learner.preference_batch import NONE, Examples, PreferenceData, Responses
from learner.reward_module import Sequences

Tokens = tuple[int, ...]
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Lessons:
    """The examples of an iteration, N of them.

    `rejected` is empty where responses are imitated without a contrast. `reference` is then empty too, else
    (2·N,) log π_t: of all chosen responses, then of all rejected ones.
    """

    prompts: tuple[Tokens, ...]
    chosen: tuple[Tokens, ...]
    rejected: tuple[Tokens, ...] = ()
    reference: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def pairs(self) -> list[Pair]:
        """Prompt and chosen response of each."""
        return list(zip(self.prompts, self.chosen, strict=True))

    def contrasts(self) -> PreferenceData:
        """As the learner of preferences reads them: sequence i is the i-th chosen one, N + i the rejected."""
        count = len(self)
        responses = (*self.chosen, *self.rejected)
        prompts = self.prompts * 2
        sequences = Sequences.of((*p, *r) for p, r in zip(prompts, responses, strict=True))
        sizes = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
        examples = Examples(
            chosen=tuple(range(count)),
            rejected=tuple(range(count, 2 * count)),
            mismatched=(NONE,) * count,
            margin=(0.0,) * count,
            weight=(1.0,) * count,
        )
        return PreferenceData(Responses(sequences, sizes), examples)

    def with_reference(self, logprobs: Sequence[float]) -> "Lessons":
        """The same with log π_t of all sequences, in their order."""
        return replace(self, reference=tuple(logprobs))

    def write(self, path: Path) -> None:
        """Into a file, whole or not at all."""
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in self._rows()))

    def _rows(self) -> Iterator[dict[str, object]]:
        count = len(self)
        for number, (prompt, chosen) in enumerate(self.pairs()):
            row: dict[str, object] = {"prompt": prompt, "chosen": chosen}
            if self.rejected:
                row["rejected"] = self.rejected[number]
                row["reference"] = [self.reference[number], self.reference[count + number]]
            yield row

    @classmethod
    def read(cls, path: Path) -> "Lessons":
        """What `write` wrote; ValueError where the file is not there whole."""
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            prompts, chosen = (tuple(tuple(row[key]) for row in rows) for key in ("prompt", "chosen"))
            rejected = tuple(tuple(row["rejected"]) for row in rows if "rejected" in row)
            sides = [row["reference"] for row in rows if "reference" in row]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--resume: {path} has the examples that the checkpoint was in the middle of, and cannot be "
                f"read ({error}): put the file back, or start a new run"
            ) from None
        reference = tuple(side[place] for place in (0, 1) for side in sides)
        return cls(prompts, chosen, rejected, reference)


def select(groups: Sequence[Group], settings: RejectionSettings) -> tuple[Lessons, Figures]:
    """The best samples of each group, and what is to be said of them.

    A response that was cut off is never imitated: the policy would learn not to end. Of equal responses to a
    prompt one is kept, and of equally good ones the first, which is as good as any, samples being drawn
    independently of each other.
    """
    kept: list[tuple[Tokens, Trajectory]] = []
    for group in groups:
        distinct: dict[Tokens, Trajectory] = {}
        for one in sorted(group.trajectories, key=lambda one: -one.reward):
            enough = settings.minimum is None or one.reward >= settings.minimum
            if enough and one.completion.finished and len(distinct) < settings.keep:
                distinct.setdefault(one.completion.token_ids, one)
        kept += [(group.prompt.token_ids, one) for one in distinct.values()]
    rewards = [[one.reward for one in group.trajectories] for group in groups]
    every = [reward for several in rewards for reward in several]
    figures = {
        "reward/mean": float(np.mean(every)),
        "rejection/best_reward": float(np.mean([max(several) for several in rewards])),
        "rejection/kept": float(len(kept)),
        "rejection/kept_fraction": len(kept) / len(every),
        "rejection/prompts_fraction": len({prompt for prompt, _ in kept})
        / len({group.prompt.token_ids for group in groups}),
    }
    if kept:
        figures["rejection/kept_reward"] = float(np.mean([one.reward for _, one in kept]))
    prompts, chosen = [prompt for prompt, _ in kept], [one.completion.token_ids for _, one in kept]
    return Lessons(tuple(prompts), tuple(chosen)), figures


def contrast(groups: Sequence[SampledGroup], demonstrations: Sequence[Pair]) -> tuple[Lessons, Figures]:
    """Each demonstration against every sample of its group, and what is to be said of them.

    A sample that was cut off is among the rejected ones as it stands, without an end token.
    """
    rows = [
        (tuple(prompt), tuple(completion), sample)
        for group, (prompt, completion) in zip(groups, demonstrations, strict=True)
        for sample in group.completions
    ]
    prompts, chosen, samples = zip(*rows, strict=True)
    rejected = tuple(sample.token_ids for sample in samples)
    same = [a == b for a, b in zip(chosen, rejected, strict=True)]
    figures = {
        "spin/same_fraction": float(np.mean(same)),
        "spin/finished_fraction": float(np.mean([sample.finished for sample in samples])),
        "spin/sampled_tokens": float(np.mean([len(tokens) for tokens in rejected])),
        "spin/demonstrated_tokens": float(np.mean([len(tokens) for tokens in chosen])),
    }
    return Lessons(prompts, chosen, rejected), figures
