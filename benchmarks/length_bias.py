"""What a length bias of the labels does to reward models, and what ODIN and a length residual do about it.

    python -m benchmarks.length_bias [--part linear|transformer|all] [--seeds N] [--summarise]

On the coverage task a simulated annotator prefers by σ(Δgold + b·Δlength), for b in {0, 0.1, 0.2, 0.3}. The
labels train Bradley-Terry reward models, the same with the slope of reward on length taken out (residual),
and ODIN: linear ones on features made by hand, and tiny transformers from scratch through the learner that
`headrace train` uses. Responses have lengths from 1 to 32, most of them short as a policy's mostly are; two
more linear parts have uniform lengths, to 32 and to 24. Prompts of the test have sets of symbols that no
training prompt has. At each seed all biases and methods see the same responses.

1. Best of n: gold and proxy of the best by proxy of n = 1 … 128. Does gold turn over? Its peak is chosen on
   half of the prompts, at n ≤ 64; gold there less gold at 64 is measured on the other half, both ways round.
2. Length: the reward's correlation with length by method; accuracy on pairs of known gold order; and for
   the best of 16 against a single sample, the win rate by gold, by the biased annotator, and by the
   annotator with length controlled for.

The unit is the seed: intervals are 95 % t intervals over seeds, differences are paired. A claim passes where
its whole interval is beyond its bound; p-values (two-sided t) are Holm's over the claims of a part, without
the secondary ones: label accuracy beside gold accuracy. Each finished cell is added to length_bias.json at
once, so an interrupted benchmark goes on where it was.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from benchmarks.length_bias_figure import draw
from benchmarks.length_bias_models import Array, Lengths, LinearModels, Loss, TransformerModels, World
from benchmarks.length_bias_summary import BIASES, END, SIZES, Row, show, summarise
from benchmarks.machine import StolenTime, describe
from rewards.preferences.evaluation import accuracy, best_of_n, length_report, pearson, within_prompt_spearman
from rewards.preferences.length_control import fit_l1_logistic
from rewards.preferences.losses import length_residual_fit

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "length_bias.json"
FITS: dict[Loss, tuple[str, ...]] = {"bradley-terry": ("bradley-terry", "residual"), "odin": ("odin",)}
JUDGED, GROUPS = 16, 16  # win rates: best of 16, that many times a prompt
PENALTY = 10.0  # C of the length-controlled win rate, instead of a cross-validated one for each model


@dataclass(frozen=True, slots=True)
class Settings:
    """What a part's figures hang on; results that were made with others are not added to."""

    pairs: int
    prompts: int
    samples: int
    lengths: Lengths
    model: dict[str, Any] = field(default_factory=dict)


PARTS = {
    "linear": Settings(pairs=1000, prompts=64, samples=512, lengths="tail"),
    "linear-32": Settings(pairs=1000, prompts=64, samples=512, lengths="uniform-32"),
    "linear-24": Settings(pairs=1000, prompts=64, samples=512, lengths="uniform-24"),
    "transformer": Settings(
        pairs=6000,
        prompts=32,
        samples=512,
        lengths="tail",
        model={
            "shape": {"hidden_size": 64, "layers": 2, "heads": 2},
            "warmup": 600,
            "epochs": 3,
            "batch_size": 64,
            "lr": 2e-3,
            "scored_pairs": 1000,
        },
    ),
}
SEEDS = {"linear": 8, "linear-32": 8, "linear-24": 8, "transformer": 5}


# ---- One reward model --------------------------------------------------------------------------------------


def rewards_by_method(
    world: World, scored: Any, train: Array, test: Array, loss: Loss
) -> dict[str, tuple[float, Array]]:
    """(slope, rewards of the held-out responses) of each method that a fit gives.

    The rewards have mean 0 and variance 1 on the training responses, after the residual method has taken out
    the slope of reward on length within training prompts.
    """
    length, place = world.train.length[scored], world.train.place[scored]
    found = {}
    for method in FITS[loss]:
        slope = 0.0
        if method == "residual":
            slope, _ = length_residual_fit(
                torch.from_numpy(train), torch.from_numpy(length), torch.from_numpy(place)
            )
        rest = train - slope * length
        found[method] = (slope, (test - slope * world.test.length - rest.mean()) / rest.std())
    return found


