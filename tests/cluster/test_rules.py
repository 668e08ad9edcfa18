"""The rules that jobs of every objective share are asked in every one of them."""

import pytest

from cluster.config_file import ConfigError, parse_job

SCRATCH = "[model.scratch]\nmax_length = 2048\n"
TASK = '[task]\nkind = "reversal"\n'
PAIRS = '[preferences]\ntrain = "pairs.jsonl"\n'
REWARD = '[[reward]]\nkind = "task"\n'
JOBS = {
    "ppo": TASK + REWARD,
    "supervised": TASK,
    "reward_model": PAIRS,
    "dpo": PAIRS,
    "spin": TASK,
    "rejection": TASK + REWARD,
}


@pytest.mark.parametrize("objective", JOBS)
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('model.path="somewhere"', "give exactly one of model.path"),
        ('model.revision="main"', "downloads nothing"),
        ("model.max_length=4096", "is beyond model.scratch.max_length"),
        ("learner.cpu_offload=true", "needs learner.zero_stage 2 or 3, not 0"),
        ("model.scratch.heads=7", "model.scratch.heads = 7"),
    ],
)
def test_every_objective_refuses_what_no_job_can_have(objective: str, override: str, said: str) -> None:
    text = f'objective = "{objective}"\n' + JOBS[objective] + SCRATCH
    parse_job(text)
    with pytest.raises(ConfigError) as refused:
        parse_job(text, [override])
    assert said in str(refused.value)
