"""The world of `length_bias`, and the two kinds of reward model that learn its labels.

Legend: M training pairs, N responses, P held-out prompts, S samples of each, D features.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.active_labels import fit_linear
from cluster.scratch import build_scratch_model
from learner.reward_module import Sequences
from learner.reward_training import PairData
from learner.reward_worker import RewardJob, RewardLearner
from learner.settings import LearnerSettings, OptimizerSettings, ScratchSettings
from rewards.models.card import TextFormat
from rewards.models.settings import RewardModelSettings
from rewards.models.text import RewardEncoder
from rewards.models.transformer import choose_padding, load_tokenizer
from rewards.preferences.annotator import Candidate, SimulatedAnnotator
from rewards.preferences.losses import odin
from rewards.settings import TaskSettings
from rewards.tasks.coverage import FREE_LENGTH, SPOILED_HIT, SYMBOLS, CoverageTask

Array = NDArray[np.float64]
Loss = Literal["bradley-terry", "odin"]
Lengths = Literal["tail", "uniform-32", "uniform-24"]

TRAIN_PROMPTS, HELDOUT_PROMPTS = 4000, 600  # 65 of the 495 sets of symbols are held out
DEMONSTRATIONS = 4096  # of training sets alone
RIDGE = 0.1
ODIN_STEPS, ODIN_RATE = 150, 0.1
WARMUP_RATE, WARMUP_BATCH = 3e-3, 64


@dataclass(frozen=True, slots=True)
class Responses:
    """N responses: their texts, the prompts they answer (texts and numbers), gold rewards and lengths."""

    prompts: list[str]
    texts: list[str]
    place: NDArray[np.int64]
    gold: Array
    length: Array

    @classmethod
    def of(cls, rows: Sequence[tuple[int, dict[str, Any], str]]) -> "Responses":
        """From (number of the prompt, its row, response)."""
        task = CoverageTask()
        return cls(
            prompts=[row["prompt"] for _, row, _ in rows],
            texts=[text for _, _, text in rows],
            place=np.array([number for number, _, _ in rows]),
            gold=np.array([task.gold(row, text, True) for _, row, text in rows]),
            length=np.array([float(len(text)) for _, _, text in rows]),
        )

    def candidate(self, index: int) -> Candidate:
        """A response as the annotator sees it."""
        return Candidate(self.texts[index], float(self.gold[index]))


class World:
    """Training pairs and held-out responses; what the annotators of every bias are asked about.

    `train` holds the first responses of M pairs and then their second ones; `test` the S samples of the first
    held-out prompt, then of the second, and so on. The held-out prompts have distinct sets of symbols.
    """

    def __init__(self, seed: int, *, pairs: int, prompts: int, samples: int, lengths: Lengths) -> None:
        data = CoverageTask().generate(
            TaskSettings(
                kind="coverage",
                train_size=TRAIN_PROMPTS,
                heldout_size=HELDOUT_PROMPTS,
                demonstrations=DEMONSTRATIONS,
                seed=seed,
            )
        )
        rng = np.random.default_rng([seed, 0])
        first, second = [], []
        for number in range(pairs):
            place = number % TRAIN_PROMPTS
            row = data.train[place]
            one, other = sample(rng, row["answer"], 2, lengths)
            while one == other:
                one, other = sample(rng, row["answer"], 2, lengths)
            first.append((place, row, one))
            second.append((place, row, other))
        self.seed, self.pairs, self.prompts, self.samples = seed, pairs, prompts, samples
        self.train = Responses.of([*first, *second])
        self.demonstrations = data.demonstrations
        rng = np.random.default_rng([seed, 1])
        self.test = Responses.of(
            [
                (place, row, text)
                for place, row in enumerate(data.heldout[:prompts])
                for text in sample(rng, row["answer"], samples, lengths)
            ]
        )

    def annotator(self, bias: float) -> SimulatedAnnotator:
        """The coin of a pair is the same at every bias."""
        return SimulatedAnnotator(temperature=1.0, length_bias=bias, seed=self.seed)

    def first_wins(self, bias: float) -> NDArray[np.bool_]:
        """(M,): the training labels."""
        annotator, train = self.annotator(bias), self.train
        return np.array(
            [
                annotator.prefers_first(train.prompts[i], train.candidate(i), train.candidate(self.pairs + i))
                for i in range(self.pairs)
            ]
        )


def sample(rng: np.random.Generator, wanted: str, count: int, lengths: Lengths) -> list[str]:
    """Responses whose characters are wanted ones with p = 0.65 each, as in the task's spoiled demonstrations.

    Lengths are uniform from 1 to 32 or 24 (so are those of the demonstrations), or mostly short with a tail:
    geometric with a mean of 8, at most 32.
    """
    longest = 24 if lengths == "uniform-24" else 32
    shape = (count, longest)
    others = [symbol for symbol in SYMBOLS if symbol not in wanted]
    letters = np.where(
        rng.random(shape) < SPOILED_HIT, rng.choice(list(wanted), shape), rng.choice(others, shape)
    )
    if lengths == "tail":
        sizes = np.minimum(rng.geometric(1 / 8, count), longest)
    else:
        sizes = rng.integers(1, longest + 1, count)
    return ["".join(row[:length]) for row, length in zip(letters, sizes, strict=True)]


# ---- Linear ------------------------------------------------------------------------------------------------


def features(responses: Responses) -> Array:
    """(N, 8). The first four span gold and length exactly; the others only add noise."""
    rows = []
    for prompt, text in zip(responses.prompts, responses.texts, strict=True):
        wanted, written = set(prompt[:-1]), set(text)
        hits = [symbol in wanted for symbol in text]
        rows.append(
            [
                len(written & wanted),
                len(written - wanted),
                len(text),
                max(0, len(text) - FREE_LENGTH),
                hits[0],
                hits[-1],
                sum(hits) / len(hits),
                sum(a == b for a, b in itertools.pairwise(text)),
            ]
        )
    return np.array(rows, dtype=np.float64)


class LinearModels:
    """Linear reward models of whitened features: mean 0 and covariance 1 over the training responses."""

    def __init__(self, world: World) -> None:
        self._world = world
        torch.set_num_threads(1)  # the tensors are small
        train, test = features(world.train), features(world.test)
        mean = train.mean(axis=0)
        whiten = np.linalg.inv(np.linalg.cholesky(np.cov(train.T))).T
        self._train, self._test = (train - mean) @ whiten, (test - mean) @ whiten
        self.scored = np.arange(2 * world.pairs)

    def fit(self, bias: float, loss: Loss) -> tuple[Array, Array]:
        """Raw rewards of the training responses `scored` and of the held-out ones."""
        wins = self._world.first_wins(bias)
        head = self._odin(wins) if loss == "odin" else self._bradley_terry(wins)
        return self._train @ head, self._test @ head

    def _bradley_terry(self, wins: NDArray[np.bool_]) -> Array:
        first, second = np.split(self._train, 2)
        nothing = np.zeros((1, first.shape[1]))
        head = fit_linear(
            first - second,
            wins.astype(np.float64),
            ridge=RIDGE,
            centre=nothing,
            weight=np.ones((1, len(first))),
        )[0]
        return np.asarray(head, dtype=np.float64)

    def _odin(self, wins: NDArray[np.bool_]) -> Array:
        """The quality head. Whole batches, Adam, a cosine decay; heads (2, D) are free in size.

        Of whitened features, heads at right angles give uncorrelated rewards, so |cos| is the overlap.
        """
        first, second = np.split(np.arange(2 * len(wins)), 2)
        won, lost = np.where(wins, first, second), np.where(wins, second, first)
        x, lengths = torch.from_numpy(self._train), torch.from_numpy(self._world.train.length)
        chosen, rejected, both = x[won], x[lost], torch.stack([lengths[won], lengths[lost]])
        start = np.random.default_rng([self._world.seed, 2]).normal(size=(2, x.shape[1]))
        heads = torch.from_numpy(start / x.shape[1] ** 0.5).requires_grad_()
        optimizer = torch.optim.Adam([heads], lr=ODIN_RATE)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ODIN_STEPS)
        for _ in range(ODIN_STEPS):
            value, _figures = odin(heads @ chosen.T, heads @ rejected.T, both)
            overlap = torch.nn.functional.cosine_similarity(heads[0], heads[1], dim=0).abs()
            (heads.grad,) = torch.autograd.grad(value + overlap, heads)
            optimizer.step()
            decay.step()
        return np.asarray(heads.detach()[0].numpy(), dtype=np.float64)


# ---- Transformers ------------------------------------------------------------------------------------------


class TransformerModels:
    """Reward models that start from one tiny Llama and are trained as a job trains them.

    The Llama starts from random weights and first imitates the task's demonstrations for `warmup` updates, as
    a reward model usually starts from a policy. One learner rank, in this process. Of the training responses
    only those of the first `scored_pairs` pairs are scored afterwards.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        *,
        shape: dict[str, Any],
        warmup: int,
        epochs: int,
        batch_size: int,
        lr: float,
        scored_pairs: int,
    ) -> None:
        scratch = ScratchSettings(**shape, max_length=64)
        self._folder = build_scratch_model(scratch, CoverageTask().alphabet(), folder, world.seed)
        tokenizer = load_tokenizer(self._folder)
        if warmup:
            imitate(self._folder, tokenizer, world.demonstrations, updates=warmup, seed=world.seed)
        encoder = RewardEncoder(tokenizer, TextFormat(max_length=64))
        encoded = [
            encoder.encode_item((prompt, text, True))
            for part in (world.train, world.test)
            for prompt, text in zip(part.prompts, part.texts, strict=True)
        ]
        self._world, self._epochs, self._batch_size, self._lr = world, epochs, batch_size, lr
        self._sequences = Sequences.of(item.ids for item in encoded)
        self._lengths = tuple(item.length for item in encoded)
        self._pad, self._vocabulary = choose_padding(tokenizer), len(tokenizer)
        scored = np.arange(min(scored_pairs, world.pairs))
        self.scored = np.concatenate([scored, world.pairs + scored])

    def fit(self, bias: float, loss: Loss) -> tuple[Array, Array]:
        """Raw rewards of the training responses `scored` and of the held-out ones."""
        world = self._world
        learner = RewardLearner(0, 1, self._job(loss))
        learner.start(*learner.rendezvous())
        learner.give_data(self._data(world.first_wins(bias)), "")
        learner.begin_member(0)
        learner.update(learner.updates_a_member)
        test = 2 * world.pairs + np.arange(len(world.test.texts))
        raw = np.array(learner.score([*self.scored.tolist(), *test.tolist()]))
        return raw[: len(self.scored)], raw[len(self.scored) :]

    def _data(self, wins: NDArray[np.bool_]) -> PairData:
        pairs = len(wins)
        return PairData(
            sequences=self._sequences,
            lengths=self._lengths,
            chosen=tuple(i if won else pairs + i for i, won in enumerate(wins)),
            rejected=tuple(pairs + i if won else i for i, won in enumerate(wins)),
            margin=(0.0,) * pairs,
            weight=(1.0,) * pairs,
            prompt=tuple(int(place) for place in self._world.train.place[:pairs]),
        )

    def _job(self, loss: Loss) -> RewardJob:
        updates = self._epochs * -(-self._world.pairs // self._batch_size)
        return RewardJob(
            model_path=str(self._folder),
            attention="sdpa",
            learner=LearnerSettings(device="cpu", threads=2, micro_batch_tokens=8192),
            optimizer=OptimizerSettings(lr=self._lr, schedule="cosine", warmup_updates=updates // 10),
            reward=RewardModelSettings(loss=loss),
            seed=self._world.seed,
            epochs=self._epochs,
            batch_size=self._batch_size,
            pad_token_id=self._pad,
            vocabulary=self._vocabulary,
        )


def imitate(folder: Path, tokenizer: Any, rows: Sequence[dict[str, Any]], *, updates: int, seed: int) -> None:
    """Supervised fine-tuning of the model in `folder` on demonstrations, in place."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    encoder = RewardEncoder(tokenizer, TextFormat(max_length=64))
    demonstrations = [encoder.encode_item((row["prompt"], row["completion"], True)) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP_RATE, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, WARMUP_RATE, updates, pct_start=0.1)
    rng = np.random.default_rng([seed, 3])
    for _ in range(updates):
        batch = [demonstrations[i] for i in rng.integers(0, len(demonstrations), WARMUP_BATCH)]
        longest = max(len(one.ids) for one in batch)
        ids = torch.tensor([one.ids + [0] * (longest - len(one.ids)) for one in batch])
        sizes = torch.tensor([len(one.ids) for one in batch])
        starts = sizes - torch.tensor([one.length + 1 for one in batch])
        at = torch.arange(longest)
        answer = (at >= starts[:, None]) & (at < sizes[:, None])
        loss = model(input_ids=ids, labels=torch.where(answer, ids, -100)).loss  # padding is never looked at
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    model.save_pretrained(folder)
