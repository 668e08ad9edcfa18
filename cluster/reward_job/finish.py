"""From the members' weights and scores to a finished `reward_model/` folder.

members/member_K/ and member_K_scores.safetensors   while members are trained
reward_model/                                       at the end; it appears whole or not at all
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.reward_job.config import RewardJobConfig
from cluster.reward_job.inputs import TRAIN, RewardInputs
from learner.checkpoint import copy_tokenizer
from rewards.models.card import RewardCard, member_folder, write_card
from rewards.models.embedding import BACKBONE
from rewards.preferences.losses import length_residual_fit

REWARD_MODEL = "reward_model"
MEMBERS = "members"
Array = NDArray[np.float64]


class FlatRewardError(RuntimeError):
    """A member gives every response the same reward."""


def member_path(run_dir: Path, member: int) -> Path:
    """Where a trained member's weights wait for the end of the run."""
    return run_dir / MEMBERS / f"member_{member}"


def save_scores(run_dir: Path, member: int, scores: Sequence[float]) -> None:
    """Keep a member's raw scores of all sequences."""
    from safetensors.numpy import save_file

    path = _scores_path(run_dir, member)
    partial = path.with_name(f".{path.name}")
    save_file({"raw": np.asarray(scores, dtype=np.float64)}, partial)
    partial.chmod(0o600)
    partial.replace(path)


def load_scores(run_dir: Path, members: int) -> Array:
    """(K, all sequences) raw scores."""
    from safetensors.numpy import load_file

    return np.stack([load_file(_scores_path(run_dir, member))["raw"] for member in range(members)])


def _scores_path(run_dir: Path, member: int) -> Path:
    return run_dir / MEMBERS / f"member_{member}_scores.safetensors"


def finish(
    config: RewardJobConfig, inputs: RewardInputs, run_dir: Path, raw: Array
) -> tuple[Path, RewardCard]:
    """Put the reward model's folder together, under a temporary name; gives it with its card.

    `adopt` gives it its name, once it has been found to score as it was trained.
    """
    folder = run_dir / f".writing_{REWARD_MODEL}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    members = config.reward_model.members
    for member in range(members):
        _link(member_path(run_dir, member), member_folder(folder, member, members))
    if config.reward_model.kind == "embedding":
        backbone = folder / BACKBONE
        backbone.mkdir(mode=0o700)
        for path in sorted(inputs.model_path.iterdir()):
            if path.suffix == ".safetensors" or path.name.endswith(
                (".safetensors.index.json", "config.json")
            ):
                shutil.copyfile(path, backbone / path.name)
        copy_tokenizer(str(inputs.model_path), backbone, None)
        for path in backbone.iterdir():
            path.chmod(0o600)
    card = write_card(folder, make_card(config, inputs, raw), inputs.sets[TRAIN].prompts)
    return folder, card


def adopt(folder: Path, run_dir: Path) -> Path:
    """Give the finished folder its name; the members' own folders are then no longer needed."""
    final = run_dir / REWARD_MODEL
    shutil.rmtree(final, ignore_errors=True)
    folder.replace(final)
    shutil.rmtree(run_dir / MEMBERS, ignore_errors=True)
    return final


def make_card(config: RewardJobConfig, inputs: RewardInputs, raw: Array) -> RewardCard:
    """The card, with slopes and normalisation from (K, all sequences) raw scores."""
    settings = config.reward_model
    slope, mean, std = normalisation(raw, inputs, residual=settings.loss == "residual")
    return RewardCard(
        kind=settings.kind,
        loss=settings.loss,
        rule=settings.rule,
        coefficient=settings.coefficient,
        members=settings.members,
        mean=mean,
        std=std,
        length_slope=slope,
        text=inputs.text,
        labels=len(inputs.sets[TRAIN]),
        base_model=config.model.path or "from scratch",
        data=config.preferences.train,
        seed=config.run.seed,
    )


def normalisation(
    raw: Array, inputs: RewardInputs, *, residual: bool
) -> tuple[list[float], list[float], list[float]]:
    """(slope, mean, std) of each member over the distinct responses of the training pairs."""
    train, data = inputs.sets[TRAIN], inputs.data
    prompt_of: dict[int, int] = {}
    for pair, prompt in enumerate(data.prompt):
        prompt_of.setdefault(train.chosen[pair], prompt)
        prompt_of.setdefault(train.rejected[pair], prompt)
    responses = np.array(list(prompt_of), dtype=np.int64)
    length = np.array(data.lengths, dtype=np.float64)[responses]
    slopes, means, stds = [], [], []
    for member, row in enumerate(raw):
        rewards = row[responses]
        slope = 0.0
        if residual:
            slope, _ = length_residual_fit(
                torch.from_numpy(rewards), torch.from_numpy(length), torch.tensor(list(prompt_of.values()))
            )
        rest = rewards - slope * length
        if not rest.std() > 1e-9 * max(1.0, float(np.abs(rest).max())):
            raise FlatRewardError(
                f"member {member} gives all {len(rest)} training responses the same reward "
                f"({float(rest.mean()):.4g}): raise optimizer.lr or run.epochs, or look at the preferences"
            )
        slopes.append(float(slope))
        means.append(float(rest.mean()))
        stds.append(float(rest.std()))
    return slopes, means, stds


def _link(source: Path, target: Path) -> None:
    """The same files under another folder, without a copy where the file system allows it."""
    target.mkdir(mode=0o700, exist_ok=True)
    for path in source.iterdir():
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)
            (target / path.name).chmod(0o600)
