"""The arguments of `headrace label` and its sub-commands. Nothing heavy is imported here."""

import argparse
from pathlib import Path
from typing import Any

RULES = ("random", "entropy", "max-difference", "bald", "variance", "d-optimal", "fisher")
_FLOW = """the way of a label:
  label generate   sample candidate responses from a policy       -> pool.jsonl
  label rank       choose the pairs that are worth a label        -> ranked.jsonl
  label annotate   show them to a person in the terminal          -> annotations.jsonl
  label simulate   or let a simulated annotator judge them        -> annotations.jsonl
  label merge      make preference rows for training              -> preferences.jsonl
  label contrast   or prefer one policy's samples to another's    -> preferences.jsonl

A pool can also be written by hand: a line {"prompt": ..., "responses": [...]} for each prompt."""


def add_label(commands: Any) -> None:
    """Add the command `label` to the sub-parsers of the command line."""
    label = commands.add_parser(
        "label",
        help="choose pairs of responses to label, annotate them, make preference rows",
        description="Choose pairs of responses to label, annotate them in the terminal or by a simulated "
        "annotator, and make preference rows of the annotations.",
        epilog=_FLOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = label.add_subparsers(title="steps", required=True, metavar="STEP")
    _add_generate(steps)
    _add_rank(steps)
    _add_annotate(steps)
    _add_simulate(steps)
    _add_merge(steps)
    _add_contrast(steps)


def _add_generate(steps: Any) -> None:
    generate = steps.add_parser(
        "generate",
        help="sample candidate responses from a policy",
        description="Sample responses to prompts with the rollout actors (vLLM on Ray), and write a pool. "
        "Nothing is written before all are sampled.",
    )
    generate.add_argument(
        "prompts", metavar="PROMPTS", help="JSON Lines, Parquet, a folder or a hub dataset, as data.train"
    )
    generate.add_argument(
        "--policy", type=Path, required=True, help="folder of a model, or of a run: its newest checkpoint"
    )
    generate.add_argument("--samples", type=int, default=4, help="responses for each prompt (4)")
    generate.add_argument("--temperature", type=float, help="sampling temperature (1.0)")
    generate.add_argument("--max-new-tokens", type=int, help="longest response, in tokens (64)")
    generate.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="a setting of [rollout], [data], [model], [cluster], [learner] or run.seed; may be given often",
    )
    _add_out(generate, "the pool to write")
    generate.set_defaults(run=_generate)


def _add_rank(steps: Any) -> None:
    rank = steps.add_parser(
        "rank",
        help="choose the pairs that are worth a label",
        description="Rank the pairs of responses of a pool by an acquisition rule, and write the best to a "
        "file to annotate.",
    )
    rank.add_argument(
        "pool",
        metavar="POOL",
        help='lines {"prompt", "responses"} (docs/labelling.md): JSON Lines or Parquet',
    )
    rank.add_argument(
        "--rule",
        choices=RULES,
        default="random",
        help="all but random need --reward-model; bald and variance an ensemble (random)",
    )
    rank.add_argument("--count", type=int, default=100, help="pairs to write (100)")
    rank.add_argument("--reward-model", type=Path, metavar="FOLDER", help="a trained reward model")
    rank.add_argument(
        "--labelled",
        action="append",
        default=[],
        metavar="FILE",
        help="preferences that there are: left out, and d-optimal builds on them; may be given often",
    )
    rank.add_argument(
        "--most-pairs",
        type=int,
        default=10_000,
        metavar="N",
        help="look at no more pairs than this, drawn at random (10000)",
    )
    rank.add_argument(
        "--ridge", type=float, default=1.0, help="λ of d-optimal and fisher: precision of the prior (1.0)"
    )
    rank.add_argument("--seed", type=int, default=0, help="seed of what is drawn (0)")
    rank.add_argument("--device", default="cpu", help="torch device of the reward model (cpu)")
    _add_out(rank, "the ranked file to write")
    rank.set_defaults(run=_rank)


def _add_annotate(steps: Any) -> None:
    annotate = steps.add_parser(
        "annotate",
        help="judge pairs in the terminal",
        description="Show the pairs of a ranked file one after another; one key a judgement. Each is on the "
        "disk before the next pair is shown: stop at any time and go on with the same command.",
        epilog="keys: a, b: that response is better; t: tie; s: skip; u: undo; v: read all of it; q: quit. "
        "Which response is shown as A is drawn for each pair, and recorded.",
    )
    _add_ranked(annotate)
    annotate.add_argument("--annotator", metavar="NAME", help="who judges (your user name)")
    annotate.add_argument("--seed", type=int, default=0, help="seed of the order of presentation (0)")
    _add_out(annotate, "the annotations file to write, or to go on with")
    annotate.set_defaults(run=_annotate)


