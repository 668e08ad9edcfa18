"""Every metric of a run: what it is, its unit, what is healthy, and what to do when it is not.

A name with `<…>` stands for a family: `reward/<label>` explains `reward/exact`. To add a metric, add a line
here and write docs/metrics.md anew with `python -m cluster.metrics`.
"""

# ruff: noqa: E501 - a table reads best with one entry a line

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Metric:
    """One name, or one family of names."""

    name: str
    meaning: str
    unit: str
    healthy: str
    action: str


SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Axes and counters": (
        Metric("learner_step", "Learner steps finished, 0 before training: the axis of all else.", "steps", "rises by 1", "Stands still: the row of the last step says what it waits for (`wait/by_cause/<cause>`)."),
        Metric("warmup/step", "Updates of the supervised warm-up: the axis of `warmup/*`.", "updates", "rises by 1", "Stands still: look at `events.log` and the learner's log in `ray-logs`."),
        Metric("iteration", "Which iteration an update belongs to, from 1 on (`objective` spin or rejection).", "iterations", "rises", "Stands still: look at `events.log`."),
        Metric("epoch", "Passes over the training prompts so far: whole ones + place in the present one / prompts.", "passes", "below 3", "Far above 1: the policy may learn prompts by heart; watch `heldout/reward`."),
        Metric("tokens_generated", "Response tokens sampled so far for training, the discarded ones included.", "tokens", "close to `tokens_trained`", "A wide gap: groups are dropped or sampled again."),
        Metric("tokens_trained", "Response tokens trained on so far.", "tokens", "rises", "Stands still while `tokens_generated` rises: groups are left out, see `events.log`."),
        Metric("reward_errors", "Groups left out so far because a reward raised, hung or was not finite.", "groups", "0", "Read the reasons in events.log and mend the reward."),
        Metric("dynamic/groups_left_out", "Groups left out so far by `rollout.dynamic_sampling`: all their samples had the same reward.", "groups", "rises slowly", "As `dynamic/kept_fraction`."),
        Metric("dynamic/kept_fraction", "Share of the groups scored since the last step that dynamic sampling kept.", "share", "above 0.3", "Near 0: prompts are too easy or too hard; choose others, or raise `rollout.group_size`."),
    ),
    "Reward": (
        Metric("reward/mean", "Mean reward of the trained samples: Σ weight · component, less the penalty for a missing end.", "reward", "rises, then levels off", "Flat: see `reward/std`, `ppo/clip_fraction` and `kl/sequence`. Rising while `heldout/reward` falls: overfitting."),
        Metric("reward/std", "√(Σ (r − r̄)² / n) of the reward r over the n trained samples.", "reward", "above 0", "0: all samples score alike and nothing can be learned; choose easier or harder prompts."),
        Metric("reward/min", "Smallest reward of the trained samples.", "reward", "within the reward's range", "Far outside: the reward has an outlier; look at `samples.jsonl`."),
        Metric("reward/max", "Largest reward of the trained samples.", "reward", "within the reward's range", "Far outside: the reward has an outlier, or is gamed; look at `samples.jsonl`."),
        Metric("group/uniform_fraction", "Share of groups whose rewards are all equal: a group baseline learns nothing from them.", "share", "below 0.5", "High: choose prompts that are neither too easy nor too hard, or raise `rollout.group_size`."),
        Metric("length/overlong_penalty", "Mean over samples of what `ppo.overlong_fraction` takes from the reward for length; `reward/mean` is before it.", "reward", "near 0", "Far below: responses run into `rollout.max_new_tokens`; raise it."),
        Metric("reward/<label>", "Mean over the samples that have it of one `[[reward]]`, before its weight.", "reward", "as `reward/mean`", "One part rises while another falls: balance their weights."),
        Metric("reward/<label>/<key>", "Mean of a number that your reward function returned beside its reward.", "–", "as your function means it", "You gave it: it is logged, and used for nothing."),
        Metric("heldout/reward", "Mean over held-out prompts of the mean reward of their `run.evaluate_samples` responses, sampled at the training temperature.", "reward", "rises with `reward/mean`", "Falls: stop earlier, raise `ppo.kl_coef`, or add prompts."),
        Metric("heldout/reward_ci95", "Half width of the 95 % t interval of `heldout/reward`: t(0.975, n − 1) · s / √n over n prompts.", "reward", "small beside the gain", "Raise `run.evaluate_prompts`."),
        Metric("heldout/kl_sequence", "Mean over held-out samples of Σ_t (log π − log π_ref), k1.", "nats a sequence", "as `kl/sequence`", "As `kl/sequence`."),
        Metric("heldout/response_tokens", "Mean length of a held-out response.", "tokens", "steady", "As `length/mean`."),
        Metric("heldout/reward_errors", "Held-out prompts left out because their reward failed.", "prompts", "0", "As `reward_errors`."),
        Metric("heldout/kl_sequence_k3", "Mean over held-out samples of Σ_t (e^(−δ) − 1 + δ), δ = log π − log π_ref: the same KL, never negative.", "nats a sequence", "as `heldout/kl_sequence`", "Far from it: few samples carry the estimate; raise `run.evaluate_samples`."),
        Metric("heldout/entropy", "−mean log π of the sampled held-out tokens, an estimate of the policy's entropy.", "nats a token", "as `policy/entropy`", "As `policy/entropy`."),
        Metric("heldout/finished_fraction", "Share of held-out responses that the policy ended itself.", "share", "near 1", "As `length/finished_fraction`."),
        Metric("heldout/pass_at/<k>_ci95", "Half width of the 95 % t interval of `heldout/pass_at/<k>` over prompts.", "share", "small beside its changes", "Raise `run.evaluate_prompts`."),
        Metric("heldout/pass_at/<k>", "pass@k: mean over held-out prompts of 1 − C(n − c, k) / C(n, k), where c of the n = `run.evaluate_samples` responses reach `run.pass_threshold`.", "share", "rises", "k = 1 rises while large k falls: the policy narrows; raise `ppo.entropy_coef` or `ppo.kl_coef`."),
        Metric("heldout/reward/<label>", "Mean over held-out prompts of one `[[reward]]` that is trained on, before its weight.", "reward", "rises with `reward/<label>`", "As `reward/<label>`."),
        Metric("heldout/reward/<label>/<key>", "Mean of a number that this reward gives beside its value; `std`: the disagreement of a reward model's members.", "–", "steady", "A `std` that rises: the members disagree more; see `overoptimisation/disagreement`."),
        Metric("heldout/<label>_ci95", "Half width of the 95 % t interval of `heldout/<label>` over prompts.", "reward", "small beside its changes", "As `heldout/reward_ci95`."),
        Metric("heldout/<label>", "Mean over held-out prompts of a `[[reward]]` with `role = \"evaluate\"`, which is never trained on.", "reward", "rises with `heldout/reward`", "Falls while `heldout/reward` rises: the reward is being gamed; see docs/overoptimisation.md."),
        Metric("heldout/<label>/<key>", "Mean of a number that this reward gives beside its value; `std`: the disagreement of a reward model's members.", "–", "steady", "A `std` that rises: the members disagree more; see `overoptimisation/disagreement`."),
    ),
    "Over-optimisation": (
        Metric("overoptimisation/kl_sqrt", "√max(0, `heldout/kl_sequence`): the axis on which over-optimisation is drawn.", "√nats", "rises slowly", "As `kl/sequence`."),
        Metric("overoptimisation/proxy", "What is optimised: the training reward on held-out prompts, `heldout/reward`.", "reward", "rises", "Rises while `overoptimisation/heldout` falls: the reward is being gamed (docs/overoptimisation.md)."),
        Metric("overoptimisation/heldout", "What stands by: mean over held-out prompts of the held-out reward models (`role = \"evaluate\"`), averaged.", "reward", "rises with the proxy", "Falls for several evaluations: stop, go back to `checkpoints/best.json`, raise `ppo.kl_coef`."),
        Metric("overoptimisation/heldout_ci95", "Half width of its 95 % t interval over prompts.", "reward", "small beside its changes", "As `heldout/reward_ci95`."),
        Metric("overoptimisation/gold", "The gold reward, where one is known: `role = \"evaluate\"` and kind `task` or name `gold`. No rule sees it.", "reward", "rises with the proxy", "Falls while the proxy rises: the proxy is being gamed."),
        Metric("overoptimisation/gold_ci95", "Half width of its 95 % t interval over prompts.", "reward", "small beside its changes", "As `heldout/reward_ci95`."),
        Metric("overoptimisation/gap", "(gain of the proxy − gain of the held-out reward), each since the first evaluation and in standard deviations over the responses of that evaluation.", "standard deviations", "below 1", "Above: the proxy rises where the held-out reward does not follow."),
        Metric("overoptimisation/disagreement", "Mean over held-out responses of the standard deviation of a trained reward model's members.", "reward", "as in the first evaluation", "Twice that: the policy is where the reward model has seen no labels; collect some there."),
    ),
    "Adversarial imitation": (
        Metric("loss/discriminator", "½ mean ℓ over demonstrations + ½ mean ℓ over responses, ℓ = −t log D − (1 − t) log(1 − D), t the label after smoothing; log 2 without an opinion.", "nats a sequence", "a little below 0.69", "Near 0: it tells all apart and its rewards hardly differ; raise `discriminator.label_smoothing` or `gradient_penalty`, lower `discriminator.lr`."),
        Metric("discriminator/accuracy", "Mean of its accuracies on demonstrations and on all responses of an update, before that update; a logit of 0 counts half.", "share", "0.55 to 0.9", "Near 1: as `loss/discriminator`. Near 0.5: the policy imitates well, or raise `discriminator.lr` or `discriminator.updates`."),
        Metric("discriminator/accuracy_demonstrations", "Share of the update's demonstrations with a logit above 0.", "share", "as `discriminator/accuracy`", "Far above `discriminator/accuracy_heldout`: it learns them by heart."),
        Metric("discriminator/accuracy_fresh", "Share of this step's responses with a logit below 0, before any of them was learned from.", "share", "as `discriminator/accuracy`", "As `discriminator/accuracy`."),
        Metric("discriminator/accuracy_replayed", "The same of replayed responses of earlier steps.", "share", "at least `discriminator/accuracy_fresh`", "Below it: it has forgotten them; raise `discriminator.replay`."),
        Metric("discriminator/accuracy_heldout", "Share of demonstrations that it never learns from with a logit above 0.", "share", "as `discriminator/accuracy_demonstrations`", "Far below: it learns by heart; fewer updates, more demonstrations, `discriminator.gradient_penalty`."),
        Metric("discriminator/logit_<kind>", "Mean logit d = log D − log(1 − D) of an update's demonstrations, of fresh responses, or of held-out demonstrations.", "nats", "demonstrations above, fresh below 0, a few nats apart", "Many nats apart: as `loss/discriminator`."),
        Metric("discriminator/calibration_error", "Σ_b n_b/n · |mean D − share of demonstrations| over 10 bins of D, on an update's sequences.", "share", "below 0.1", "High: its logits overstate what it knows; lower `discriminator.lr`."),
        Metric("discriminator/gradient_penalty", "γ/2 · mean over an update's sequences of ‖∂logit/∂embeddings‖².", "–", "small beside `loss/discriminator`", "Large: lower `discriminator.gradient_penalty`."),
        Metric("discriminator/score_lag_<statistic>", "Mean or largest age of the discriminators that scored the trained samples: step − version of the score.", "steps", "0 to `scheduler.window` + 1", "Large: groups wait long for training; lower `scheduler.window`."),
        Metric("discriminator/replay_size", "Responses of earlier steps that are kept.", "responses", "rises to `discriminator.replay_size`", "Stays below: steps are few; nothing to do."),
        Metric("discriminator/epoch", "Passes over the demonstrations so far.", "passes", "below 10", "Far above 1: watch `discriminator/accuracy_heldout`."),
        Metric("discriminator/lr", "Learning rate of the discriminator.", "–", "as set", "Change `discriminator.lr`."),
        Metric("discriminator/grad_norm", "Global norm of its gradient before clipping, mean over the step's updates.", "–", "steady", "Spikes: lower `discriminator.lr`."),
        Metric("discriminator/probe_max_difference", "Largest |difference| / max(1, |logit|) of a probe logit, scoring actor against learner, over the versions loaded since the last step.", "–", "near 0", "Above the proof's tolerance the run stops and names the actor."),
    ),
    "Reward models": (
        Metric("loss/reward_model", "What the gradient is taken of in a reward model's training: loss/preference and, as set, centring or ODIN's terms.", "nats a pair", "falls, then levels off", "Flat: raise `optimizer.lr` or check the labels."),
        Metric("loss/preference", "−mean log σ(r_w − r_l − m) of the batch's pairs; with `classification`, of single responses. With `objective` dpo, ipo, kto or simpo: that objective's loss.", "nats a pair", "below where it begins, which is guessing (0.69 = log 2 for likelihoods)", "Falls while `preference/heldout_loss` rises: overfitting; fewer epochs."),
        Metric("loss/centring", "c · mean (r_w + r_l)².", "–", "small beside `loss/preference`", "Large: lower `reward_model.centring`."),
        Metric("loss/odin", "ODIN's correlations and the overlap of its heads, weighted.", "–", "falls", "Rises: lower `optimizer.lr`, or the weight of its parts."),
        Metric("odin/correlation_quality", "Correlation of the quality head with length, over the batch.", "–", "near 0", "Away from 0: raise `reward_model.odin_length` or the batch."),
        Metric("odin/correlation_length", "Correlation of the length head with length, over the batch.", "–", "near 1", "As `odin/correlation_quality`."),
        Metric("preference/accuracy", "Share of the batch's pairs whose chosen response scores higher; ties are wrong. With kto: share of responses on their label's side of `preference/reference_point`.", "share", "rises above 0.5", "Far above `preference/heldout_accuracy`: overfitting."),
        Metric("preference/margin", "Mean of r_w − r_l; with kto, mean of the good responses less mean of the bad ones.", "reward", "rises", "Flat: raise `optimizer.lr` or `run.epochs`; enormous: the labels are learned by heart, lower them."),
        Metric("preference/reward", "Mean of (r_w + r_l) / 2.", "reward", "near 0 with centring", "Wanders off: raise `reward_model.centring`."),
        Metric("preference/<side>_reward", "Mean implicit reward of the batch's chosen or rejected responses: β·(log π − log π_ref), τ in place of β with ipo, β·log π / |y| with simpo.", "reward", "chosen above rejected", "Both far below 0: the policy leaves both behind; lower `optimizer.lr` or raise β."),
        Metric("preference/<side>_logprob", "Mean log π(y|x) of the batch's chosen or rejected responses, summed over tokens.", "nats a response", "chosen steady or falling slowly", "Chosen falls steeply: raise β, lower `optimizer.lr` or `run.epochs`."),
        Metric("preference/reference_point", "KTO's z₀: max(0, mean of log π − log π_ref over responses put to other prompts).", "nats a response", "rises slowly from 0", "Far up: the policy drifts everywhere; lower `optimizer.lr`."),
        Metric("preference/heldout_<figure>", "A figure of `preference/` on held-out examples.", "–", "as its namesake", "As its namesake."),
        Metric("preference/heldout_accuracy", "The accuracy on held-out pairs.", "share", "rises above 0.5", "Falls: fewer epochs, more labels."),
        Metric("preference/heldout_loss", "Mean of −log σ(r_w − r_l) on held-out pairs; with `objective` dpo, ipo, kto or simpo: that objective's loss.", "nats a pair", "falls", "Rises: overfitting; fewer epochs."),
    ),
    "Iterated imitation": (
        Metric("rejection/best_reward", "Mean over the iteration's prompts of the best of their samples' rewards.", "reward", "above `reward/mean`, and rises with it", "Equal to `reward/mean`: samples are all alike, nothing is left to choose; raise `rollout.temperature`."),
        Metric("rejection/kept_reward", "Mean reward of the samples that are imitated.", "reward", "above `reward/mean`", "Near it: samples hardly differ; raise `rollout.group_size` or the temperature."),
        Metric("rejection/kept", "Samples that the iteration imitates.", "samples", "several times `run.batch_size`", "Few: lower `rejection.minimum`, raise `run.prompts` or `rollout.group_size`."),
        Metric("rejection/kept_fraction", "Share of the iteration's samples that are imitated.", "share", "near `rejection.keep` / `rollout.group_size`", "As `rejection/kept`."),
        Metric("rejection/prompts_fraction", "Share of the iteration's prompts with a sample that is imitated.", "share", "near 1", "Low: the policy learns from prompts that it can do already; raise `rollout.group_size`."),
        Metric("spin/same_fraction", "Share of the iteration's samples that are token for token the demonstration of their prompt.", "share", "below 1", "Near 1: the policy knows the demonstrations; there is nothing more to contrast."),
        Metric("spin/finished_fraction", "Share of the iteration's samples that the policy ended itself.", "share", "near 1", "Low: raise `rollout.max_new_tokens`, or warm up for longer."),
        Metric("spin/sampled_tokens", "Mean length of the iteration's samples, the end token included.", "tokens", "near `spin/demonstrated_tokens`", "Far apart: length gives samples away; the policy learns it first."),
        Metric("spin/demonstrated_tokens", "Mean length of the demonstrations that they stand against.", "tokens", "as `spin/sampled_tokens`", "Far apart: length alone tells them apart; see docs/imitation_iterated.md."),
    ),
    "Online DPO": (
        Metric("online_dpo/pairs", "Pairs of the step: groups whose best and worst reward differ by more than `online_dpo.least_gap`.", "pairs", "most groups", "Few: see `online_dpo/tied_groups`."),
        Metric("online_dpo/tied_groups", "Groups of the step without a pair.", "groups", "few", "Many: raise `rollout.group_size` or the temperature, or choose prompts of another difficulty."),
        Metric("online_dpo/reward_gap", "Mean over pairs of the reward of the better response less that of the worse.", "reward", "above 0", "Near 0: samples of a prompt score alike; raise the temperature or `rollout.group_size`."),
        Metric("online_dpo/length_gap", "Mean over pairs of the tokens of the better response less those of the worse.", "tokens", "near 0", "Far above 0: what is labelled better is longer, and the policy will learn that."),
    ),
    "Distance to the reference": (
        Metric("kl/sequence", "Mean over the trained samples of Σ_t (log π − log π_ref), k1. With lag they come from older weights, so it can fall below 0 early on; `heldout/kl_sequence` cannot, up to noise.", "nats a sequence", "a few nats, rising slowly", "Runs away: raise `ppo.kl_coef` or use `kl_control = \"adaptive\"`."),
        Metric("kl/token", "Mean over tokens of log π − log π_ref, k1.", "nats a token", "0 to 0.5", "As `kl/sequence`."),
        Metric("kl/token_k3", "Mean over tokens of e^(−δ) − 1 + δ, δ = log π − log π_ref: never negative, less noisy.", "nats a token", "0 to 0.5", "As `kl/sequence`."),
        Metric("kl/coef", "β, the weight of the KL penalty, inside the reward or in the loss.", "reward a nat", "steady or slowly moving", "Adaptive and at an extreme: `ppo.kl_target` is out of reach."),
        Metric("kl/penalty", "Mean over samples of β · KL, k1; with `kl_in = \"reward\"` and k1 it is what the reward lost to it.", "reward", "below the gain in reward", "Above it: lower `ppo.kl_coef`."),
    ),
    "Policy and value": (
        Metric("policy/entropy", "Mean over response tokens of the entropy of π(·|s), −Σ_a π log π.", "nats a token", "falls slowly, stays above 0", "Collapses: raise `ppo.entropy_coef` or `ppo.kl_coef`, lower `optimizer.lr`."),
        Metric("loss/policy", "−mean w · min(ρA, clip(ρ, 1 ± ε)A) over response tokens, w the correction for lag; with other objectives, see `ppo.surrogate` and `ppo.aggregation`.", "–", "near 0; its sign means nothing", "Not finite: the step is refused; lower `optimizer.lr`."),
        Metric("loss/kl", "The KL penalty's estimator, aggregated as the policy's loss (`kl_in = \"loss\"` only); β times it is in loss/total.", "nats", "steady", "As `kl/sequence`."),
        Metric("loss/value", "½ mean max((V − R)², (clip(V, V_old ± ε_v) − R)²).", "reward²", "falls, then levels off", "Grows: lower `optimizer.critic_lr` or `ppo.value_coef`."),
        Metric("loss/supervised", "−mean log π of demonstrated tokens.", "nats a token", "falls", "Flat: raise `warmup.lr` or `warmup.steps`."),
        Metric("loss/total", "What the policy's gradient is taken of: loss/policy − entropy_coef · entropy, + β · loss/kl with a penalty in the loss, + value_coef · loss/value with a value head.", "–", "finite; its size means nothing", "Not finite: the step is refused; lower `optimizer.lr`."),
        Metric("ppo/ratio_mean", "Mean of ρ = π / π_old over tokens.", "–", "0.95 to 1.05", "Further off: lower `optimizer.lr` or `ppo.epochs`."),
        Metric("ppo/ratio_max", "Largest ρ of a token, over all updates of the step.", "–", "below 5", "As `ppo/ratio_mean`."),
        Metric("ppo/first_ratio_deviation", "max |ρ − 1| in the first minibatch, before any update.", "–", "0 up to rounding", "Otherwise the two forward passes differ: a defect. Please report it."),
        Metric("ppo/clip_fraction", "Share of tokens whose clipped term decides: clip(ρ)A < ρA.", "share", "0.01 to 0.3", "0: the step is timid; above: lower `optimizer.lr` or `ppo.epochs`."),
        Metric("ppo/value_clip_fraction", "Share of tokens whose clipped value decides: (clip(V) − R)² > (V − R)².", "share", "below 0.3", "Above: raise `ppo.clip_value` to the scale of the returns."),
        Metric("ppo/approx_kl", "KL(π_old‖π) of the update: mean over tokens of ρ − 1 − log ρ (k3).", "nats a token", "below 0.05", "Above: lower `optimizer.lr` or `ppo.epochs`."),
        Metric("value/explained_variance", "1 − Var(R − V) / Var(R) over response tokens; 0 where all returns are the same.", "share", "rises towards 1", "Below 0: the value model is worse than a constant; raise `optimizer.critic_lr`."),
        Metric("value/mean", "Mean value estimate over response tokens.", "reward", "near the mean return", "Far from it: raise `ppo.value_coef` or the critic's rate."),
        Metric("advantage/<statistic>", "Mean or standard deviation of the advantages A over response tokens, before whitening.", "reward", "mean near 0", "A mean far from 0: the baseline is off; see `value/explained_variance`."),
        Metric("return/<statistic>", "Mean or standard deviation over response tokens of the returns R.", "reward", "as the reward", "Far from it: the KL penalty rules; lower `ppo.kl_coef`."),
        Metric("optimizer/lr", "Learning rate of the policy.", "–", "follows the schedule", "Change `optimizer.lr` or `optimizer.schedule`."),
        Metric("optimizer/critic_lr", "Learning rate of the value model, head or own critic.", "–", "follows the schedule", "Change `optimizer.critic_lr`."),
        Metric("optimizer/grad_norm", "Global norm √Σ g² of the policy's gradient before clipping, mean over the step's updates.", "–", "steady", "Spikes: lower `optimizer.lr`. Always above `max_grad_norm`: every step is scaled down."),
        Metric("optimizer/critic_grad_norm", "The same of an own critic's gradient.", "–", "steady", "As `optimizer/grad_norm`."),
        Metric("optimizer/updates", "Optimizer updates so far.", "updates", "rises", "Rises by less than `ppo.epochs` · `ppo.minibatches` a step: updates were refused, see `events.log`."),
    ),
    "Responses": (
        Metric("length/mean", "Mean length of the trained responses, the end token included.", "tokens", "steady, or moving with the task", "Grows without reward: raise `scoring.missing_eos_penalty`."),
        Metric("length/max", "Longest trained response.", "tokens", "below `rollout.max_new_tokens`", "At the limit: see `length/finished_fraction`."),
        Metric("length/sampled_mean", "Mean length of all responses sampled so far.", "tokens", "as `length/mean`", "Above it: long samples are left out or come late; see `length/bias`."),
        Metric("length/sampled_<quantile>", "Quantile (p50, p90, p99) of the length of all responses sampled so far.", "tokens", "p90 as `length/trained_p90`", "As `length/sampled_mean`."),
        Metric("length/trained_p90", "90 % quantile of the length of all responses trained on so far.", "tokens", "near `length/sampled_p90`", "As `length/bias`."),
        Metric("length/bias", "(mean length trained − mean length sampled) / mean length sampled, over the whole run.", "share", "0, in the first steps a little below", "Stays below 0: long answers are left out. Nothing is dropped for age, so look for reward errors."),
        Metric("length/prompt_bias", "The same of prompts: trained against dispatched.", "share", "0", "As `length/bias`."),
        Metric("length/finished_fraction", "Share of trained responses that the policy ended itself, with an end token.", "share", "near 1", "Low: raise `rollout.max_new_tokens` or `scoring.missing_eos_penalty`."),
    ),
    "Lag and mismatch": (
        Metric("lag/mean", "Mean over trained tokens of the learner's step minus the version that sampled them.", "steps", "0 to `scheduler.window`", "Near the bound all the time: lower `scheduler.window`, or take fewer actors."),
        Metric("lag/in_flight_mean", "The part of `lag/mean` that arose while the group was sampled and scored: mean over tokens of steps finished when it was ready − version.", "steps", "below 1", "Large: responses are long beside a step; raise `rollout.actors`."),
        Metric("lag/in_queue_mean", "The part of `lag/mean` that arose while the group waited: mean over tokens of the step that trains it − steps finished when it was ready.", "steps", "near 0", "Large: groups are sampled too early; lower `scheduler.window` or use `\"adaptive\"`."),
        Metric("lag/max", "Largest lag of a trained token.", "steps", "at most `scheduler.window`", "Never above: the run would stop."),
        Metric("mismatch/tokens", "Trained tokens that the mismatch is measured on: all whose sampler log-probability is finite.", "tokens", "all of them", "See `mismatch/nonfinite_tokens`."),
        Metric("mismatch/ess", "(Σw)² / (n Σw²) over tokens, w = π / μ on raw weights, π the learner at the start of its step: the share of tokens that still count.", "share", "above 0.9", "Low: lower `scheduler.window` or `optimizer.lr`."),
        Metric("mismatch/sequence_ess", "The same over whole sequences, W = Π w, computed from log W: the share of samples that still count.", "share", "above 0.5; falls with length", "As `mismatch/ess`; near 1 / samples, one sample rules: see docs/corrections.md."),
        Metric("mismatch/engine", "a of the fit D(s) = a + b·s of KL(μ‖π) at lag s: what the two engines differ by, without lag.", "nats a token", "below 0.001 in float32", "Large: kernels or precision differ; use one dtype for learner and engine."),
        Metric("mismatch/engine_se", "Standard error of a.", "nats a token", "small beside `mismatch/engine`", "Large: too few tokens yet; wait."),
        Metric("mismatch/drift", "b of that fit: what one more learner step adds. Absent while only one lag was seen.", "nats a token and step", "b · S below `scheduler.max_drift`", "Large: lower `optimizer.lr`, `ppo.epochs` or `scheduler.window`."),
        Metric("mismatch/drift_se", "Standard error of b.", "nats a token and step", "small beside `mismatch/drift`", "Large: lag hardly varies, so the slope is not known; nothing to do."),
        Metric("mismatch/drift_curvature_t", "t value of a quadratic term beside the line a + b·s.", "–", "within ±2", "Beyond: the line is a bad model of this run; trust `mismatch/kl_by_lag/<s>`."),
        Metric("mismatch/kl", "Mean of e^ℓ − 1 − ℓ, ℓ = log π − log μ: KL(μ‖π).", "nats a token", "below 0.01", "As `mismatch/ess`; at lag 0 it is the engines' own difference."),
        Metric("mismatch/m2", "Mean of ℓ².", "nats²", "about twice `mismatch/kl`", "Far more: a few tokens differ widely; consider `correction.mask`."),
        Metric("mismatch/weight_mean", "Mean of w. Its expectation is 1 where the sampler's log-probabilities are those that it sampled with.", "–", "0.98 to 1.02", "Persistently off: sampling was truncated, or the log-probabilities are of another temperature."),
        Metric("mismatch/abs_logprob_difference", "Mean |ℓ|.", "nats a token", "below 0.05", "As `mismatch/ess`."),
        Metric("mismatch/log_ratio_max", "Largest |ℓ| of a token, before anything is cut off.", "nats", "below 3", "As `mismatch/m2`."),
        Metric("mismatch/nonfinite_tokens", "Tokens whose sampler log-probability was not finite; they are left out of the loss.", "tokens", "0", "Otherwise the sampler is at fault: lower `rollout.temperature` or use float32."),
        Metric("mismatch/tokens_by_lag/<lag>", "As `mismatch/tokens`, tokens of that lag only; no entry for a lag that no token has.", "tokens", "as `mismatch/tokens`", "As `mismatch/tokens`."),
        Metric("mismatch/kl_by_lag/<lag>", "As `mismatch/kl`, over tokens of that lag.", "nats a token", "rises slowly with lag", "Steep: lower `scheduler.window` or `optimizer.lr`. High at lag 0: the engines differ; use float32."),
        Metric("mismatch/kl_se_by_lag/<lag>", "Standard error of that mean, clustered by sequence: √(m/(m−1) · Σ_b (y_b − R·n_b)²) / Σ_b n_b, with y_b the sum over and n_b the number of sequence b's tokens of that lag, R the mean. Needs two sequences.", "nats a token", "small beside the mean", "More samples a step."),
        Metric("mismatch/ess_by_lag/<lag>", "As `mismatch/ess`, over tokens of that lag.", "share", "falls slowly with lag", "As `mismatch/kl_by_lag/<lag>`."),
    ),
    "Correction": (
        Metric("correction/cut_fraction", "Share of tokens whose weight was cut off at `correction.cap`, or is 0 because it lies outside IcePop's limits.", "share", "below 0.05", "As `mismatch/ess`."),
        Metric("correction/masked_tokens", "Share of tokens that `correction.mask` left out of the policy's loss.", "share", "below 0.1", "As `mismatch/ess`; or the mask's limits are too narrow."),
        Metric("correction/masked_sequences", "Share of sequences of which the mask left nothing.", "share", "below 0.1", "As `correction/masked_tokens`."),
        Metric("correction/weight_mean", "Mean weight of a token in the policy's loss, after all corrections; masked tokens count as 0.", "–", "0.9 to 1.05", "Low: much of the batch teaches nothing; as `mismatch/ess`."),
        Metric("correction/m2", "Mean ℓ² of the harmful tokens before the mask (`mask = \"m2po\"` only).", "nats²", "below `correction.m2_budget`", "Above: tokens are masked; as `mismatch/ess`."),
        Metric("correction/clip_range_min", "Smallest clip range ε of the step's tokens: ε / (1 + κ · largest lag).", "–", "above 0.05", "Smaller: lower `correction.clip_by_lag` or `scheduler.window`."),
        Metric("correction/lr_factor", "What the policy's learning rate was multiplied with, √min(1, (ESS/B)/ρ₀); `optimizer/lr` is after it.", "–", "above 0.7", "As `mismatch/ess`; with sequence weights also shorter responses or a lower `correction.damp_ess_target`."),
    ),
    "Scheduler and weight sync": (
        Metric("scheduler/window", "S, the largest lag that is allowed.", "steps", "as set", "Not what you wish: set `scheduler.window`; `decisions.jsonl` says why the adaptive one moved."),
        Metric("scheduler/safe_window", "S*, the largest window that measured drift and effective sample size permit (adaptive only); −1: not even 0.", "steps", "at least `scheduler/window`", "Small: lower `optimizer.lr` or `ppo.epochs`, or raise `scheduler.max_drift`."),
        Metric("scheduler/publish_every", "M, learner steps between two publications of weights.", "steps", "as set", "Above 1 and lag is too large: set `scheduler.publish_every`."),
        Metric("scheduler/ahead", "Most untrained groups that may be under way. Absent where nothing limits them but the window.", "groups", "above 0", "At its least all the time: rollout is too fast for the learner; take fewer actors."),
        Metric("scheduler/in_flight", "Groups being sampled or scored when the step ended.", "groups", "above 0", "0: the learner waits; raise `scheduler.window` or `rollout.actors`."),
        Metric("scheduler/queued", "Groups scored and ready when the step ended.", "groups", "0 to one step's groups", "Always full: rollout is faster than learning; use fewer actors."),
        Metric("sync/probe_max_abs_diff", "Largest |difference| of a probe token's log-probability, actor against learner, after the sync.", "nats", "below `sync.tolerance`", "Above: the run stops and names the actor."),
    ),
    "Time and throughput": (
        Metric("perf/tokens_per_s", "Response tokens trained / `timing_s/step`.", "tokens/s", "steady", "Falls: see which `timing_s/*` grew."),
        Metric("perf/padding_fraction", "1 − real tokens / tokens that the learner computed on.", "share", "below 0.05", "Raise `learner.micro_batch_tokens`."),
        Metric("perf/learner_wait_fraction", "`wait/learner_s` / `timing_s/step`.", "share", "below 0.2", "High: add rollout actors or raise `scheduler.window`."),
        Metric("perf/scoring_saturated_fraction", "Share of the step, from the end of the one before, in which every scoring actor was at work. A wider window cannot make a step shorter than that.", "share", "below 0.9", "Scoring is the bottleneck: raise `scoring.actors` or `scoring.cores`, or make the reward quicker."),
        Metric("perf/scoring_exposed_fraction", "`wait/scoring_exposed_s` / `timing_s/step`.", "share", "below 0.02", "Raise `scoring.actors`, `scoring.cores` or `scheduler.window`, or use a smaller reward model."),
        Metric("wait/scoring_exposed_s", "Time that the learner waited while nothing but scoring was outstanding: had scoring taken none, the step would have begun that much earlier. A part of `wait/learner_s`.", "s", "near 0", "As `perf/scoring_exposed_fraction`."),
        Metric("perf/rollout_wait_fraction", "`wait/rollout_s` / `timing_s/step`.", "share", "below 0.3", "High: raise `scheduler.window`, or use fewer actors."),
        Metric("perf/efficiency", "η = max(G, T) / step: G the time that rollout actors had work (mean), T the learner's, publishing included.", "share", "above 0.9", "Below: neither side is busy; raise `scheduler.window`, or see `wait/by_cause/<cause>`."),
        Metric("wait/by_cause/<cause>", "The learner's wait by cause. window: slots were free, S allowed no more; ahead: no more were wanted; deadline: P groups were ready, a slower one had to come along; sampling: all slots were taken; sync: actors had to load or prove weights; evaluation: weights or a checkpoint had to wait for an evaluation's end.", "s", "0", "window, deadline: raise `scheduler.window`; sampling: more actors or slots; sync: lower `sync.probe_sequences` or raise `scheduler.publish_every`; evaluation: fewer `run.evaluate_prompts`, or raise `scheduler.window`."),
        Metric("wait/learner_s", "Time that the learner waited for groups.", "s", "small beside `timing_s/step`", "As `perf/learner_wait_fraction`."),
        Metric("wait/rollout_s", "Time that rollout actors had nothing to do, mean over actors.", "s", "below a third of the step", "As `perf/rollout_wait_fraction`."),
        Metric("time/training_s", "Since training began, over all starts of the run, until the step's weights were out, without the pauses for checkpoints (and for evaluations with `run.evaluate_pauses`).", "s", "rises", "Rises faster than steps do: see `timing_s/step`."),
        Metric("timing_s/publish", "Writing out new weights on the learner; 0 in a step that publishes none.", "s", "below 5 % of the step", "As `timing_s/sync`."),
        Metric("timing_s/scheduler", "Processor time of the scheduler's decisions: admission, dispatch, completion, the adaptive rule.", "s", "under 1 % of `timing_s/step`", "Report it with `rollouts.jsonl`: a defect."),
        Metric("timing_s/sample_max", "Longest time to sample a group of the step.", "s", "below three times the mean", "Far above the mean: the tail holds up a synchronous step; raise `scheduler.window`."),
        Metric("timing_s/step", "From the moment that the step could start waiting for groups until its weights are out.", "s", "steady", "Grows: see the stages."),
        Metric("timing_s/sync", "Publishing weights until every rollout actor proved them.", "s", "small beside `timing_s/step`", "Put learner and actors on one host, or lower `sync.probe_sequences`."),
        Metric("timing_s/sync_load", "The slowest actor's loading of new weights.", "s", "below 5 % of the step", "As `timing_s/sync`."),
        Metric("timing_s/sync_probe", "The slowest actor's scoring of the probe batch.", "s", "below 5 % of the step", "As `timing_s/sync`."),
        Metric("timing_s/sample_mean", "Mean time to sample one group.", "s", "steady", "Grows: responses are longer, or actors are overloaded; lower `rollout.max_groups_in_flight`."),
        Metric("timing_s/score_mean", "Mean time to score one group: rewards and the reference's log-probabilities.", "s", "below `timing_s/sample_mean`", "Raise `scoring.actors`."),
        Metric("timing_s/learner_step", "The learner's own time for the step.", "s", "steady", "Raise `learner.ranks` or `learner.threads`."),
        Metric("timing_s/discriminator", "The discriminator's updates, on top of `timing_s/learner_step`.", "s", "below `timing_s/learner_step`", "Lower `discriminator.updates`."),
        Metric("timing_s/discriminator_load", "The slowest scoring actor's loading and proving of a version.", "s", "below 5 % of the step", "Large: a smaller discriminator, or one on the scoring actor's GPU."),
        Metric("timing_s/old_logprobs", "Of that, the forward pass before the updates.", "s", "a third of the learner's time or less", "More: raise `learner.micro_batch_tokens`."),
        Metric("timing_s/updates", "Of that, the optimizer updates.", "s", "the larger part of the learner's time", "Large beside sampling: add ranks, or raise `learner.micro_batch_tokens`."),
        Metric("timing_s/<stage>", "Time of one stage of a step.", "s", "steady", "Grows: look at the load of its host (`host/<host>/cpu_fraction`)."),
        Metric("memory/<place>", "Largest resident memory so far of the learner's first rank (the kernel's ru_maxrss).", "GiB", "below what the machine has", "Near it: lower `learner.micro_batch_tokens`, or use bfloat16."),
    ),
    "Hosts and actors": (
        Metric("actors/rollout", "Rollout actors in the pool at the end of the step.", "actors", "`rollout.actors`", "Fewer: one was lost and its successor is on its way; see events.log."),
        Metric("actors/lost", "Rollout and scoring actors lost so far: process, engine or host gone. Their groups were sampled or scored again.", "actors", "0", "The reason is in events.log; memory is the usual one."),
        Metric("host/<host>/cpu_fraction", "Share of the host's cores that was busy, all programs together, since the look before (every `monitor.hosts_every_s` seconds).", "share", "below 0.95", "Always 1: cores are shared; lower `rollout.actors` or the roles' `cores`, or add a host."),
        Metric("host/<host>/memory_gib", "Memory in use: of the container where it has a limit (cgroup v2: current − inactive file cache), else of the machine (total − available).", "GiB", "steady", "See `host/<host>/memory_fraction`."),
        Metric("host/<host>/memory_fraction", "That by what there is: limit or total.", "share", "below 0.9", "Close to 1 the kernel kills a process: see which `actor/<actor>/memory_gib` grew."),
        Metric("host/<host>/shared_memory_gib", "In use in /dev/shm: Ray's object store and weights on their way.", "GiB", "steady", "Grows: lower `cluster.object_store_gib`, or report it as a leak."),
        Metric("host/<host>/gpu<index>_fraction", "Share of the time that a kernel ran on the GPU, as the driver says.", "share", "above 0.8 where it is the bottleneck", "Low: see `perf/learner_wait_fraction` and `perf/rollout_wait_fraction`."),
        Metric("host/<host>/gpu<index>_memory_gib", "Memory in use on the GPU, all programs together.", "GiB", "steady", "See `host/<host>/gpu<index>_memory_fraction`."),
        Metric("host/<host>/gpu<index>_memory_fraction", "That by the GPU's total.", "share", "below 0.95", "Lower `rollout.gpu_memory_utilization` or `learner.micro_batch_tokens`."),
        Metric("actor/<actor>/cores", "Cores that the actor's process and its child processes kept busy since the look before: Σ processor seconds / seconds.", "cores", "at most the role's `cores`", "More: it takes from its neighbours; raise the role's `cores` or lower its threads."),
        Metric("actor/<actor>/memory_gib", "Memory of the actor's process and its child processes, pages shared with others divided among them (PSS); all of their resident pages where the system does not say.", "GiB", "steady after the first steps", "Grows step by step: a leak; report it with this curve."),
        Metric("actor/<actor>/resident_gib", "Their resident memory (RSS); shared pages count for each process.", "GiB", "as `actor/<actor>/memory_gib`", "Far above: many pages are shared; `actor/<actor>/memory_gib` counts them once."),
        Metric("actor/<actor>/gpu_memory_gib", "GPU memory of these processes, where the driver tells processes apart.", "GiB", "steady", "As `host/<host>/gpu<index>_memory_fraction`."),
    ),
    "Warm-up": (
        Metric("warmup/loss", "−mean log π of demonstrated tokens.", "nats a token", "falls", "As `loss/supervised`."),
        Metric("supervised/loss", "−mean log π of the demonstrated tokens of an update.", "nats a token", "falls", "As `loss/supervised`."),
        Metric("supervised/heldout_loss", "The same on demonstrations that are not trained on.", "nats a token", "falls, then levels off", "Rises: the policy learns the demonstrations by heart; lower `run.steps`."),
        Metric("warmup/lr", "Learning rate of the warm-up.", "–", "rises, then falls", "Change `warmup.lr`."),
        Metric("warmup/grad_norm", "Global norm of the gradient before clipping.", "–", "falls", "As `optimizer/grad_norm`."),
        Metric("warmup/<name>", "Another value of a warm-up update, named as in training.", "–", "as in training", "As in training."),
    ),
    "The monitor itself": (
        Metric("monitor/nonfinite_values", "Values so far that were NaN or infinite and are written as null.", "values", "0", "The first one is named in events.log."),
        Metric("monitor/unknown_metrics", "Names in use that this page does not explain.", "names", "0", "Add them to cluster/metrics.py."),
        Metric("monitor/wandb_errors", "Calls to W&B that failed, or found no room because it was too slow; the local files miss nothing.", "calls", "0", "See the warning in events.log."),
        Metric("monitor/hosts_silent", "Hosts and actors that did not answer the last look at their load; their metrics are then absent.", "hosts, actors", "0, more at the start", "Lasting: the host is overloaded or cut off; see events.log."),
    ),
}  # fmt: skip


@functools.cache
def lookup(name: str) -> Metric | None:
    """The entry that explains a name: an exact one before a family; None if there is none."""
    entries = [metric for section in SECTIONS.values() for metric in section]
    exact = next((metric for metric in entries if metric.name == name), None)
    return exact or next((metric for metric in entries if _pattern(metric.name).fullmatch(name)), None)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<[^>]+>", "[^/]+", re.escape(name)))


def document() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "`metrics.jsonl` in the run folder has one flat row a learner step; `warmup.jsonl` one a warm-up update.",
        "A value that does not apply or was not finite is `null`. This page is made from `cluster/metrics.py` by",
        "`python -m cluster.metrics`.",
    ]
    for title, metrics in SECTIONS.items():
        lines += ["", f"## {title}", "", "| name | what it is | unit | healthy | otherwise |"]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| `{m.name}` | {_cell(m.meaning)} | {_cell(m.unit)} | {_cell(m.healthy)} | {_cell(m.action)} |"
            for m in metrics
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write docs/metrics.md."""
    path = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
    path.write_text(document(), encoding="utf-8")
    sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
