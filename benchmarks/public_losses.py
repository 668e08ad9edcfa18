"""Losses and gradients of the objectives against public implementations, on random tensors.

    pip install --no-deps --target PUBLIC trl==1.16.0 verl==0.9.1 openrlhf==0.11.2 accelerate omegaconf \
        antlr4-python3-runtime==4.9.3 tensordict codetiming pyvers orjson
    PYTHONPATH=PUBLIC python -m benchmarks.public_losses

Theirs are called as they are: functions of verl and OpenRLHF, and the loss methods of TRL's trainers, which
get the log-probabilities that a model would have given. Ours are the product's functions with the settings of
the objective (`learner.presets`). Writes public_losses.json: of each pair the largest difference of loss and
of gradient over the seeds. Some differ by intent; those have a reason, and must differ.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.public_losses_cases import (
    Comparison,
    group_comparisons,
    other_comparisons,
    preference_comparisons,
    random_step,
)

RESULTS = Path(__file__).resolve().parent / "public_losses.json"
TOLERANCE = 1e-6
SEEDS = 5


def compare(comparison: Comparison) -> dict[str, Any]:
    """Largest differences of loss and gradient over the seeds, and the size of the gradients."""
    losses, gradients, sizes = [], [], []
    for seed in range(SEEDS):
        step = random_step(seed)
        found = []
        for function in (comparison.ours, comparison.theirs):
            leaf = step.new.clone().requires_grad_()
            loss = function(step, leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
            found.append((float(loss), torch.where(step.mask, gradient, 0.0)))
        (our, our_gradient), (their, their_gradient) = found
        losses.append(abs(our - their))
        gradients.append(float((our_gradient - their_gradient).abs().max()))
        sizes.append(float(our_gradient.abs().max()))
    return {
        "objective": comparison.objective,
        "implementation": comparison.implementation,
        "loss_difference": max(losses),
        "gradient_difference": max(gradients),
        "largest_gradient": min(sizes),
        "differs_because": comparison.because,
    }


def main() -> None:
    """Compare all, write the results; exit 1 where one is not as it should be."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    rows = []
    for comparison in (*group_comparisons(), *preference_comparisons(), *other_comparisons()):
        row = compare(comparison)
        agrees = max(row["loss_difference"], row["gradient_difference"]) <= TOLERANCE
        row["as_expected"] = agrees != bool(comparison.because) and row["largest_gradient"] > 1e-4
        rows.append(row)
        verdict = "agrees" if agrees else f"differs: {comparison.because or 'NOT EXPLAINED'}"
        print(
            f"{row['objective']:26s} {row['implementation']:9s} loss {row['loss_difference']:.1e}, gradient "
            f"{row['gradient_difference']:.1e} of {row['largest_gradient']:.1e}: {verdict}"
        )
    versions = {name: importlib.metadata.version(name) for name in ("trl", "verl", "openrlhf", "torch")}
    results = {
        "command": "python -m benchmarks.public_losses",
        "versions": versions,
        "machine": describe(),
        "tolerance": TOLERANCE,
        "seeds": SEEDS,
        "comparisons": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not all(row["as_expected"] for row in rows):
        raise SystemExit("not all as expected")


if __name__ == "__main__":
    main()