def measure(world: World, rewards: Array, bias: float) -> Row:
    """Every figure of one reward model, on the held-out responses."""
    test = world.test
    by_prompt = [values.reshape(world.prompts, world.samples) for values in (rewards, test.gold, test.length)]
    proxy, gold, length = by_prompt
    gold_curves = np.stack([best_of_n(p, g, SIZES) for p, g in zip(proxy, gold, strict=True)])
    proxy_curves = np.stack([best_of_n(p, p, SIZES) for p in proxy])
    length_curves = np.stack([best_of_n(p, s, SIZES) for p, s in zip(proxy, length, strict=True)])
    turn, peaks = turnover(gold_curves)
    few = slice(0, 64)
    place = np.repeat(np.arange(world.prompts), len(range(world.samples)[few]))
    flat = [values[:, few].ravel() for values in by_prompt]
    report = length_report(flat[0], flat[2], place, flat[1])
    rank = within_prompt_spearman(flat[0], flat[1], place)
    return {
        "gold": gold_curves.mean(axis=0).tolist(),
        "proxy": proxy_curves.mean(axis=0).tolist(),
        "turnover": turn,
        "peaks": peaks,
        "length_of_best": length_curves.mean(axis=0).tolist(),
        "correlation": _value(report.pearson),
        "correlation_within": _value(report.pearson_within),
        "spearman_within": _value(report.spearman_within),
        "partial_within": _value(report.partial_within),
        "spearman_gold": _value(rank),
        **accuracies(world, proxy, bias),
        **win_rates(proxy, gold, length, bias),
    }


def turnover(curves: Array) -> tuple[float, list[int]]:
    """gold(peak) − gold(64), the peak (n ≤ 64) chosen on one half of the prompts, measured on the other.

    A curve that rises to the end gives 0, one that falls from the start has its peak at 1. The mean of both
    ways round, and the two peaks; curves: (prompts, sizes).
    """
    halves = [curves[0::2].mean(axis=0), curves[1::2].mean(axis=0)]
    places = [int(np.argmax(half[: END + 1])) for half in halves]
    falls = [halves[1][places[0]] - halves[1][END], halves[0][places[1]] - halves[0][END]]
    return float(np.mean(falls)), [SIZES[place] for place in places]


def accuracies(world: World, proxy: Array, bias: float) -> Row:
    """Shares of held-out pairs ordered as gold does (gold ties left out), and as labels of this bias do."""
    first, second = np.split(np.arange(world.prompts * world.samples).reshape(-1, 2).T.ravel(), 2)
    gold, flat, texts = world.test.gold, proxy.ravel(), world.test.texts
    better, worse = np.where(gold[first] > gold[second], (first, second), (second, first))
    told = gold[better] > gold[worse]
    by_gold = accuracy(flat[better[told]], flat[worse[told]])
    annotator, test = world.annotator(bias), world.test
    labelled = [
        (a, b) if annotator.prefers_first(test.prompts[a], test.candidate(a), test.candidate(b)) else (b, a)
        for a, b in zip(first[::16].tolist(), second[::16].tolist(), strict=True)
        if texts[a] != texts[b]
    ]
    chosen, rejected = np.array(labelled).T
    by_label = accuracy(flat[chosen], flat[rejected])
    return {"accuracy_gold": by_gold.value, "accuracy_labels": by_label.value}


def ceiling(world: World) -> Row:
    """What is left of gold itself once its own slope on length is taken out, as the residual method does.

    Where good responses are shorter, a reward that does not go with length cannot have their whole order. Of
    those linear in gold and length, this one is nearest to gold.
    """
    train, test = world.train, world.test
    slope, _ = length_residual_fit(
        torch.from_numpy(train.gold), torch.from_numpy(train.length), torch.from_numpy(train.place)
    )
    rest = test.gold - slope * test.length
    return {
        "correlation_of_gold": _value(pearson(test.gold, test.length, test.place)),
        "correlation": _value(pearson(rest, test.length, test.place)),
        **accuracies(world, rest.reshape(world.prompts, world.samples), bias=0.0),
    }


def win_rates(proxy: Array, gold: Array, length: Array, bias: float) -> Row:
    """The best of 16 by proxy against a sample, as gold, the biased annotator and length control see it."""
    prompts, used = len(proxy), GROUPS * JUDGED
    groups = proxy[:, :used].reshape(prompts, GROUPS, JUDGED)
    best = groups.argmax(axis=2) + JUDGED * np.arange(GROUPS)
    base = np.broadcast_to(used + np.arange(GROUPS), best.shape)
    better, longer = (
        (np.take_along_axis(values, best, axis=1) - np.take_along_axis(values, base, axis=1)).ravel()
        for values in (gold, length)
    )
    judged = expit(better + bias * longer)
    x = np.stack([np.ones(len(longer)), np.tanh(longer / longer.std(ddof=1))], axis=1)
    theta = float(fit_l1_logistic(x, judged, PENALTY)[0])
    return {
        "win_gold": float(expit(better).mean()),
        "win_raw": float(judged.mean()),
        "win_controlled": float(expit(theta)),
    }


def _value(estimate: Any) -> float | None:
    return None if estimate is None else float(estimate.value)


# ---- Cells -------------------------------------------------------------------------------------------------


