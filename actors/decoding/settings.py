"""What guides a decoding engine: which scores, read how. It travels to the engine's process as JSON."""

from typing import Literal

from pydantic import Field

from rewards.settings import RewardSettings, Settings, TaskSettings

GUIDE = "headrace_guide"
"""The key under which engine and requests carry it."""


class GuideSpec(Settings):
    """One guide.

    reward_tokens: a transformer reward model reads the policy's own tokens. reward_text: any rewards score
    the text so far. value: a critic reads the policy's tokens.
    """

    kind: Literal["reward_tokens", "reward_text", "value"]
    ends: list[int]
    end_token: int = 0
    device: str = "cpu"
    precision: str = "float32"
    micro_batch_tokens: int = 8192
    # reward_tokens and reward_text
    rewards: list[RewardSettings] = Field(default_factory=list)
    task: TaskSettings | None = None
    directory: str = "."
    timeout_s: float = 10.0
    memory_gib: float = 4.0
    environment: list[str] = Field(default_factory=list)
    # value
    backbone: str = ""
    head: str = ""
    # where the engine's process leaves the reason when it cannot go on
    trouble: str = ""


class Guidance(Settings):
    """How strongly one request is guided: π_g ∝ π·e^{weight·score} over the `top_k` likeliest tokens."""

    top_k: int
    weight: float
