"""The data that travels between processes: frozen, slotted, standard library only.

Legend: a *token version* is the number of learner steps that the weights which sampled the token had
taken; *log μ* is the sampler's log-probability, in nats, at the sampling temperature.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the policy sees it.

    `id` is unique in the data (`train:17` is row 17); `token_ids` includes any special tokens that the
    template adds; `text` is what is shown of it. `row` is the data row it came from and `source` the prompt
    in it (a text or chat messages); both are handed to rewards unchanged.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    row: Mapping[str, Any] = field(default_factory=dict)
    source: str | list[dict[str, Any]] = ""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """`group_size` samples wanted for a prompt; `group_id` is unique within a run."""

    group_id: int
    prompt: Prompt
    group_size: int
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response.

    `token_ids`, `logprobs` (log μ) and `versions` have one entry per response token. The end token, where
    the policy sampled one (`finish_reason == "stop"`), is the last of them; `text` leaves it out.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.logprobs), len(self.versions)}
        if len(lengths) != 1 or not self.token_ids:
            raise ValueError(f"a completion needs one log-probability and version per token, got {lengths}")

    @property
    def finished(self) -> bool:
        """Whether the policy ended the response itself, rather than being cut off."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """All samples of one request, and the actor that drew them.

    `evaluation`: it belongs to a held-out evaluation, so that rewards of role `evaluate` score it too.
    """

    group_id: int
    prompt: Prompt
    completions: tuple[Completion, ...]
    actor: str
    seconds: float
    evaluation: bool = False

    @property
    def oldest_version(self) -> int:
        """The lowest version among all tokens of the group."""
        return min(min(completion.versions) for completion in self.completions)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A completion with its reward and the frozen reference's log-probabilities (one per token).

    `components` has every reward that was asked, by label; those of role `evaluate` are no part of `reward`.
    """

    completion: Completion
    reward: float
    components: Mapping[str, float]
    reference_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A scored group, ready to be trained on."""

    group_id: int
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    actor: str
    sample_seconds: float
    score_seconds: float

    @property
    def oldest_version(self) -> int:
        """The lowest version among all tokens of the group."""
        return min(min(t.completion.versions) for t in self.trajectories)


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """What scoring answers when a reward raised, hung or was not a finite number: the group is left out."""

    group_id: int
    prompt_id: str
    reward: str
    reason: str


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """Where the weights of a version are, and what the probe batch must give with them.

    `payload` is what the transfer backend reads (for `shared`: path, size and SHA-256 of a safetensors
    file in shared memory, and where another host finds the bytes). `probe_logprobs[i][t]` is the learner's
    log-probability of token `t + 1` of `probe_token_ids[i]`, so each is one shorter than its sequence.
    """

    version: int
    payload: Mapping[str, Any]
    probe_token_ids: tuple[tuple[int, ...], ...]
    probe_logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class DiscriminatorUpdate:
    """Where a version of the discriminator is, and what the probe must give with it.

    The version counts learner steps. `payload` is that of a `WeightUpdate` of backend `shared`, `config` the
    model's configuration as JSON; `probe_logits` has the learner's logit of each sequence of the probe.
    """

    version: int
    payload: Mapping[str, Any]
    config: str
    probe_token_ids: tuple[tuple[int, ...], ...]
    probe_logits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DiscriminatorProof:
    """A scoring actor's answer to a version of the discriminator that it loaded and proved."""

    actor: str
    version: int
    probe_max_difference: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SyncProof:
    """An actor's answer to a weight update that it loaded and proved."""

    actor: str
    version: int
    probe_max_abs_diff: float
    load_seconds: float
    probe_seconds: float
    requests_in_flight: int
