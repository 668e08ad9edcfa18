"""Supervised fine-tuning on demonstrations, completion tokens only: the warm-up before reinforcement."""

from collections.abc import Sequence

import torch

from actors.packing import Pair, pack
from learner.batch import assign_owners
from learner.engine import TrainingEngine, all_reduce
from learner.objectives import supervised_loss


def supervised_update(
    engine: TrainingEngine,
    demonstrations: Sequence[Pair],
    *,
    lr: float,
    micro_batch_tokens: int,
    rank: int,
    ranks: int,
) -> dict[str, float]:
    """One update on (prompt, completion) token ids, of which this rank takes its share.

    The loss is the mean over all completion tokens of the batch, on all ranks; an end token counts if the
    completion has one. Log-probabilities are those at temperature 1, whatever `rollout.temperature` is: the
    model itself is fitted to the demonstrations.
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in demonstrations]
    owner = assign_owners(lengths, [range(len(lengths))], ranks)
    mine = [pair for pair, rank_of in zip(demonstrations, owner, strict=True) if rank_of == rank]
    tokens = sum(len(completion) for _, completion in demonstrations)
    batches = pack(mine, micro_batch_tokens=micro_batch_tokens) if mine else []
    padded = engine.in_step(batches)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(padded):
        logprobs, _, values = engine.forward(batch or engine.dummy_micro_batch(), temperature=1.0)
        loss, _ = supervised_loss(logprobs, count=tokens)
        # Every parameter gets a gradient, if only 0: the value head has no part in this loss.
        loss = loss + 0.0 * values.sum()
        if batch is None:
            loss = 0.0 * loss
        engine.backward(loss, last=number == len(padded) - 1)
        total += loss.detach()
    norm = engine.step(lr)
    return {"loss/supervised": float(all_reduce(total)), "optimizer/grad_norm": norm, "optimizer/lr": lr}
