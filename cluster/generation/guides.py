"""Which guide an engine gets: found out, and refused where it cannot work, before an actor starts."""

from collections.abc import Sequence
from pathlib import Path

from actors.decoding.settings import GuideSpec
from actors.end_tokens import end_tokens
from actors.records import Prompt
from cluster.config import JobConfig
from cluster.generation.policy import Policy, checkpoint_folder
from cluster.generation.settings import Judges
from cluster.prepare import load_model_config
from rewards.model_reward import model_folder
from rewards.models.card import RewardCard, member_folder, read_card
from rewards.models.text import EncodingError, RewardEncoder
from rewards.models.transformer import load_tokenizer

HEAD = "value_head.safetensors"


def reward_guide(
    config: JobConfig, judges: Judges, policy: Policy, prompts: Sequence[Prompt], directory: Path
) -> GuideSpec:
    """Rewards on prefixes; a single reward model that reads the policy's tokens is asked token by token."""
    trained = judges.trained
    ends = sorted(end_tokens(str(policy.path)))
    spec = GuideSpec(
        kind="reward_text",
        ends=ends,
        precision=config.learner.precision,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        rewards=trained,
        task=judges.task,
        directory=str(directory),
        timeout_s=judges.scoring.reward_timeout_s,
        memory_gib=judges.scoring.reward_memory_gib,
        environment=judges.scoring.reward_env,
    )
    if len(trained) != 1 or trained[0].kind != "model":
        return spec
    folder = model_folder(trained[0].path, directory)
    card = read_card(folder, check_version=False)
    if card.kind != "transformer" or not card.text.end_token:
        return spec
    tokenizer = load_tokenizer(member_folder(folder, 0, card.members))
    if not policy.tokenizer.get_vocab().items() <= tokenizer.get_vocab().items():
        return spec  # it may have more tokens: one for padding is added to a policy's that has none
    reads, writes = (
        load_model_config(field, place).get_text_config().vocab_size
        for field, place in (
            ("--reward-model", member_folder(folder, 0, card.members)),
            ("--policy", policy.path),
        )
    )
    if reads < writes:  # a policy's vocabulary may be padded beyond its tokenizer's
        return spec
    _check_room(card, folder, prompts, config.rollout.max_new_tokens)
    encoder = RewardEncoder(tokenizer, card.text)
    if not all(_reads_the_same(encoder, prompt) for prompt in prompts):
        return spec
    return spec.model_copy(update={"kind": "reward_tokens", "end_token": int(tokenizer.eos_token_id)})


def _reads_the_same(encoder: RewardEncoder, prompt: Prompt) -> bool:
    """Whether the reward model reads a prompt in the tokens that the policy reads."""
    try:
        return encoder.encode(prompt.source or prompt.text, "", True)[:-1] == list(prompt.token_ids)
    except EncodingError:
        return False


def _check_room(card: RewardCard, folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + new_tokens > card.text.max_length:
        raise ValueError(
            f"--reward-model {folder}: it reads {card.text.max_length} tokens at most, and the longest "
            f"prompt has {longest} beside --max-new-tokens {new_tokens}: lower that, or leave out long "
            "prompts with --set data.max_prompt_tokens=…"
        )


def value_guide(config: JobConfig, policy: Policy, folder: Path) -> GuideSpec:
    """The critic that a checkpoint holds: one of its own, or the value head on the policy."""
    place = checkpoint_folder(folder)
    if place.name == "policy" and (place.parent / "learner.json").is_file():
        place = place.parent
    own, shared = place / "critic", place / HEAD
    if (own / HEAD).is_file():
        backbone, head = own, own / HEAD
    elif shared.is_file():
        backbone, head = place / "policy", shared
    else:
        raise ValueError(
            f"--value {folder}: there is no {HEAD} in {place}; give a run that was trained by PPO, or one of "
            "its checkpoints"
        )
    theirs = load_model_config("--value", backbone).get_text_config()
    mine = load_model_config("--policy", policy.path).get_text_config()
    if theirs.vocab_size != mine.vocab_size:
        raise ValueError(
            f"--value {folder}: the critic has a vocabulary of {theirs.vocab_size} tokens, the policy one of "
            f"{mine.vocab_size}: give the critic of a policy with the same tokenizer"
        )
    limit = getattr(theirs, "max_position_embeddings", None)
    if limit is not None and limit < policy.max_length:
        raise ValueError(
            f"--value {folder}: the critic reads {limit} tokens, the policy {policy.max_length}: lower the "
            f"latter with --set model.max_length={limit}"
        )
    ends = sorted(end_tokens(str(policy.path)))
    return GuideSpec(
        kind="value",
        ends=ends,
        end_token=ends[0],
        precision=config.learner.precision,
        backbone=str(backbone),
        head=str(head),
    )
