"""What a user may set about the learner and PPO. No heavy imports here."""

from typing import Literal

from pydantic import Field, field_validator

from rewards.settings import Settings


class OptimizerSettings(Settings):
    """`[optimizer]`: Adam, its schedule and gradient clipping."""

    lr: float = Field(1e-5, gt=0, description="Peak learning rate of the policy.")
    critic_lr: float | None = Field(
        None, gt=0, description="Learning rate of the value model, head or own critic; unset: `lr`."
    )
    betas: list[float] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="Adam's betas, each at least 0 and below 1."
    )
    eps: float = Field(1e-5, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW).")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after warm-up.")
    warmup_updates: int = Field(0, ge=0, description="Optimizer updates of linear learning-rate warm-up.")
    min_lr_fraction: float = Field(0.0, ge=0, le=1, description="Where a decay ends, as a fraction of `lr`.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm.")

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, values: list[float]) -> list[float]:
        if any(not 0 <= value < 1 for value in values):
            raise ValueError("must be two numbers, each at least 0 and below 1")
        return values


class LearnerSettings(Settings):
    """`[learner]`: the DeepSpeed engine."""

    ranks: int = Field(1, ge=1, description="Data-parallel learner processes.")
    placement: Literal["pack", "spread", "strict_spread"] = Field(
        "pack",
        description="Ranks on as few hosts as can be, on as many, or each on a host of its own.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where Ray has a GPU.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Compute precision.")
    cores: float = Field(1, gt=0, description="CPU cores that each rank asks Ray for.")
    threads: int | None = Field(
        None, ge=1, description="torch threads of a rank; unset: `cores`, at least 1."
    )
    micro_batch_tokens: int = Field(4096, ge=1, description="Tokens of one forward and backward pass.")
    logprob_chunk_tokens: int = Field(1024, ge=1, description="Tokens whose logits exist at one time.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    cpu_offload: bool = Field(False, description="ZeRO 2 and 3 on CUDA: keep optimizer state on the CPU.")
    start_timeout_s: float = Field(300, gt=0, description="Deadline for all ranks to start, in seconds.")
    step_timeout_s: float = Field(1800, gt=0, description="Deadline for one learner step, in seconds.")


class PPOSettings(Settings):
    """`[ppo]`: proximal policy optimisation and its family; `objective` sets what you leave out."""

    advantage: Literal["gae", "reward_to_go", "group_mean", "group_std", "leave_one_out"] = Field(
        "gae",
        description="A of a token. gae: from the value model; reward_to_go: the rewards from the token on. "
        "The others compare a response's return with its group's. group_mean: R − mean; group_std: that over "
        "the standard deviation; leave_one_out: R − mean of the others.",
    )
    surrogate: Literal["token_clip", "sequence_clip", "geometric_clip", "cispo"] = Field(
        "token_clip",
        description="What is clipped. token_clip: a token's ratio ρ; sequence_clip: the product of a "
        "response's; geometric_clip: their geometric mean (GSPO); cispo: the weight of a token, which keeps "
        "its gradient.",
    )
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = Field(
        "token_mean",
        description="How tokens are added up. token_mean: over all tokens; sequence_mean: over a response's "
        "tokens, then over responses; sequence_sum: a response's sum, then the mean over responses; "
        "constant: that over `rollout.max_new_tokens`.",
    )
    epochs: int = Field(1, ge=1, description="Passes over each batch.")
    minibatches: int = Field(1, ge=1, description="Optimizer updates in a pass; must divide `batch_size`.")
    clip: float = Field(
        0.2, gt=0, le=1, description="ε: the ratio is clipped to [1−ε, 1+ε]; 1: not below, only above."
    )
    clip_high: float | None = Field(
        None, gt=0, description="ε_high: the ratio is clipped to 1+ε_high above; unset: `clip`."
    )
    clip_value: float = Field(0.2, ge=0, description="ε_v: range of the clipped value loss; 0: none.")
    dual_clip: float = Field(
        0.0, ge=0, description="c: bound −c·A of the loss where A < 0, above 1; 0: none."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="γ: discount a token.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="λ of generalised advantage estimation.")
    value_model: Literal["head", "critic", "none"] = Field(
        "head",
        description="head: a scalar head on the policy; critic: a model of its own; none: for every "
        "`advantage` but gae.",
    )
    value_coef: float = Field(
        0.1, ge=0, description="Weight of the value loss when the head shares the policy."
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    whiten_rewards: bool = Field(False, description="Scale token rewards to unit variance, mean kept.")
    whiten_advantages: bool = Field(True, description="Advantages to mean 0 and variance 1 over the batch.")
    group_epsilon: float = Field(
        1e-4, gt=0, description="ε of `advantage = group_std`: (R − mean)/(std + ε)."
    )
    overlong_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of `rollout.max_new_tokens`, at its end, over which a penalty for length grows; "
        "0: none.",
    )
    overlong_penalty: float = Field(
        1.0, gt=0, description="What a response of `rollout.max_new_tokens` loses by it, in reward."
    )
    kl_coef: float = Field(0.05, ge=0, description="β: weight of the KL penalty to the reference.")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="Where the penalty stands: part of each token's reward, or a term of the loss."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="With δ = log π − log π_ref, k1: δ; k2: δ²/2; k3: e^(−δ) − 1 + δ. Only k1 in the reward "
        "has the gradient of KL(π‖π_ref); docs/policy_gradients.md says what the others have.",
    )
    kl_control: Literal["fixed", "adaptive"] = Field("fixed", description="adaptive: β follows `kl_target`.")
    kl_target: float = Field(6.0, gt=0, description="Target KL of a sequence, in nats.")
    kl_horizon: int = Field(10_000, ge=1, description="Adaptive: samples over which β may change by a fifth.")

    @property
    def has_values(self) -> bool:
        """Whether a value model is trained."""
        return self.value_model != "none"

    @field_validator("dual_clip")
    @classmethod
    def _no_bound_below_the_clip(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("must be greater than 1, or 0 for no bound")
        return value


class CorrectionSettings(Settings):
    """`[correction]`: what is done about the difference between sampler and learner."""

    ratio: Literal["proximal", "behaviour"] = Field(
        "proximal",
        description="What the clipped ratio ρ is taken against. proximal: the learner at the start of its "
        "step, while `weights` correct for the sampler (decoupled PPO); behaviour: the sampler (coupled).",
    )
    weights: Literal["none", "tis", "icepop", "sequence"] = Field(
        "tis",
        description="Weight w of a token. tis: learner/sampler ratio, cut off at `cap`; icepop: the ratio, 0 "
        "outside its limits; sequence: the product of a sequence's ratios, cut off at `cap`.",
    )
    cap: float = Field(
        2.0, ge=1, description="C: largest weight of `tis` (2 is usual) or `sequence` (5 to 8)."
    )
    icepop_low: float = Field(0.5, ge=0, le=1, description="Smallest ratio that `icepop` keeps.")
    icepop_high: float = Field(5.0, ge=1, description="Largest ratio that `icepop` keeps.")
    mask: Literal["none", "sequence", "geometric", "m2po"] = Field(
        "none",
        description="What is left out of the policy's loss. sequence: sequences by the product of their "
        "ratios; geometric: by its geometric mean; m2po: harmful tokens by their squared log-ratio.",
    )
    sequence_cap: float = Field(
        3.0, ge=1, description="mask = sequence: largest product of a sequence's ratios that is kept."
    )
    geometric_low: float = Field(
        0.8, gt=0, le=1, description="mask = geometric: smallest geometric mean that is kept."
    )
    geometric_high: float = Field(
        1.25, ge=1, description="mask = geometric: largest geometric mean that is kept."
    )
    m2_budget: float = Field(
        0.04, gt=0, description="mask = m2po: largest mean squared log-ratio of the harmful tokens kept."
    )
    value_target: Literal["gae", "vtrace"] = Field(
        "gae",
        description="What the value model learns. gae: advantage plus value; vtrace: the same, weighted "
        "by truncated ratios.",
    )
    vtrace_rho: float = Field(1.0, ge=1, description="ρ̄ of V-trace: cap of the ratio on the TD error.")
    vtrace_c: float = Field(1.0, gt=0, description="c̄ of V-trace: cap of the ratio on the trace, times λ.")
    clip_by_lag: float = Field(
        0.0, ge=0, description="κ: a token of lag s is clipped at ε/(1 + κ·s) instead of `ppo.clip`; 0: at ε."
    )
    damp_lr_by_ess: Literal["none", "token", "sequence"] = Field(
        "none",
        description="Multiply the policy's learning rate by √min(1, (ESS/B)/ρ₀), with the ESS of raw token "
        "or sequence weights.",
    )
    damp_ess_target: float = Field(
        1.0, gt=0, le=1, description="ρ₀: share of effective samples from which the rate is not damped."
    )


class WarmupSettings(Settings):
    """`[warmup]`: supervised fine-tuning on demonstrations before reinforcement learning."""

    steps: int = Field(0, ge=0, description="Optimizer updates; 0: none.")
    data: str = Field(
        "", description="File of rows with `prompt` and `completion`; empty: the `[task]`'s own."
    )
    batch_size: int = Field(64, ge=1, description="Demonstrations an update.")
    lr: float = Field(
        1e-3, gt=0, description="Peak learning rate, linear warm-up over a tenth and cosine decay."
    )


class ScratchSettings(Settings):
    """`[model.scratch]`: shape of a Llama made from random weights, with a character tokenizer."""

    hidden_size: int = Field(128, ge=8, description="Width.")
    layers: int = Field(4, ge=1, description="Decoder layers.")
    heads: int = Field(4, ge=1, description="Attention heads; must divide `hidden_size`.")
    max_length: int = Field(128, ge=16, description="Longest sequence, in tokens.")
    tied_embeddings: bool = Field(False, description="Share input and output embeddings.")


class ModelSettings(Settings):
    """`[model]`: a folder or hub name, or a tiny model from scratch."""

    path: str = Field("", description="Folder or hub name of a causal language model with its tokenizer.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    reference: str = Field("", description="Frozen reference; empty: the policy as it is before PPO.")
    critic: str = Field("", description="Start of an own critic; empty: the policy's weights.")
    max_length: int | None = Field(
        None, ge=2, description="Prompt plus response; unset: the model's own limit."
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa",
        description="Attention kernel. A model that caps its attention scores, as Gemma 2 does, runs with "
        "eager instead of sdpa, which cannot.",
    )
    scratch: ScratchSettings | None = Field(None, description="Build a small Llama instead of loading one.")
