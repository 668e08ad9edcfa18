"""What `headrace generate` and `headrace evaluate` do; `cluster.generation.arguments` says what each takes.

options ─► settings ─► prompts ─► rollout actors ─► scores ─► responses, or tables and a picture
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.records import Prompt, SampledGroup
from actors.waits import DeadlineExceeded
from cluster.config import JobConfig
from cluster.data_files import Quarantine
from cluster.generation.against import (
    SAMPLES,
    Baseline,
    compare,
    prompt_key,
    read_baseline,
    require_comparable,
)
from cluster.generation.evaluation import PromptSamples, evaluate_samples
from cluster.generation.guides import reward_guide, value_guide
from cluster.generation.output import Output
from cluster.generation.policy import Policy, open_policy, read_prompts
from cluster.generation.progress import Progress
from cluster.generation.responses import response_lines
from cluster.generation.sampling import Guided, Plan, sample_all
from cluster.generation.scoring import Answer, Scoring
from cluster.generation.settings import Judges, Strategy, read_settings, strategy_of, temperature_of
from cluster.joining import PlacementError
from cluster.labelling.files import quarantine_beside, require_new, write_lines
from cluster.remote import LossError, WorkerFailedError, WorkerLostError
from cluster.visible import entry
from rewards.base import RewardError, Score
from rewards.build import check_row, required_columns
from rewards.model_reward import ModelPlace, model_facts

EXIT_OK, EXIT_FAILED = 0, 1
_FAILURES = (PlacementError, LossError, WorkerFailedError, WorkerLostError, DeadlineExceeded)


@dataclass(frozen=True, slots=True)
class Task:
    """What both commands prepare: who samples what, and who judges it."""

    config: JobConfig
    judges: Judges
    policy: Policy
    prompts: list[Prompt]
    temperature: float


def run_generate(options: argparse.Namespace) -> int:
    """`headrace generate`."""
    strategy = strategy_of(options)
    require_new(options.out)
    with ExitStack() as stack:
        quarantine = stack.enter_context(quarantine_beside(options.out))
        task = _prepare(options, strategy.group_size, quarantine)
        _require_rewards(strategy, task.judges)
        guided = _guided(options, strategy, task)
        scoring = _scoring(options, task, stack)
        output = stack.enter_context(Output(options.out, _made_by(options, strategy, task, guided)))
        left = [(n, prompt) for n, prompt in enumerate(task.prompts) if n not in output.done]
        plan = Plan(strategy.group_size, task.temperature, guided, start=len(output.done))
        progress = stack.enter_context(Progress(len(task.prompts), done=len(output.done)))
        failures: list[str] = []

        async def use(number: int, group: SampledGroup) -> None:
            answers = None if scoring is None else await scoring.score(group)
            error = _first_error(answers)
            if error is not None:
                failures.append(f"{group.prompt.id}: {error}")
                progress.left_out()
                return
            rng = np.random.default_rng([options.seed, number])
            lines = response_lines(group, _scores(answers), strategy, rng, task.policy.version)
            output.add(number, lines)
            tokens = sum(len(one.token_ids) for one in group.completions)
            progress.advance(tokens, [line["score"] for line in lines if "score" in line])

        if left and not _sampled(task, left, plan, use):
            if output.done:
                print(f"{len(output.done)} prompts are kept: the same command goes on", file=sys.stderr)
            return EXIT_FAILED
        if not _say_failures(failures, len(task.prompts)):
            return EXIT_FAILED
        count = output.finish()
    print(f"{count} responses to {len(task.prompts) - len(failures)} prompts in {options.out}")
    return EXIT_OK


def run_evaluate(options: argparse.Namespace) -> int:
    """`headrace evaluate`."""
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}: give 1 or more")
    out: Path = require_new(options.out)
    with ExitStack() as stack:
        quarantine = stack.enter_context(quarantine_beside(out))
        task = _prepare(options, options.samples, quarantine)
        if not task.judges.trained:
            raise ValueError(
                "there is no reward to evaluate by: name one with --reward, --reward-model or --config"
            )
        baseline = _baseline(options, task)
        scoring = _scoring(options, task, stack)
        assert scoring is not None
        judge = scoring
        progress = stack.enter_context(Progress(len(task.prompts)))
        groups: dict[int, tuple[SampledGroup, list[Score]]] = {}
        failures: list[str] = []

        async def use(number: int, group: SampledGroup) -> None:
            answers = await judge.score(group)
            scores, error = _scores(answers), _first_error(answers)
            if error is not None or scores is None:
                failures.append(f"{group.prompt.id}: {error}")
                progress.left_out()
                return
            groups[number] = (group, scores)
            tokens = sum(len(one.token_ids) for one in group.completions)
            progress.advance(tokens, [score.value for score in scores])

        plan = Plan(options.samples, task.temperature)
        if not _sampled(task, list(enumerate(task.prompts)), plan, use):
            return EXIT_FAILED
        if not _say_failures(failures, len(task.prompts)):
            return EXIT_FAILED
    _write_evaluation(
        out,
        task,
        [groups[number] for number in sorted(groups)],
        threshold=options.pass_threshold,
        left_out=len(failures),
        baseline=baseline,
    )
    return EXIT_OK


# ---- before the actors start -----------------------------------------------------------------------------


def _prepare(options: argparse.Namespace, group_size: int, quarantine: Quarantine) -> Task:
    """Read settings, policy and prompts; ValueError for what cannot work."""
    config, judges = read_settings(options, group_size)
    temperature = temperature_of(options, config, group_size)
    policy = open_policy(config)
    prompts = read_prompts(
        config,
        policy,
        quarantine,
        required=sorted(required_columns(judges.reward)),
        check_row=lambda row: check_row(judges.reward, row),
    )
    quarantine.announce(lambda text: print(text, file=sys.stderr))
    return Task(config, judges, policy, prompts, temperature)


def _baseline(options: argparse.Namespace, task: Task) -> Baseline | None:
    """What `--against` names, where it can be compared with."""
    if options.against is None:
        return None
    baseline = read_baseline(options.against)
    keys = [prompt_key(_source(prompt), _rest(prompt)) for prompt in task.prompts]
    require_comparable(baseline, keys, [one.label for one in task.judges.reward])
    return baseline


def _require_rewards(strategy: Strategy, judges: Judges) -> None:
    needs = strategy.n > 1 or strategy.name == "reward-guided"
    if needs and not judges.trained:
        raise ValueError(
            f"--strategy {strategy.name} chooses by a reward, and there is none: name one with "
            "--reward-model, --reward or --config"
        )


def _guided(options: argparse.Namespace, strategy: Strategy, task: Task) -> Guided | None:
    if strategy.guidance is None:
        return None
    if strategy.name == "value-guided":
        spec = value_guide(task.config, task.policy, options.value or options.policy)
    else:
        spec = reward_guide(task.config, task.judges, task.policy, task.prompts, Path.cwd())
    return Guided(spec, strategy.guidance)


def _scoring(options: argparse.Namespace, task: Task, stack: ExitStack) -> Scoring | None:
    """The rewards, here, where any were named."""
    if not task.judges.reward:
        return None
    learner = task.config.learner
    place = ModelPlace(options.device, learner.precision, learner.micro_batch_tokens)
    scoring = Scoring(task.judges, Path.cwd(), place=place)
    stack.callback(scoring.close)
    return scoring


def _made_by(
    options: argparse.Namespace, strategy: Strategy, task: Task, guided: Guided | None
) -> dict[str, Any]:
    """All that the responses depend on: a file begun with other values is not gone on with."""
    return {
        "policy": task.policy.version,
        "prompts": [prompt.token_ids for prompt in task.prompts],
        "strategy": [strategy.name, strategy.samples, strategy.n, strategy.soft_temperature],
        "sampling": [task.temperature, task.config.rollout.max_new_tokens, options.seed],
        "guide": None if guided is None else [guided.spec.model_dump(), guided.guidance.model_dump()],
        "judges": task.judges.model_dump(mode="json"),
        "models": {label: facts.version for label, facts in model_facts(task.judges.reward).items()},
    }


# ---- while and after they work ---------------------------------------------------------------------------


def _sampled(task: Task, prompts: Sequence[tuple[int, Prompt]], plan: Plan, use: Any) -> bool:
    """Sample; False where that failed or was interrupted, its first cause said."""
    try:
        sample_all(task.config, task.policy, prompts, plan, use)
    except* _FAILURES as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        print(f"headrace: {entry(str(first))}", file=sys.stderr)
        sampled = False
    except* KeyboardInterrupt:
        print("headrace: interrupted", file=sys.stderr)
        sampled = False
    else:
        sampled = True
    return sampled


def _first_error(answers: Sequence[Answer] | None) -> RewardError | None:
    return next((one for one in answers or () if isinstance(one, RewardError)), None)


def _scores(answers: Sequence[Answer] | None) -> list[Score] | None:
    return None if answers is None else [one for one in answers if isinstance(one, Score)]


def _say_failures(failures: Sequence[str], prompts: int) -> bool:
    """Say how many prompts a reward could not score; whether any is left."""
    if failures:
        print(
            f"headrace: {len(failures)} of {prompts} prompts were left out, as a reward failed; the first: "
            f"{entry(failures[0])}",
            file=sys.stderr,
        )
    return len(failures) < prompts


def _write_evaluation(
    out: Path,
    task: Task,
    groups: Sequence[tuple[SampledGroup, list[Score]]],
    *,
    threshold: float | None,
    left_out: int,
    baseline: Baseline | None,
) -> None:
    from cluster.generation.figure import draw_evaluation
    from cluster.generation.progress import print_evaluation

    judges = [one.label for one in task.judges.reward if one.role == "evaluate"]
    found = {
        "policy": task.policy.version,
        "temperature": task.temperature,
        "left_out": left_out,
    } | evaluate_samples([_samples_of(*one) for one in groups], judges, threshold)
    lines = [_pool_line(*one, task.policy.version) for one in groups]
    if baseline is not None:
        found["against"] = compare(baseline, lines)
    out.mkdir(mode=0o700)
    write_lines(out / SAMPLES, lines)
    draw_evaluation(found, out / "best_of_n.png")
    (out / "evaluation.json").write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print_evaluation(found, out)


def _samples_of(group: SampledGroup, scores: Sequence[Score]) -> PromptSamples:
    return PromptSamples(
        rewards=np.array([score.value for score in scores]),
        components={
            label: np.array([score.components[label] for score in scores]) for label in scores[0].components
        },
        tokens=np.array([len(one.token_ids) for one in group.completions], dtype=np.float64),
        finished=np.array([one.finished for one in group.completions], dtype=np.float64),
    )


def _pool_line(group: SampledGroup, scores: Sequence[Score], version: str) -> dict[str, Any]:
    """All samples of a prompt, as a pool of `headrace label` has them, with their rewards."""
    return {"row": _rest(group.prompt), "prompt": _source(group.prompt)} | {
        "responses": [one.text for one in group.completions],
        "finished": [one.finished for one in group.completions],
        "tokens": [len(one.token_ids) for one in group.completions],
        "rewards": [score.value for score in scores],
        "components": [dict(score.components) for score in scores],
        "policy": version,
    }


def _source(prompt: Prompt) -> Any:
    return prompt.source or prompt.text


def _rest(prompt: Prompt) -> dict[str, Any]:
    return {name: value for name, value in prompt.row.items() if name != "prompt"}
