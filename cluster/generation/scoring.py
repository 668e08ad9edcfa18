"""Rewards of sampled groups, computed here in the driver: whatever waits is scored in one batch.

groups as they come ─► up to 16 at a time, in a thread ─► for each sample a Score or a RewardError
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from actors.records import SampledGroup
from actors.settings import BATCH_GROUPS
from cluster.generation.settings import Judges
from rewards.base import RewardError, RewardRequest, Score
from rewards.build import build_reward
from rewards.model_reward import ModelPlace

Answer = Score | RewardError


class Scoring:
    """Scores groups; `close` at the end. Rewards of role `evaluate` are asked too, and are components."""

    def __init__(self, judges: Judges, directory: Path, *, place: ModelPlace) -> None:
        """Build the rewards; ValueError if one cannot work."""
        settings = judges.scoring
        self._reward = build_reward(
            judges.reward,
            judges.task,
            timeout_s=settings.reward_timeout_s,
            memory_gib=settings.reward_memory_gib,
            directory=directory,
            environment=settings.reward_env,
            models=place,
        )
        self._penalty = settings.missing_eos_penalty
        self._waiting: list[tuple[SampledGroup, asyncio.Future[list[Answer]]]] = []
        self._turn = asyncio.Lock()

    async def score(self, group: SampledGroup) -> list[Answer]:
        """One answer for each sample. Who has the turn scores for all who wait."""
        answer: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, answer))
        async with self._turn:
            if not answer.done():
                batch, self._waiting = self._waiting[:BATCH_GROUPS], self._waiting[BATCH_GROUPS:]
                found = await asyncio.to_thread(self.score_now, [one for one, _ in batch])
                for (_, future), answers in zip(batch, found, strict=True):
                    if not future.done():  # its waiter may have been cancelled
                        future.set_result(answers)
        return await answer

    def score_now(self, groups: Sequence[SampledGroup]) -> list[list[Answer]]:
        """The answers for each group."""
        scored = self._reward.score_groups([_requests(group) for group in groups], [True] * len(groups))
        return [
            [
                self._penalised(answer, completion.finished)
                for answer, completion in zip(one.answers, group.completions, strict=True)
            ]
            for one, group in zip(scored, groups, strict=True)
        ]

    def _penalised(self, answer: Answer, finished: bool) -> Answer:
        if isinstance(answer, RewardError) or finished or not self._penalty:
            return answer
        return Score(answer.value - self._penalty, answer.components)

    def close(self) -> None:
        """Free what the rewards hold."""
        self._reward.close()


def _requests(group: SampledGroup) -> list[RewardRequest]:
    prompt = group.prompt
    return [
        RewardRequest(
            prompt.source or prompt.text,
            one.text,
            prompt.row,
            one.finished,
            (*prompt.token_ids, *one.token_ids),
        )
        for one in group.completions
    ]