def _add_simulate(steps: Any) -> None:
    simulate = steps.add_parser(
        "simulate",
        help="let a simulated annotator judge pairs",
        description="Annotate a ranked file by gold rewards with noise: P(a over b) is the logistic function "
        "of (gold_a - gold_b + length_bias * (characters_a - characters_b)) / temperature. The same pair and "
        "seed give the same label.",
    )
    _add_ranked(simulate)
    simulate.add_argument("--task", metavar="KIND", help="gold: of this generated task (default: the pool's)")
    simulate.add_argument(
        "--reward-model", type=Path, metavar="FOLDER", help="gold: the value of a trained reward model"
    )
    simulate.add_argument(
        "--temperature", type=float, default=1.0, help="0: the better one always wins (1.0)"
    )
    simulate.add_argument("--length-bias", type=float, default=0.0, help="worth of a character (0.0)")
    simulate.add_argument("--flip", type=float, default=0.0, help="share of labels that are flipped (0.0)")
    simulate.add_argument(
        "--tie-within", type=float, default=0.0, help="gold differences below this are ties (0.0: none)"
    )
    simulate.add_argument("--annotator", metavar="NAME", default="simulated", help="name (simulated)")
    simulate.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")
    simulate.add_argument("--device", default="cpu", help="torch device of the reward model (cpu)")
    _add_out(simulate, "the annotations file to write, or to go on with")
    simulate.set_defaults(run=_simulate)


def _add_merge(steps: Any) -> None:
    merge = steps.add_parser(
        "merge",
        help="make preference rows of annotations",
        description="Write a row of prompt, chosen, rejected and annotator for each decided pair, and a "
        "report beside it that accounts for every annotation. Ties and skips make no row and are counted.",
    )
    _add_ranked(merge)
    merge.add_argument(
        "annotations",
        type=Path,
        nargs="+",
        metavar="ANNOTATIONS",
        help='annotations files, or ranked lines into which another tool wrote "choice"',
    )
    merge.add_argument(
        "--existing",
        action="append",
        default=[],
        metavar="FILE",
        help="preference rows to write first; no label of theirs is written again; may be given often",
    )
    _add_out(merge, "the preference file to write")
    merge.set_defaults(run=_merge)


def _add_contrast(steps: Any) -> None:
    contrast = steps.add_parser(
        "contrast",
        help="prefer a policy's samples after fine-tuning to those before it",
        description="Write a preference row for each pair of draws, the k-th of one pool against the k-th of "
        "the other. A reward model trained on them, with preferences.contradictions = keep, learns the "
        "log-ratio of the two policies (docs/imitation_iterated.md).",
    )
    for name, what in (("tuned", "preferred"), ("initial", "other")):
        contrast.add_argument(name, metavar=name.upper(), help=f"pool of the {what} policy's samples")
    _add_out(contrast, "the preference file to write")
    contrast.set_defaults(run=_contrast)


def _add_ranked(step: argparse.ArgumentParser) -> None:
    step.add_argument("ranked", type=Path, metavar="RANKED", help="a file that `label rank` wrote")


def _add_out(step: argparse.ArgumentParser, what: str) -> None:
    step.add_argument("--out", type=Path, required=True, metavar="FILE", help=what)


def _generate(options: argparse.Namespace) -> int:
    from cluster.labelling.commands import run_generate

    return run_generate(options)


def _rank(options: argparse.Namespace) -> int:
    from cluster.labelling.commands import run_rank

    return run_rank(options)


def _annotate(options: argparse.Namespace) -> int:
    from cluster.labelling.commands import run_annotate

    return run_annotate(options)


def _simulate(options: argparse.Namespace) -> int:
    from cluster.labelling.commands import run_simulate

    return run_simulate(options)


def _contrast(options: argparse.Namespace) -> int:
    from cluster.labelling.commands import run_contrast

    return run_contrast(options)


def _merge(options: argparse.Namespace) -> int:
    from cluster.labelling.commands import run_merge

    return run_merge(options)
