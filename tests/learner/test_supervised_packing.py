"""Supervised fine-tuning on packed rows is that of each demonstration alone, on its completion only."""

from pathlib import Path

import torch
from tiny_learner import VOCABULARY, save_model

from actors.language_model import load_causal_model, token_logprobs
from actors.packing import Pair, pack
from learner.objectives import supervised_loss


def demonstrations() -> list[Pair]:
    draw = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        found: list[int] = torch.randint(0, VOCABULARY, (count,), generator=draw).tolist()
        return found

    return [(tokens(1 + i % 4), tokens(1 + (3 * i) % 7)) for i in range(9)]


def test_loss_and_gradient_are_those_of_demonstrations_one_by_one(tmp_path: Path) -> None:
    """Against the library's own loss with `labels` of −100 on the prompt: a mean over completion tokens.

    The mean over all tokens of the batch is Σ_i n_i·loss_i / Σ_i n_i, with n_i the completion tokens of i.
    """
    model = load_causal_model(
        save_model(tmp_path / "model"), dtype="float32", attention="sdpa", device="cpu"
    ).double()
    pairs = demonstrations()
    count = sum(len(completion) for _, completion in pairs)

    alone = torch.zeros((), dtype=torch.float64)
    for prompt, completion in pairs:
        ids = torch.tensor([[*prompt, *completion]])
        labels = torch.tensor([[*([-100] * len(prompt)), *completion]])
        loss = model(input_ids=ids, labels=labels).loss * len(completion) / count
        loss.backward()
        alone += loss.detach()
    expected = {name: one.grad.clone() for name, one in model.named_parameters()}

    for micro_batch_tokens in (12, 40, 4096):  # one demonstration a micro-batch or row, several, all in one
        model.zero_grad()
        batches = pack(pairs, micro_batch_tokens=micro_batch_tokens)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            logprobs, _ = token_logprobs(model, batch, temperature=1.0, chunk_tokens=7)
            loss, _ = supervised_loss(logprobs, count=count)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().double()
        # Both compute log-probabilities in float32, whatever the model's own precision.
        assert abs(float(total - alone)) < 2e-6
        for name, one in model.named_parameters():
            assert one.grad is not None
            assert float((one.grad - expected[name]).abs().max()) < 5e-6, name
    assert len(pack(pairs, micro_batch_tokens=4096)) == 1
    assert len(pack(pairs, micro_batch_tokens=12)) > 3