def run_part(name: str, seeds: int, results: Row, save: Callable[[], None]) -> None:
    """All cells of a part that are not there yet."""
    part, settings = results["parts"][name], PARTS[name]
    done = {(row["seed"], row["bias"], row["method"]) for row in part["rows"]}
    ceilings = part.setdefault("ceilings", [])
    for seed in range(seeds):
        todo: list[tuple[float, Loss]] = [
            (bias, loss)
            for bias in BIASES
            for loss, methods in FITS.items()
            if (seed, bias, methods[0]) not in done
        ]
        with_ceiling = any(row["seed"] == seed for row in ceilings)
        if not todo and with_ceiling:
            continue
        world = World(
            seed,
            pairs=settings.pairs,
            prompts=settings.prompts,
            samples=settings.samples,
            lengths=settings.lengths,
        )
        if not with_ceiling:
            ceilings.append({"seed": seed, **ceiling(world)})
            save()
        if not todo:
            continue
        with tempfile.TemporaryDirectory() as folder:
            models = (
                LinearModels(world)
                if name != "transformer"
                else TransformerModels(world, Path(folder) / "model", **settings.model)
            )
            for bias, loss in todo:
                began = time.perf_counter()
                train, test = models.fit(bias, loss)
                seconds = time.perf_counter() - began
                for method, (slope, rewards) in rewards_by_method(
                    world, models.scored, train, test, loss
                ).items():
                    row = {"seed": seed, "bias": bias, "method": method, "slope": slope}
                    row |= measure(world, rewards, bias) | {"fit_seconds": round(seconds, 2)}
                    part["rows"].append(row)
                    print_row(name, row)
                save()


def print_row(name: str, row: Row) -> None:
    """One line as a cell ends."""
    gold = " ".join(f"{value:5.2f}" for value in row["gold"])
    print(
        f"{name:11s} seed {row['seed']} b {row['bias']:.1f} {row['method']:13s} gold of best {gold}  "
        f"ρ {row['correlation']:+.3f}  accuracy {row['accuracy_gold']:.3f}  fit {row['fit_seconds']:.1f} s",
        flush=True,
    )


# ---- Command -----------------------------------------------------------------------------------------------


def open_results(path: Path, parts: list[str]) -> Row:
    """What is there already; ValueError where it was made with other settings."""
    results: Row = {
        "command": "python -m benchmarks.length_bias",
        "biases": BIASES,
        "sizes": SIZES,
        "parts": {},
    }
    if path.exists():
        results |= json.loads(path.read_text(encoding="utf-8"))
    for name in parts:
        mine = json.loads(json.dumps(asdict(PARTS[name])))
        part = results["parts"].setdefault(name, {"settings": mine, "machine": describe(), "rows": []})
        if part["settings"] != mine:
            raise ValueError(
                f"{path}: its part {name!r} was made with {part['settings']}, this is {mine}: remove "
                "the part, or name another file with --output"
            )
    return results


def write(path: Path, results: Row) -> None:
    """The whole file or none of it; numbers have six digits, and lists and objects of them a line each."""
    text = json.dumps(shortened(results), indent=1)
    text = re.sub(r"[\[{]\s+[^][{}]*[]}]", lambda found: " ".join(found[0].split()), text)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def shortened(value: Any) -> Any:
    """The same with six significant digits in every number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: shortened(part) for name, part in value.items()}
    return [shortened(part) for part in value] if isinstance(value, list | tuple) else value


def main() -> None:
    """Run what is missing, write after each cell, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=["linear", "transformer", "all"], default="all")
    parser.add_argument("--seeds", type=int, help=f"seeds of each part; unset: {SEEDS}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the picture goes beside it")
    parser.add_argument("--summarise", action="store_true", help="only print and draw what is there")
    options = parser.parse_args()
    parts = [name for name in PARTS if options.part in ("all", name.split("-")[0])]
    try:
        results = open_results(options.output, [] if options.summarise else parts)
    except ValueError as error:
        parser.error(str(error))
    for name in [] if options.summarise else parts:
        began, part = time.monotonic(), results["parts"][name]
        before, stolen = part.get("seconds", 0.0), StolenTime(began)

        def save(part: Row = part, began: float = began, before: float = before) -> None:
            part["seconds"] = round(before + time.monotonic() - began, 1)
            write(options.output, results)

        rows = len(part["rows"])
        run_part(name, options.seeds or SEEDS[name], results, save)
        if len(part["rows"]) > rows:
            part["cpu_stolen_fraction"] = stolen.share(time.monotonic())
    for name, part in results["parts"].items():
        part["summary"] = summarise(part["rows"], part.get("ceilings", []))
        if part["summary"] is not None:
            show(name, part["summary"])
    write(options.output, results)
    draw(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
