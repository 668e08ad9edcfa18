"""How `public_losses` calls TRL, verl and OpenRLHF: their own code with tensors in place of a model.

TRL's losses are methods of its trainers. Each gets an object with what the method reads, the real
`accelerate.Accelerator` among it, and a model that answers with the log-probabilities of the test.
"""

import importlib
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ACTOR = {"strategy": "fsdp", "ppo_mini_batch_size": 1, "ppo_micro_batch_size_per_gpu": 1}


@cache
def verl_core() -> Any:
    """verl.trainer.ppo.core_algos."""
    return importlib.import_module("verl.trainer.ppo.core_algos")


@cache
def openrlhf_losses() -> ModuleType:
    """openrlhf.models.loss, without the rest of the package, which wants flash-attention."""
    root = next(
        found
        for entry in sys.path
        for found in [Path(entry) / "openrlhf", *Path(entry).glob("openrlhf-*.data/purelib/openrlhf")]
        if (found / "models" / "loss.py").is_file()
    )
    package = ModuleType("openrlhf.models")
    package.__path__ = [str(root / "models")]
    sys.modules.setdefault("openrlhf", ModuleType("openrlhf"))
    sys.modules["openrlhf.models"] = package
    return importlib.import_module("openrlhf.models.loss")


def openrlhf_kl(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """OpenRLHF's estimator of the KL, a token."""
    openrlhf_losses()  # its package, without the rest
    utils = importlib.import_module("openrlhf.models.utils")
    return torch.as_tensor(utils.compute_approx_kl(logprobs, reference, kl_estimator=kind))


@cache
def _accelerator() -> Any:
    return importlib.import_module("accelerate").Accelerator(cpu=True)


def _trl(path: str, name: str) -> Any:
    return getattr(importlib.import_module(f"trl.{path}"), name)


def _trainer(**fields: Any) -> SimpleNamespace:
    """What the loss methods of every trainer read."""
    common: dict[str, Any] = {
        "accelerator": _accelerator(),
        "model": SimpleNamespace(training=False),
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_entropy_bonus_enabled": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(common | fields))


def _sampled(mask: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Responses to prompts of one token; the tokens' numbers do not matter, since no model reads them."""
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
    }


def _labelled(mask: Tensor) -> dict[str, Tensor]:
    """The same as one sequence each, which is how labelled responses come."""
    first = torch.zeros((len(mask), 1), dtype=torch.long)
    return {
        "input_ids": torch.zeros((len(mask), mask.shape[1] + 1), dtype=torch.long),
        "attention_mask": torch.cat([first + 1, mask.long()], 1),
        "completion_mask": torch.cat([first, mask.long()], 1),
    }


def trl_group(
    kind: str,
    new: Tensor,
    *,
    old: Tensor,
    reference: Tensor,
    mask: Tensor,
    advantages: Tensor,
    clip: tuple[float, float],
    beta: float = 0.0,
    sequence: bool = False,
) -> Tensor:
    """TRL's GRPOTrainer with `loss_type` = kind."""
    trainer = _trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if sequence else "token",
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=kind,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=mask.shape[1],
        use_adaptive_entropy=False,
    )
    inputs = _sampled(mask, advantages) | {
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = _trl("trainer.grpo_trainer", "GRPOTrainer")._compute_loss(trainer, None, inputs)
    return loss


def trl_rloo(new: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """TRL's RLOOTrainer."""
    trainer = _trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        epsilon_low=clip,
        epsilon_high=clip,
    )
    inputs = _sampled(mask, advantages) | {
        "old_logps": (old * mask).sum(1),
    }
    loss: Tensor = _trl("trainer.rloo_trainer", "RLOOTrainer")._compute_loss(trainer, None, inputs)
    return loss


def _answer(logprobs: Tensor) -> Any:
    """A model's outputs: a column for the first token, which nothing predicts, does not count."""
    zeros = torch.zeros_like(logprobs)
    fields = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
    return SimpleNamespace(log_probs=logprobs, **fields)


def trl_pairs(
    kind: str, new: Tensor, reference: Tensor, mask: Tensor, *, beta: float, smoothing: float = 0.0
) -> Tensor:
    """TRL's DPOTrainer with `loss_type` = kind; the first half of the rows are the chosen ones."""
    trainer = _trainer(
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    totals = (reference * mask).sum(1)
    half = len(totals) // 2
    inputs = _labelled(mask) | {
        "ref_chosen_logps": totals[:half],
        "ref_rejected_logps": totals[half:],
    }
    compute = _trl("trainer.dpo_trainer", "DPOTrainer")._compute_loss
    loss: Tensor = compute(trainer, lambda **_: _answer(new * mask), inputs, False)
    return loss


def trl_kto(
    new: Tensor,
    reference: Tensor,
    mask: Tensor,
    desirable: Tensor,
    mismatched: tuple[Tensor, Tensor],
    *,
    beta: float,
    weights: tuple[float, float],
) -> Tensor:
    """TRL's KTOTrainer; `mismatched` are log π and log π_ref of the responses to other prompts."""
    trainer = _trainer(
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda *_: mismatched[0],
    )
    inputs = _labelled(mask) | {
        "label": desirable,
        "ref_logps": (reference * mask).sum(1),
        "ref_KL_logps": mismatched[1],
    }
    compute = _trl("trainer.kto_trainer", "KTOTrainer")._compute_loss
    loss: Tensor = compute(trainer, lambda **_: _answer(new * mask), inputs, False)
    return loss


def trl_simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """TRL's CPOTrainer with `loss_type` = simpo, on means over a response's tokens."""
    trainer = _trainer(loss_type="simpo", alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=0.0)
    losses = _trl("experimental.cpo.cpo_trainer", "CPOTrainer").cpo_loss(trainer, chosen, rejected)[0]
    return torch.as_tensor(losses).mean()


def verl_config(clip: tuple[float, float], dual_clip: float) -> Any:
    """verl's ActorConfig with these bounds."""
    config = importlib.import_module("verl.workers.config").ActorConfig
    return config(
        **ACTOR,
        rollout_n=1,
        clip_ratio=clip[0],
        clip_ratio_low=clip[0],
        clip_ratio_high=clip[1],
        clip_ratio_c=dual_clip,
    )


def algorithm_config() -> Any:
    """verl's AlgoConfig without discount."""
    return importlib.import_module("verl.trainer.config").AlgoConfig(gamma=1.0, lam=1.0)
