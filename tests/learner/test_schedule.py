"""Learning rates by hand."""

import pytest

from learner.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "update", "expected"),
    [
        # Warm-up over 4 updates: quarters. Then 10 updates of decay to 10 % of a peak of 2.
        ("constant", 0, 0.5),
        ("constant", 3, 2.0),
        ("constant", 13, 2.0),
        ("linear", 4, 2.0),
        ("linear", 9, 2.0 * (0.1 + 0.9 * 0.5)),
        ("linear", 14, 0.2),
        ("linear", 99, 0.2),
        ("cosine", 4, 2.0),
        ("cosine", 9, 2.0 * (0.1 + 0.9 * 0.5)),  # cos(π/2) = 0
        ("cosine", 14, 0.2),
    ],
)
def test_rate(schedule: str, update: int, expected: float) -> None:
    rate = learning_rate(update, peak=2.0, total=14, warmup=4, schedule=schedule, floor=0.1)
    assert rate == pytest.approx(expected)
