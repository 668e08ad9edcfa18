"""From demonstrations with several modes to a policy: which methods cover them, which stay valid (E2).

    python -m benchmarks.imitation_modes [--seeds 8]

Writes imitation_modes.json and imitation_modes.png. Responses are the 4096 sequences of 6 tokens over 4, so
that every law is known exactly. Demonstrations follow four templates with frequencies .4/.3/.2/.1, and with
2 % are uniform noise; templates differ in at least four places. Two families of policies: *factorised*, each
place by itself, which cannot have two templates without what lies between them; *autoregressive*, with a
logit for every prefix, which can have any law. All methods of a seed see the same 2000 demonstrations and
begin with the same supervised policy:

    sft            maximum likelihood: the forward KL to the demonstrations
    logit          policy gradient on the logit of the best possible discriminator: the reverse KL
    -log(1-D)      policy gradient on −log(1 − D): Jensen-Shannon
    … learned      the same with a small network, trained on demonstrations against samples
    spin           ten iterations of DPO, demonstrations against the policy's own samples
    best of n      of 16 supervised samples, by a reward model of supervised over initial samples (Init-SFT)
    best of n, d*  the same by that reward's closed form, log π_SFT − log π_initial

Validity is the mass on the four templates, coverage the share of templates with at least half of their
demonstrated mass, entropy that of the whole law. The unit of statistics is the seed; intervals are 95 % t.

Expected, factorised: reverse-KL validity less that of sft is at least .3, and sft's entropy less the reverse
KL's above 0, both intervals without 0. The autoregressive family is reported as it falls: with enough
capacity and steps all divergences have one optimum.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from actors.decoding.best_of_n import best_of_n_law
from benchmarks.machine import describe
from cluster.drawing import BLUE, GREEN, GREY, ORANGE, RED, STYLE
from learner.discriminator_objectives import best_logit, discriminator_loss
from learner.preference_objectives import dpo_loss
from rewards.models.discriminator import discriminator_reward
from rewards.preferences.losses import bradley_terry
from rewards.tasks.modes import WEIGHTS

HERE = Path(__file__).resolve().parent
TOKENS, PLACES = 4, 6
COUNT = TOKENS**PLACES
NOISE = 0.02
APART = 4  # places in which two templates differ, at least
DEMONSTRATIONS = 2000
BATCH = 256
POLICY_STEPS, POLICY_LR = 600, 0.05
SFT_STEPS = {"factorised": 300, "autoregressive": 300}
BEST_OF = 16
SPIN_ITERATIONS, SPIN_STEPS, SPIN_BETA = 10, 60, 0.1
FORMS = ("logit", "-log(1-D)")
FAMILIES = ("factorised", "autoregressive")

Array = NDArray[np.float64]
SEQUENCES = torch.cartesian_prod(*[torch.arange(TOKENS)] * PLACES)  # (4096, 6), the first token slowest
ONE_HOT = F.one_hot(SEQUENCES, TOKENS).float().reshape(COUNT, -1)


class Policy:
    """A law over the 4096 responses: at each place a softmax, one for all prefixes or one for each."""

    def __init__(self, family: str, seed: int) -> None:
        """The initial policy: nearly uniform, drawn from the seed."""
        draw = torch.Generator().manual_seed(seed)
        prefixes = [TOKENS**place if family == "autoregressive" else 1 for place in range(PLACES)]
        self.logits = [
            (0.3 * torch.randn(count, TOKENS, generator=draw)).requires_grad_() for count in prefixes
        ]

    def copy(self) -> "Policy":
        """The same policy with weights of its own."""
        other = object.__new__(Policy)
        other.logits = [one.detach().clone().requires_grad_() for one in self.logits]
        return other

    def log_probs(self) -> Tensor:
        """(4096,) log π, in the order of `SEQUENCES`."""
        total = torch.zeros(1)
        for logits in self.logits:
            total = (total[:, None] + torch.log_softmax(logits, -1)).reshape(-1)
        return total

    def law(self) -> Tensor:
        """(4096,) π, detached."""
        return self.log_probs().detach().exp()


@dataclass(frozen=True)
class World:
    """What a seed has: templates, the law of demonstrations, and those that were drawn."""

    templates: Tensor
    law: Tensor
    demonstrations: Tensor
    draw: torch.Generator

    @classmethod
    def of(cls, seed: int) -> "World":
        """Draw templates that are apart, then demonstrations."""
        draw = torch.Generator().manual_seed(1000 + seed)
        while True:
            templates = torch.randperm(COUNT, generator=draw)[: len(WEIGHTS)]
            different = (SEQUENCES[templates][:, None] != SEQUENCES[templates][None]).sum(-1)
            if int(different[~torch.eye(len(WEIGHTS), dtype=torch.bool)].min()) >= APART:
                break
        law = torch.full((COUNT,), NOISE / COUNT)
        law[templates] += (1 - NOISE) * torch.tensor(WEIGHTS)
        return cls(templates, law, torch.multinomial(law, DEMONSTRATIONS, True, generator=draw), draw)

    def sample(self, law: Tensor, count: int) -> Tensor:
        """(count,) numbers of responses."""
        return torch.multinomial(law, count, True, generator=self.draw)

    def batch(self) -> Tensor:
        """Demonstrations, drawn with replacement."""
        return self.demonstrations[torch.randint(DEMONSTRATIONS, (BATCH,), generator=self.draw)]

    def measures(self, law: Tensor) -> dict[str, float]:
        """What a law is worth, exactly."""
        law = law.double()
        modes = law[self.templates]
        covered = modes >= 0.5 * (1 - NOISE) * torch.tensor(WEIGHTS, dtype=torch.float64)
        mine, theirs = law.clamp(min=1e-300).log(), self.law.double().log()
        return {
            "validity": float(modes.sum()),
            "coverage": float(covered.double().mean()),
            "entropy": float(-(law * mine).sum()),
            "reverse_kl": float((law * (mine - theirs)).sum()),
        }


# ---- methods ----------------------------------------------------------------------------------------------


def supervised(world: World, start: Policy, steps: int) -> Policy:
    """Maximum likelihood of the demonstrations."""
    policy = start.copy()
    share = torch.bincount(world.demonstrations, minlength=COUNT) / DEMONSTRATIONS
    optimizer = torch.optim.Adam(policy.logits, lr=POLICY_LR)
    for _ in range(steps):
        _update(optimizer, -(share * policy.log_probs()).sum())
    return policy


def adversarial(world: World, start: Policy, form: str, *, learned: bool) -> Tensor:
    """Policy gradient with the batch's mean as baseline, on the reward of a discriminator's logit."""
    policy = start.copy()
    optimizer = torch.optim.Adam(policy.logits, lr=POLICY_LR)
    judge = Judge(world.draw) if learned else None
    for step in range(POLICY_STEPS):
        log_probs = policy.log_probs()
        law = log_probs.detach().exp()
        samples = world.sample(law, BATCH)
        if judge is None:
            logits = best_logit(world.law, law.clamp(min=1e-30), 0.0)[samples]
        else:
            for _ in range(50 if step == 0 else 3):
                judge.discriminate(world.batch(), world.sample(law, BATCH))
            logits = judge.scores(samples)
        reward = discriminator_reward(logits, form)  # type: ignore[arg-type]
        _update(optimizer, -((reward - reward.mean()) * log_probs[samples]).mean())
    return policy.law()


def spin(world: World, start: Policy) -> Tensor:
    """Each iteration: demonstrations against samples of the policy it began with, which is the reference."""
    policy = start.copy()
    for _ in range(SPIN_ITERATIONS):
        reference, law = policy.log_probs().detach(), policy.law()
        optimizer = torch.optim.Adam(policy.logits, lr=POLICY_LR)
        for _ in range(SPIN_STEPS):
            ratios = policy.log_probs() - reference
            chosen, rejected = world.batch(), world.sample(law, BATCH)
            _update(optimizer, dpo_loss(ratios[chosen], ratios[rejected], beta=SPIN_BETA))
    return policy.law()


def best_of_n(world: World, tuned: Policy, initial: Policy, *, closed_form: bool) -> Tensor:
    """The exact law of the best of n supervised samples by the Init-SFT reward."""
    if closed_form:
        scores = (tuned.log_probs() - initial.log_probs()).detach()
    else:
        judge = Judge(world.draw)
        for _ in range(POLICY_STEPS):
            judge.prefer(world.sample(tuned.law(), BATCH), world.sample(initial.law(), BATCH))
        scores = judge.scores(torch.arange(COUNT))
    law = tuned.law().double()
    return torch.from_numpy(best_of_n_law((law / law.sum()).numpy(), scores.double().numpy(), BEST_OF))


class Judge:
    """A small network with one number for a response: a discriminator's logit, or a reward."""

    def __init__(self, draw: torch.Generator) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 30, (1,), generator=draw)))
            self._network = nn.Sequential(nn.Linear(TOKENS * PLACES, 64), nn.Tanh(), nn.Linear(64, 1))
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=3e-3)

    def __call__(self, responses: Tensor) -> Tensor:
        return torch.as_tensor(self._network(ONE_HOT[responses])[:, 0])

    def scores(self, responses: Tensor) -> Tensor:
        """Without a gradient."""
        with torch.no_grad():
            return self(responses)

    def discriminate(self, demonstrations: Tensor, samples: Tensor) -> None:
        """One update on demonstrations against samples."""
        both = torch.cat([demonstrations, samples])
        demonstrated = torch.arange(len(both)) < len(demonstrations)
        loss, _ = discriminator_loss(
            self(both),
            demonstrated,
            smoothing=0.0,
            demonstrations=len(demonstrations),
            responses=len(samples),
        )
        _update(self._optimizer, loss)

    def prefer(self, chosen: Tensor, rejected: Tensor) -> None:
        """One update on pairs."""
        loss, _ = bradley_terry(self(chosen), self(rejected))
        _update(self._optimizer, loss)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def run_seed(seed: int, family: str) -> dict[str, dict[str, float]]:
    """All methods in one world."""
    world, initial = World.of(seed), Policy(family, seed)
    tuned = supervised(world, initial, SFT_STEPS[family])
    methods: dict[str, Callable[[], Tensor]] = {"sft": tuned.law}
    for form in FORMS:
        methods[form] = partial(adversarial, world, tuned, form, learned=False)
        methods[f"{form} learned"] = partial(adversarial, world, tuned, form, learned=True)
    methods["spin"] = partial(spin, world, tuned)
    methods["best of n"] = partial(best_of_n, world, tuned, initial, closed_form=False)
    methods["best of n, d*"] = partial(best_of_n, world, tuned, initial, closed_form=True)
    return {name: world.measures(law()) for name, law in methods.items()}


