"""What the sub-commands of `headrace label` do; `cluster.labelling.arguments` says what each takes.

generate ─► pool ─► rank ─► ranked file ─► annotate or simulate ─► annotations ─► merge ─► preferences
"""

import argparse
import getpass
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.data_files import Quarantine
from cluster.labelling.contrast import contrast
from cluster.labelling.files import (
    AnnotationLog,
    Pool,
    quarantine_beside,
    read_annotations,
    read_pairs,
    read_pool,
    require_new,
    write_lines,
)
from cluster.labelling.records import Annotation, Pair
from cluster.visible import entry

EXIT_OK, EXIT_FAILED = 0, 1


def run_generate(options: argparse.Namespace) -> int:
    """`label generate`: a pool, sampled from a policy."""
    out = require_new(options.out)
    from actors.waits import DeadlineExceeded
    from cluster.joining import PlacementError
    from cluster.labelling.generating import generate, generation_config, open_policy, read_prompts
    from cluster.remote import LossError, WorkerFailedError, WorkerLostError

    chosen = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens}
    given = [f"rollout.{name}={value}" for name, value in chosen.items() if value is not None]
    config = generation_config(options.policy, options.prompts, options.samples, given + options.overrides)
    policy = open_policy(config)
    with quarantine_beside(out) as quarantine:
        prompts = read_prompts(config, policy, quarantine)
        _say_put_aside(quarantine)
        try:
            rows = generate(config, policy, prompts, _progress(len(prompts)))
        except* (PlacementError, LossError, WorkerFailedError, WorkerLostError, DeadlineExceeded) as group:
            _failed(group)
            return_code = EXIT_FAILED
        else:
            write_lines(out, rows)
            print(
                f"{len(rows)} prompts with {options.samples} responses each in {out}, from {policy.version}"
            )
            return_code = EXIT_OK
    return return_code


def _failed(group: BaseExceptionGroup[Any]) -> None:
    """Say the first cause."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    print(f"headrace: {entry(str(first))}", file=sys.stderr)


def _progress(total: int) -> Callable[[int], None]:
    """Says every tenth of the way."""
    step = max(1, total // 10)

    def told(done: int) -> None:
        if done % step == 0 or done == total:
            print(f"{done} of {total} prompts sampled", file=sys.stderr)

    return told


def run_rank(options: argparse.Namespace) -> int:
    """`label rank`: a ranked file from a pool."""
    from cluster.labelling.merging import read_preferences
    from cluster.labelling.ranking import RankOptions, describe, rank

    out = require_new(options.out)
    wanted = RankOptions(options.rule, options.count, options.seed, options.ridge, options.most_pairs)
    with quarantine_beside(out) as quarantine:
        pool: Pool = read_pool(options.pool, quarantine)
        labelled = [
            preference
            for name in options.labelled
            for _, preference in read_preferences(name, quarantine, "--labelled")
        ]
        _say_put_aside(quarantine)
        model = _reward_model(options)
        ranking = rank(
            pool,
            wanted,
            open_model=None if model is None else lambda: model,
            labelled=labelled,
            source=options.pool,
            model_version=model.card.version if model is not None else "",
        )
    write_lines(out, (pair.to_json(number) for number, pair in enumerate(ranking.pairs, start=1)))
    print(describe(ranking, pool, out))
    return EXIT_OK


def _reward_model(options: argparse.Namespace) -> Any:
    if options.reward_model is None:
        return None
    from rewards.models.loading import load_reward_model

    return load_reward_model(options.reward_model, device=options.device)


def run_annotate(options: argparse.Namespace) -> int:
    """`label annotate`: the terminal mode."""
    from cluster.labelling.session import Session
    from cluster.labelling.terminal import annotate, require_terminal

    require_terminal()
    annotator = _annotator(options.annotator)
    pairs = read_pairs(options.ranked)
    _require_annotations(options.out, options.ranked)
    with AnnotationLog(options.out) as log:
        session = Session(pairs, annotator, seed=options.seed, earlier=_earlier(options.out))
        try:
            annotate(session, log)
        finally:
            print(f"{session.summary()}; in {options.out}")
    return EXIT_OK


def _annotator(name: str | None) -> str:
    """The name that goes with every label."""
    if name is None:
        try:
            name = getpass.getuser()
        except (OSError, KeyError):  # no such user here
            name = ""
    if not name.strip() or not name.isprintable():
        raise ValueError(f"--annotator {name!r}: is no name; give one that can be printed")
    return name.strip()


def _require_annotations(path: Path, ranked: Path) -> None:
    """Refuse to append labels to a file of another kind."""
    if not path.exists():
        return
    good, problems = read_annotations(path)
    if path.samefile(ranked) or (len(problems) > 1 and not good):  # a crash may have left one broken line
        raise ValueError(f"--out {path}: is no annotations file; name a new file, or one to go on with")


def _earlier(path: Path) -> list[Annotation]:
    """What the file holds; lines that are no annotation are said."""
    annotations, problems = read_annotations(path)
    for problem in problems[:5]:
        print(f"warning: {entry(problem)}; it counts as no label", file=sys.stderr)
    if len(problems) > 5:
        print(f"warning: and {len(problems) - 5} more such lines", file=sys.stderr)
    return annotations


def run_simulate(options: argparse.Namespace) -> int:
    """`label simulate`: a simulated annotator's annotations."""
    from cluster.labelling.session import Session
    from cluster.labelling.simulating import simulate
    from rewards.preferences.annotator import SimulatedAnnotator

    name = _annotator(options.annotator)
    annotator = SimulatedAnnotator(
        temperature=options.temperature,
        length_bias=options.length_bias,
        flip=options.flip,
        seed=options.seed,
        name=name,
    )
    pairs = read_pairs(options.ranked)
    gold = _gold(options, pairs)
    _require_annotations(options.out, options.ranked)
    with AnnotationLog(options.out) as log:
        session = Session(pairs, name, earlier=_earlier(options.out))
        left = session.remaining()
        made = simulate(left, annotator, gold, tie_within=options.tie_within)
        log.append(made)
    ties = sum(one.choice == "tie" for one in made)
    print(f"{len(made)} annotations by {name}, {ties} of them ties, in {options.out}")
    if len(left) < len(pairs):
        print(f"{len(pairs) - len(left)} pairs had one by {name} already")
    return EXIT_OK


