"""A language model small enough to list: 4 tokens, 6 places, 4096 responses, float64, with gradients.

Every prefix has its own logits, so that expectations, divergences, optima, laws of best-of-n and gradients
are sums over all responses: what is compared with them must agree to rounding. With `ends` token 0 is the end
token, and responses have 1 to 6 tokens; those of 6 tokens without it are truncated, not finished. Other sizes
serve what grows too fast, such as all samples of n responses.

Legend: N responses, T places, V tokens, S = 1 + V + … + V^(T−1) prefixes (states of the token MDP), in the
order of their length and then of their tokens. What stands outside the mask of (N, T) is 0.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

END = 0
"""The end token, where a listing `ends`."""

MOST_SAMPLES = 1 << 21
"""Enumerations over samples of n responses stop here: about 16 MB for each of their tensors."""


@dataclass(frozen=True)
class Listing:
    """All responses of `places` tokens out of `tokens`; with `ends`, none goes on after token 0."""

    tokens: int = 4
    places: int = 6
    ends: bool = False

    @cached_property
    def sequences(self) -> Tensor:
        """(N, T) token ids in lexicographic order; 0 after the end."""
        every = torch.cartesian_prod(*[torch.arange(self.tokens)] * self.places)
        every = every.reshape(-1, self.places)
        if not self.ends:
            return every
        after_end = (every == END).cumsum(1).roll(1, dims=1)
        after_end[:, 0] = 0
        return every[((after_end == 0) | (every == END)).all(1)]

    @cached_property
    def mask(self) -> Tensor:
        """(N, T): true on a response's tokens, the end token among them, and on nothing after it."""
        if not self.ends:
            return torch.ones_like(self.sequences, dtype=torch.bool)
        ended = (self.sequences == END).cumsum(1)
        return (ended == 0) | ((ended == 1) & (self.sequences == END))

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) tokens of each response, the end token counted."""
        return self.mask.sum(1)

    @cached_property
    def finished(self) -> Tensor:
        """(N,): whether a response has its end token; without `ends` the last place is the end of each."""
        if not self.ends:
            return torch.ones(len(self.sequences), dtype=torch.bool)
        return (self.sequences == END).any(1)

    @cached_property
    def offsets(self) -> list[int]:
        """(T + 1) entries: the first state whose prefix has t tokens."""
        return [sum(self.tokens**k for k in range(t)) for t in range(self.places + 1)]

    @property
    def state_count(self) -> int:
        """S."""
        return self.offsets[-1]

    @cached_property
    def states(self) -> Tensor:
        """(N, T): the state in which each token is chosen; 0, that of the empty prefix, outside the mask."""
        columns, number = [], torch.zeros(len(self.sequences), dtype=torch.long)
        for place in range(self.places):
            columns.append(self.offsets[place] + number)
            number = number * self.tokens + self.sequences[:, place]
        return torch.where(self.mask, torch.stack(columns, dim=1), 0)

    @cached_property
    def place_of_state(self) -> Tensor:
        """(S,): the length of each state's prefix."""
        return torch.cat([torch.full((self.tokens**t,), t) for t in range(self.places)])

    def state(self, prefix: Sequence[int]) -> int:
        """The number of the state after `prefix`, which has fewer than T tokens."""
        number = 0
        for token in prefix:
            number = number * self.tokens + int(token)
        return self.offsets[len(prefix)] + number

    def row(self, sequence: Sequence[int]) -> int:
        """The number of the response with these tokens; what follows an end token may be left out."""
        padded = torch.tensor([*sequence, *[END] * (self.places - len(sequence))])
        (found,) = (self.sequences == padded).all(1).nonzero().flatten().tolist()
        return found


FIXED = Listing()
"""4096 responses of 6 tokens."""

ENDING = Listing(ends=True)
"""1093 responses: 3^t that end after t other tokens, t = 0 … 5, and 729 that are cut off."""


