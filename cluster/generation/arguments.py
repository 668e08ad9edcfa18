"""The arguments of `headrace generate` and `headrace evaluate`. Nothing heavy is imported here."""

import argparse
from pathlib import Path
from typing import Any

STRATEGIES = ("sample", "best-of-n", "soft-best-of-n", "reward-guided", "value-guided")
_STRATEGIES = """strategies (docs/decoding.md):
  sample           responses as the policy gives them, with their scores if a reward is named
  best-of-n        of each --n candidates the one with the highest reward
  soft-best-of-n   of each --n candidates one drawn with probability ∝ exp(reward / --soft-temperature)
  reward-guided    every token drawn from policy · exp(--guidance-weight · reward of the text so far),
                   over the policy's --top-k likeliest tokens
  value-guided     the same with a critic's value of the text so far: that of a run trained by PPO

rewards: --reward-model FOLDER; --reward exact, numeric, task:KIND, module:function or file.py:function; or
the [[reward]] tables of --config; several add up."""


def add_generation(commands: Any) -> None:
    """Add the commands `generate` and `evaluate` to the sub-parsers of the command line."""
    generate = commands.add_parser(
        "generate",
        help="answer prompts with a policy: sampling, best-of-n, guided decoding",
        description="Answer prompts with a policy (vLLM on Ray), and write a JSON line for each response, "
        "with its scores. Stopped, it goes on with the same command.",
        epilog=_STRATEGIES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(generate)
    generate.add_argument("--strategy", choices=STRATEGIES, default="sample", help="see below (sample)")
    generate.add_argument("--samples", type=int, default=1, help="responses for each prompt (1)")
    generate.add_argument("--n", type=int, help="best-of-n, soft-best-of-n: candidates of a response (16)")
    generate.add_argument("--soft-temperature", type=float, metavar="λ", help="soft-best-of-n: λ (1.0)")
    generate.add_argument("--top-k", type=int, metavar="K", help="guided: candidate tokens (8)")
    generate.add_argument("--guidance-weight", type=float, metavar="W", help="guided: w (1.0)")
    generate.add_argument(
        "--value",
        type=Path,
        metavar="FOLDER",
        help="value-guided: checkpoint or run with the critic (--policy)",
    )
    generate.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON Lines to write")
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser(
        "evaluate",
        help="mean reward, pass@k and the best-of-n curve of a policy",
        description="Sample a policy on prompts, score the samples, and estimate from the same samples, "
        "without bias: the mean reward, pass@k, and the rewards of best-of-n, beside its KL; with 95 % "
        "intervals over prompts. Writes evaluation.json, samples.jsonl and best_of_n.png.",
    )
    _add_common(evaluate)
    evaluate.add_argument("--samples", type=int, default=16, metavar="N", help="samples for each prompt (16)")
    evaluate.add_argument(
        "--gold", metavar="REWARD", help="a reward, as --reward, that only judges what the others choose"
    )
    evaluate.add_argument(
        "--pass-threshold",
        type=float,
        metavar="R",
        help="pass@k: a reward from which a sample passes (1, where all rewards are 0 or 1)",
    )
    evaluate.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="folder of an earlier evaluation of the same prompts: also how often this policy beats that "
        "one, and how often it would at equal length",
    )
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, a new one")
    evaluate.set_defaults(run=_evaluate)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--policy",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a model, or a run: its newest checkpoint",
    )
    command.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="rows with a column `prompt`: JSON Lines, Parquet, a folder or a hub dataset, as data.train",
    )
    command.add_argument(
        "--reward-model",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a trained reward model; may be given often",
    )
    command.add_argument(
        "--reward", action="append", default=[], metavar="REWARD", help="see `generate`; may be given often"
    )
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="take [[reward]], [task], [scoring], [rollout], [cluster] and how [data] is read from a job",
    )
    command.add_argument(
        "--temperature", type=float, help="sampling temperature; 0: the likeliest token (1.0)"
    )
    command.add_argument("--max-new-tokens", type=int, help="longest response, in tokens (64)")
    command.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    command.add_argument("--device", default="cpu", help="torch device of reward models here (cpu)")
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="a setting of [rollout], [data], [model], [cluster], [learner], [scoring], [task] or reward.N",
    )


def _generate(options: argparse.Namespace) -> int:
    from cluster.generation.commands import run_generate

    return run_generate(options)


def _evaluate(options: argparse.Namespace) -> int:
    from cluster.generation.commands import run_evaluate

    return run_evaluate(options)