def _gold(options: argparse.Namespace, pairs: list[Pair]) -> Callable[[Pair], tuple[float, float]]:
    from cluster.labelling.simulating import gold_of_model, gold_of_pool, gold_of_task

    if options.task is not None:
        return gold_of_task(options.task)
    model = _reward_model(options)
    return gold_of_pool if model is None else gold_of_model(lambda items: model.score(items).value, pairs)


def run_merge(options: argparse.Namespace) -> int:
    """`label merge`: preference rows from annotations."""
    from cluster.labelling.merging import describe, merge, read_all, read_preferences

    out = require_new(options.out)
    report_path = require_new(out.with_name(f"{out.stem}.report.json"))
    pairs = read_pairs(options.ranked)
    files, problems = read_all(options.annotations)
    with quarantine_beside(out) as quarantine:
        before = [
            found for name in options.existing for found in read_preferences(name, quarantine, "--existing")
        ]
        _say_put_aside(quarantine)
    present = frozenset((preference.key, preference.annotator) for _, preference in before)
    rows, report = merge(pairs, files, present)
    report.lines += len(problems)
    report.problems = problems + report.problems
    report.existing = len(before)
    if not rows and not before:
        raise ValueError(
            f"ANNOTATIONS: no pair is decided ({report.ties} ties, {report.skips} skips, {report.undone} "
            f"lines of choices taken back, {len(report.outside)} lines about other pairs, "
            f"{len(report.problems)} lines that cannot be used), so there is no preference to write; "
            "annotate more pairs"
        )
    count = write_lines(out, [*(row for row, _ in before), *rows])
    _write_private(report_path, report.to_json())
    print(describe(report, count, out, report_path))
    return EXIT_OK


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - it is a descriptor
        file.write(text)
    temporary.replace(path)


def _say_put_aside(quarantine: Quarantine) -> None:
    if quarantine.counts:
        print(
            f"warning: {quarantine.counts.total()} rows were put aside ({quarantine.describe()}): see "
            f"{quarantine.path}",
            file=sys.stderr,
        )


def run_contrast(options: argparse.Namespace) -> int:
    """`label contrast`: preference rows of two pools."""
    out = require_new(options.out)
    with quarantine_beside(out) as quarantine:
        rows = contrast(options.tuned, options.initial, quarantine)
        _say_put_aside(quarantine)
        write_lines(out, rows)
    prompts = len({json.dumps(row["prompt"]) for row in rows})
    print(f"{len(rows)} pairs of {prompts} prompts in {out}")
    return EXIT_OK
