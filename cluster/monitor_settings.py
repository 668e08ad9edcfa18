"""What a user may set about monitoring (the `[monitor]` table). No heavy imports here."""

from typing import Literal, get_args

from pydantic import Field

from rewards.settings import Settings

AlertKind = Literal["restart", "sync", "stop", "failure", "reward", "overoptimisation", "discriminator"]


class MonitorSettings(Settings):
    """`[monitor]`: terminal, local files and Weights & Biases."""

    console: Literal["auto", "live", "plain", "off"] = Field(
        "auto", description="auto: a live display on a terminal, a line a step elsewhere."
    )
    trace: bool = Field(
        True, description="Write rollouts.jsonl: when each group was sampled, scored and trained."
    )
    samples_every: int = Field(
        10, ge=0, description="Learner steps between samples kept for reading; 0: only before and after."
    )
    samples: int = Field(8, ge=1, description="Samples kept each time.")
    hosts_every_s: float = Field(
        15, ge=0, description="Seconds between two looks at the load of every host and actor; 0: none."
    )
    wandb: Literal["auto", "offline", "online", "disabled"] = Field(
        "auto", description="auto: online with WANDB_API_KEY or a login, offline without."
    )
    project: str = Field("headrace", min_length=1, description="W&B project.")
    entity: str = Field("", description="W&B user or team; empty: your default.")
    group: str = Field("", description="W&B group, for runs that belong together.")
    job_type: str = Field("train", description="W&B job type, to tell runs of a group apart.")
    tags: list[str] = Field(default_factory=list, description="W&B tags.")
    notes: str = Field("", description="W&B notes: why this run was made.")
    alerts: list[AlertKind] = Field(
        default_factory=lambda: list(get_args(AlertKind)),
        description="What W&B sends alerts of: a resume or a replaced actor, a refused weight sync, a "
        "stopped or failed run, reward errors, a reward that is gamed, a discriminator that has won or lost. "
        "Leave out what you don't want; [] is none.",
    )
    alert_every_s: float = Field(600, ge=0, description="Least seconds between two alerts of a kind.")
    alert_reward_errors: float = Field(
        0.05, ge=0, le=1, description="Share of groups with reward errors that is worth an alert."
    )
    start_timeout_s: float = Field(30, gt=0, description="Deadline for W&B to start, in seconds.")
    finish_timeout_s: float = Field(
        30, gt=0, description="Longest wait at the end for uploads to W&B, in seconds."
    )
