"""What a user may set about rollouts, scoring and weight sync. No heavy imports here."""

from typing import Literal

from pydantic import Field

from rewards.settings import Settings


class RolloutSettings(Settings):
    """`[rollout]`: the Ray actors that sample with vLLM."""

    actors: int = Field(1, ge=1, description="Rollout actors, each with a vLLM engine of its own.")
    max_actors: int = Field(
        0, ge=0, description="Most rollout actors, as hosts join the cluster; 0: no more than `actors`."
    )
    group_size: int = Field(8, ge=1, description="Samples drawn for each prompt.")
    max_new_tokens: int = Field(64, ge=1, description="Longest response, in tokens, the end token included.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature; applied to all log-probabilities."
    )
    max_groups_in_flight: int = Field(64, ge=1, description="Groups one actor works on at once.")
    max_num_seqs: int = Field(256, ge=1, description="Sequences one engine runs at once.")
    kv_cache_gib: float = Field(0.5, gt=0, description="CPU: memory of one engine's key-value cache, in GiB.")
    gpu_memory_utilization: float = Field(
        0.85, gt=0, le=1, description="CUDA: share of the GPU for one engine."
    )
    tensor_parallel: int = Field(1, ge=1, description="CUDA: GPUs of one engine.")
    cores: float = Field(0.5, gt=0, description="CPU cores that each actor asks Ray for.")
    threads: int | None = Field(
        None, ge=1, description="CPU: threads of an engine; unset: `cores`, at least 1."
    )
    enforce_eager: bool = Field(True, description="Do not compile or capture graphs (faster start).")
    start_timeout_s: float = Field(300, gt=0, description="Deadline for an engine to start, in seconds.")
    generate_timeout_s: float = Field(
        300, gt=0, description="Deadline for one group to be sampled, in seconds."
    )
    max_attempts: int = Field(3, ge=1, description="Times a group is sampled before the run stops.")
    dynamic_sampling: bool = Field(
        False,
        description="Leave out groups whose samples all have the same reward, and sample other prompts "
        "instead.",
    )
    dynamic_limit: int = Field(
        256, ge=1, description="Groups in a row that `dynamic_sampling` may leave out before the run stops."
    )


BATCH_GROUPS = 16  # groups scored in one call: enough to fill the reference's forward pass


class ScoringSettings(Settings):
    """`[scoring]`: the Ray actors that compute rewards and the reference's log-probabilities."""

    actors: int = Field(1, ge=1, description="Scoring actors.")
    cores: float = Field(0.25, gt=0, description="CPU cores that each actor asks Ray for.")
    gpus: float = Field(0, ge=0, description="GPUs that each actor asks Ray for, for the reference model.")
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Subtracted from the reward of a response cut off at `max_new_tokens`."
    )
    reward_timeout_s: float = Field(
        10, gt=0, description="Deadline for your function to score one completion, in seconds."
    )
    reward_memory_gib: float = Field(4.0, gt=0, description="Address space your function's process may use.")
    reward_env: list[str] = Field(
        default_factory=list,
        description="Environment variables your function sees although they are named like a secret.",
    )
    timeout_s: float = Field(600, gt=0, description="Deadline for one group to be scored, in seconds.")
    max_error_fraction: float = Field(
        0.5, gt=0, le=1, description="The run stops once this share of the last 64 groups had a reward error."
    )


class SyncSettings(Settings):
    """`[sync]`: how weights reach the rollout actors, and how that is proved."""

    backend: Literal["auto", "shared", "nccl", "ipc"] = Field(
        "auto",
        description="shared: memory file on a host, object store between hosts; auto: shared on CPU, "
        "nccl on CUDA, ipc where learner and actor share a GPU.",
    )
    in_flight: Literal["keep", "wait"] = Field(
        "keep", description="keep: running requests go on with the new weights; wait: they finish first."
    )
    probe_sequences: int = Field(8, ge=1, description="Sequences compared after every sync.")
    tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest |difference| of a probe log-probability, in nats; unset: 0.01 in "
        "float32, 0.25 in bfloat16.",
    )
    timeout_s: float = Field(
        120,
        gt=0,
        description="Deadline for one actor to load and prove new weights, in seconds; with "
        "`in_flight` wait, `rollout.generate_timeout_s` comes on top.",
    )
