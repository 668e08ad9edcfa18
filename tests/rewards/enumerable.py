"""A language model small enough to list: 4 tokens, 6 places, 4096 responses, in float64.

Token 0 says nothing; 1 and 2 are wanted, 3 is not. The length of a response is the number of tokens that say
something. Every expectation is a sum over all responses, so what is compared with it must agree to rounding.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TOKENS, PLACES = 4, 6
RESPONSES = np.stack(np.meshgrid(*[np.arange(TOKENS)] * PLACES, indexing="ij"), axis=-1).reshape(-1, PLACES)
LENGTHS: Array = (RESPONSES > 0).sum(axis=1).astype(np.float64)


def reference(seed: int, scale: float = 1.0, silence: float = 0.0) -> Array:
    """Probabilities (4096,) of a random autoregressive model: every prefix has its own softmax.

    `silence` is added to the logit of token 0 everywhere: long responses become rare.
    """
    rng = np.random.default_rng(seed)
    log_p = np.zeros(1)
    for place in range(PLACES):
        logits = scale * rng.normal(size=(TOKENS**place, TOKENS))
        logits[:, 0] += silence
        step = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        log_p = (log_p[:, None] + step).ravel()
    return np.exp(log_p)


def gold(cost: float = 0.5) -> Array:
    """Distinct wanted tokens − ½·(the unwanted one is there) − cost·(length beyond 2)."""
    wanted = sum(np.equal(RESPONSES, token).any(axis=1).astype(np.float64) for token in (1, 2))
    return wanted - 0.5 * np.equal(RESPONSES, 3).any(axis=1) - cost * np.maximum(LENGTHS - 2, 0.0)


def best_of_n_law(p: Array, score: Array, n: int) -> Array:
    """π_n(y) = p(y)/p(level)·(Fⁿ − F₋ⁿ): the best of n has this level, any response of it as by p."""
    levels, level = np.unique(score, return_inverse=True)
    mass = np.bincount(level, p, len(levels))
    upto = np.cumsum(mass)
    below = np.concatenate([[0.0], upto[:-1]])
    return p / mass[level] * (upto**n - below**n)[level]


def levels(p: Array, *columns: Array) -> tuple[Array, list[Array]]:
    """Responses that agree in all columns as one: their mass and their values."""
    values, level = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return np.bincount(level.ravel(), p, len(values)), list(values.T)


def correlation(p: Array, x: Array, y: Array) -> float:
    """Pearson's under p."""
    x, y = x - p @ x, y - p @ y
    return float((p * x) @ y / np.sqrt((p * x) @ x * ((p * y) @ y)))
