"""The pictures of a policy's training on preferences, for the report of any run that has such metrics."""

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from cluster.drawing import BLUE, GREEN, GREY, ORANGE, RED, Draw, legend, trend
from cluster.report_data import RunData


def _heldout(run: RunData, name: str, axes: Axes, color: str = RED, label: str = "held out") -> bool:
    xs, ys = run.points(f"preference/heldout_{name}")
    if xs:
        axes.plot(xs, ys, "o--", color=color, ms=4, lw=1.1, label=label)
    return bool(xs)


def draw_loss(run: RunData, axes: Axes) -> bool:
    """Loss of training batches and of held-out examples."""
    drawn = trend(axes, run.points("loss/preference"), BLUE, "training batches")
    drawn = _heldout(run, "loss", axes) or drawn
    axes.set_ylabel("loss")
    legend(axes, "upper right")
    return drawn


def draw_accuracy(run: RunData, axes: Axes) -> bool:
    """Share of examples in the right order."""
    drawn = trend(axes, run.points("preference/accuracy"), BLUE, "training batches")
    drawn = _heldout(run, "accuracy", axes) or drawn
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("in the right order")
    legend(axes, "lower right")
    return drawn


def draw_rewards(run: RunData, axes: Axes) -> bool:
    """Implicit rewards of chosen and rejected responses."""
    drawn = trend(axes, run.points("preference/chosen_reward"), GREEN, "chosen")
    drawn = trend(axes, run.points("preference/rejected_reward"), ORANGE, "rejected") or drawn
    if drawn:
        axes.axhline(0.0, color=GREY, ls="--", lw=1.0)
    axes.set_ylabel("implicit reward")
    legend(axes, "best")
    return drawn


def draw_logprobs(run: RunData, axes: Axes) -> bool:
    """How likely the policy finds chosen and rejected responses."""
    drawn = trend(axes, run.points("preference/chosen_logprob"), GREEN, "chosen")
    drawn = trend(axes, run.points("preference/rejected_logprob"), ORANGE, "rejected") or drawn
    drawn = _heldout(run, "chosen_logprob", axes, GREEN, "chosen, held out") or drawn
    drawn = _heldout(run, "rejected_logprob", axes, ORANGE, "rejected, held out") or drawn
    axes.set_ylabel("log-probability of a response\n(nats)")
    legend(axes, "best")
    return drawn


PREFERENCE_PICTURES: tuple[tuple[str, str, str, Draw], ...] = (
    ("preference_loss", "Loss", "Held out it should not rise again.", draw_loss),
    (
        "preference_accuracy",
        "Accuracy of the implicit reward",
        "Ties count as wrong. Training far above held out: fewer epochs or more labels.",
        draw_accuracy,
    ),
    (
        "preference_rewards",
        "Implicit rewards",
        "How far the policy has moved from the reference on each side; the gap is the margin.",
        draw_rewards,
    ),
    (
        "preference_logprobs",
        "Log-probabilities",
        "Chosen responses often become less likely too; a steep fall harms the policy.",
        draw_logprobs,
    ),
)
