"""Settings of the learner: what 0 means, and what is refused."""

import pytest
from pydantic import ValidationError

from learner.settings import OptimizerSettings, PPOSettings


def test_zero_is_none_and_can_be_set() -> None:
    settings = PPOSettings(clip_value=0.0, dual_clip=0.0)
    assert (settings.clip_value, settings.dual_clip) == (0.0, 0.0)
    assert PPOSettings(dual_clip=1.5).dual_clip == 1.5


@pytest.mark.parametrize("value", [0.5, 1.0])
def test_a_dual_clip_that_would_cut_ordinary_losses_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="greater than 1, or 0 for no bound"):
        PPOSettings(dual_clip=value)


@pytest.mark.parametrize("betas", [[0.9, 1.0], [-0.1, 0.9]])
def test_betas_lie_in_the_unit_interval(betas: list[float]) -> None:
    with pytest.raises(ValidationError, match="at least 0 and below 1"):
        OptimizerSettings(betas=betas)
    assert OptimizerSettings(betas=[0.0, 0.999]).betas == [0.0, 0.999]