@dataclass(frozen=True, eq=False)
class EnumerableLM:
    """π by the logits (S, V) of its states; gradients reach whatever the logits were computed from."""

    logits: Tensor
    listing: Listing = field(default=FIXED)

    @classmethod
    def random(
        cls, seed: int, *, listing: Listing = FIXED, scale: float = 1.0, end_bias: float = 0.0
    ) -> "EnumerableLM":
        """Logits of N(0, scale²), leaves that take gradients; `end_bias` is added to those of token 0."""
        generator = torch.Generator().manual_seed(seed)
        shape = (listing.state_count, listing.tokens)
        logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        logits[:, END] += end_bias
        return cls(logits.requires_grad_(), listing)

    @classmethod
    def factorised(cls, logits: Tensor, listing: Listing = FIXED) -> "EnumerableLM":
        """A policy that cannot see its prefix: (T, V) logits, one row a place."""
        assert logits.shape == (listing.places, listing.tokens)
        return cls(logits[listing.place_of_state], listing)

    @classmethod
    def of_law(cls, law: Tensor, listing: Listing = FIXED) -> "EnumerableLM":
        """The autoregressive model with this law, (N,) probabilities; uniform where none of it passes."""
        places = (listing.states * listing.tokens + listing.sequences)[listing.mask]
        weights = law[:, None].expand(listing.mask.shape)[listing.mask]
        mass = torch.zeros(listing.state_count * listing.tokens, dtype=law.dtype).index_add(
            0, places, weights
        )
        table = mass.reshape(-1, listing.tokens)
        empty = table.sum(1, keepdim=True) == 0
        return cls(torch.where(empty, 0.0, table.log()).detach().requires_grad_(), listing)

    # --- The law -----------------------------------------------------------------------------------------

    @property
    def sequences(self) -> Tensor:
        """(N, T) token ids."""
        return self.listing.sequences

    @property
    def mask(self) -> Tensor:
        """(N, T) real tokens."""
        return self.listing.mask

    def table(self) -> Tensor:
        """(S, V): log π(a|s)."""
        return torch.log_softmax(self.logits, dim=-1)

    def token_log_probs(self) -> Tensor:
        """(N, T): log π(y_t | y_<t)."""
        chosen = self.table()[self.listing.states, self.sequences]
        return torch.where(self.mask, chosen, 0.0)

    def log_probs(self) -> Tensor:
        """(N,): log π(y)."""
        return self.token_log_probs().sum(1)

    def probs(self) -> Tensor:
        """(N,): π(y), without gradients: the weight that a sample has in an exact expectation."""
        return self.log_probs().detach().exp()

    def expectation(self, values: Tensor) -> Tensor:
        """E_π[values(y)] of (N,) values; the gradient is that of the expectation, ∇π included."""
        return (self.log_probs().exp() * values).sum()

    def entropy(self) -> Tensor:
        """H(π), in nats a response."""
        return -self.expectation(self.log_probs())

    def kl(self, other: "EnumerableLM") -> Tensor:
        """KL(π‖other) of whole responses."""
        return kl(self.log_probs(), other.log_probs())

    def visits(self) -> Tensor:
        """(S,): the chance that a response passes through each state, without gradients."""
        found = torch.zeros(self.listing.state_count, dtype=torch.float64)
        weights = self.probs()[:, None].expand(self.mask.shape)[self.mask]
        return found.index_add(0, self.listing.states[self.mask], weights)

    def sample(self, count: int, seed: int) -> Tensor:
        """(count,) numbers of responses drawn from π."""
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(self.probs(), count, replacement=True, generator=generator)

    def gradient(self, value: Tensor, *, keep: bool = False) -> Tensor:
        """∂value/∂logits, (S, V)."""
        (found,) = torch.autograd.grad(value, self.logits, retain_graph=keep)
        return found

    # --- Values and optima of E[R] − β·KL ------------------------------------------------------------------

    def values(self, rewards: Tensor) -> Tensor:
        """(S,): V(s) = E_π[R | prefix], by going backwards through the places; 0 where none passes."""
        log_p = self.table().detach()
        return self._backwards(rewards, lambda rows, q: (log_p[rows].exp() * q).sum(-1))[1]

    def soft_values(self, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """(Q*, V*), (S, V) and (S,), with this model as reference: V*(s) = β·log Σ_a π(a|s)·e^{Q*(s,a)/β}.

        Q*(s, a) is V* of the longer prefix, or R where the response ends with a.
        """
        log_p = self.table().detach()
        return self._backwards(
            rewards, lambda rows, q: beta * torch.logsumexp(log_p[rows] + q / beta, dim=-1)
        )

    def optimum(self, rewards: Tensor, beta: float) -> "EnumerableLM":
        """π*(a|s) = π(a|s)·exp((Q*(s,a) − V*(s))/β), from soft value iteration, token by token."""
        q, v = self.soft_values(rewards, beta)
        logits = self.table().detach() + (q - v[:, None]) / beta
        return EnumerableLM(logits.requires_grad_(), self.listing)

    def tilted(self, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """(log π*, log Z), (N,) and a scalar: π* = π·e^{R/β}/Z as one softmax over all responses."""
        unnormalised = self.log_probs().detach() + rewards / beta
        log_z = torch.logsumexp(unnormalised, dim=0)
        return unnormalised - log_z, log_z

    def _backwards(
        self, rewards: Tensor, combine: Callable[[slice, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        listing = self.listing
        q = torch.zeros(listing.state_count, listing.tokens, dtype=torch.float64)
        v = torch.zeros(listing.state_count, dtype=torch.float64)
        last = listing.lengths - 1
        for place in reversed(range(listing.places)):
            rows = slice(listing.offsets[place], listing.offsets[place + 1])
            if place + 1 < listing.places:
                after = slice(listing.offsets[place + 1], listing.offsets[place + 2])
                q[rows] = v[after].reshape(-1, listing.tokens)
            here = last == place
            q[listing.states[here, place], listing.sequences[here, place]] = rewards[here]
            v[rows] = combine(rows, q[rows])
        return q, v


# --- Laws on a list of responses -------------------------------------------------------------------------


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL of two laws by their log-probabilities; what has no mass in `first` counts 0."""
    held = first > -torch.inf
    return (first[held].exp() * (first[held] - second[held])).sum()


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """½·KL(first‖m) + ½·KL(second‖m) with m their mean, by log-probabilities."""
    mean = torch.logaddexp(first, second) - torch.log(torch.tensor(2.0, dtype=first.dtype))
    return 0.5 * kl(first, mean) + 0.5 * kl(second, mean)


def best_of_n_law(probs: Tensor, scores: Tensor, n: int) -> Tensor:
    """(N,): π_n(y) = p(y)/p(level)·(Fⁿ − F₋ⁿ), F the mass up to y's level of the score, F₋ that below it."""
    _, level = torch.unique(scores, return_inverse=True)
    mass = torch.zeros(int(level.max()) + 1, dtype=probs.dtype).index_add(0, level, probs)
    upto = mass.cumsum(0)
    below = torch.cat([torch.zeros(1, dtype=probs.dtype), upto[:-1]])
    return probs / mass[level] * (upto**n - below**n)[level]


def all_samples(count: int, n: int) -> Tensor:
    """(count^n, n): every sample of n responses out of `count`, in order."""
    assert count**n <= MOST_SAMPLES, f"{count}^{n} samples are too many to list"
    return torch.cartesian_prod(*[torch.arange(count)] * n).reshape(-1, n)


def best_of_n_by_listing(probs: Tensor, scores: Tensor, n: int) -> Tensor:
    """(N,): the law of the best of n by going through all N^n samples; ties are drawn among, evenly."""
    samples = all_samples(len(probs), n)
    chance = probs[samples].prod(1)
    best = scores[samples] == scores[samples].amax(1, keepdim=True)
    shares = chance[:, None] * best / best.sum(1, keepdim=True)
    return torch.zeros_like(probs).index_add(0, samples.flatten(), shares.flatten())


# --- A reward to optimise --------------------------------------------------------------------------------


def coverage_reward(listing: Listing) -> Tensor:
    """(N,): distinct ones of tokens 1 and 2, −½ where token 3 is there, −0.2 where the end is missing.

    Few levels, so that responses tie.
    """
    sequences = listing.sequences
    one, two, three = ((sequences == token).any(1).double() for token in (1, 2, 3))
    return one + two - 0.5 * three - 0.2 * (~listing.finished).double()


def distinct_reward(listing: Listing, seed: int, scale: float = 1.0) -> Tensor:
    """(N,): N(0, scale²), no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(listing.sequences), generator=generator, dtype=torch.float64)


def groups_of_levels(probs: Tensor, rewards: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every group of `size` rewards: (M, size) levels, (M,) their chances, and (K,) the levels' rewards.

    What a method does with a group depends on the rewards alone, so K^size groups stand for N^size.
    """
    values, level = torch.unique(rewards, return_inverse=True)
    mass = torch.zeros(len(values), dtype=probs.dtype).index_add(0, level, probs)
    groups = torch.tensor(list(itertools.product(range(len(values)), repeat=size)))
    return groups, mass[groups].prod(1), values