# ---- results ----------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and half width of the 95 % t interval over seeds."""
    found = np.asarray(values, dtype=np.float64)
    half = float(stats.t.ppf(0.975, len(found) - 1)) * float(found.std(ddof=1)) / len(found) ** 0.5
    return {"mean": float(found.mean()), "ci95": half}


def summarise(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Each method's measures, and what the reverse KL differs by from sft, paired over seeds."""
    table = {
        method: {name: interval([one[method][name] for one in seeds]) for name in seeds[0][method]}
        for method in seeds[0]
    }
    gains = {
        method: {
            "validity_over_sft": interval(
                [one[method]["validity"] - one["sft"]["validity"] for one in seeds]
            ),
            "entropy_below_sft": interval([one["sft"]["entropy"] - one[method]["entropy"] for one in seeds]),
        }
        for method in seeds[0]
        if method != "sft"
    }
    return {"methods": table, "against_sft": gains}


def verdict(summary: dict[str, Any]) -> dict[str, bool]:
    """Whether the expectation holds, for the best possible discriminator and the learned one."""
    found = {}
    for method in ("logit", "logit learned"):
        gain = summary["against_sft"][method]
        validity, entropy = gain["validity_over_sft"], gain["entropy_below_sft"]
        certain = all(one["mean"] - one["ci95"] > 0 for one in (validity, entropy))
        found[method] = certain and validity["mean"] >= 0.3
    return found


def draw(families: dict[str, Any], path: Path) -> None:
    """Validity against coverage, a panel a family."""
    looks = {
        "sft": (GREY, "o"),
        "logit": (RED, "s"),
        "logit learned": (RED, "D"),
        "-log(1-D)": (ORANGE, "s"),
        "-log(1-D) learned": (ORANGE, "D"),
        "spin": (BLUE, "^"),
        "best of n": (GREEN, "v"),
        "best of n, d*": (GREEN, "P"),
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        for axes, (family, part) in zip(figure.subplots(1, len(families)), families.items(), strict=True):
            for method, measured in part["methods"].items():
                color, marker = looks[method]
                x, y = measured["coverage"], measured["validity"]
                axes.errorbar(
                    *(x["mean"], y["mean"]),
                    *(y["ci95"], x["ci95"]),
                    color=color,
                    marker=marker,
                    ms=7,
                    lw=1,
                    capsize=3,
                    ls="",
                    label=method,
                    alpha=0.85,
                )
            axes.set(xlim=(-0.05, 1.1), ylim=(-0.05, 1.1), xlabel="coverage", ylabel="validity")
            axes.set_title(f"{family} policy", loc="left", fontsize=10)
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=110)


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2")
    torch.set_num_threads(1)
    began = time.perf_counter()
    families: dict[str, Any] = {}
    for family in FAMILIES:
        seeds = [run_seed(seed, family) for seed in range(options.seeds)]
        families[family] = summarise(seeds) | {"seeds": seeds}
        for method, measured in families[family]["methods"].items():
            words = "  ".join(f"{k} {v['mean']:.3f} ± {v['ci95']:.3f}" for k, v in measured.items())
            print(f"{family:15s} {method:18s} {words}", flush=True)
    result = {
        "command": f"python -m benchmarks.imitation_modes --seeds {options.seeds}",
        "machine": describe(),
        "seconds": round(time.perf_counter() - began, 1),
        "seeds": options.seeds,
        "expectation_holds": verdict(families["factorised"]),
        "families": families,
    }
    print("expectation holds:", result["expectation_holds"])
    (options.out / "imitation_modes.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(families, options.out / "imitation_modes.png")


if __name__ == "__main__":
    main()
