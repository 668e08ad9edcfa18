"""The layout in W&B fits the table of metrics."""

import re

from cluster import metrics
from cluster.wandb_layout import SUMMARIES, definitions, sample_cells

NAMES = [metric.name for section in metrics.SECTIONS.values() for metric in section]


def test_summaries_are_of_metrics_that_exist() -> None:
    for name, summary in SUMMARIES.items():
        metric = metrics.lookup(name)
        assert metric is not None, name
        assert "<" not in metric.name or name.startswith("memory/"), name
        assert set(summary.split(",")) <= {"min", "max", "mean", "last"}


def test_each_metric_has_exactly_one_pattern_and_the_warm_up_its_own_axis() -> None:
    # Of two patterns for a name W&B does not say which holds; an exact name goes before a pattern.
    patterns = [one for one in definitions() if one.name.endswith("/*")]
    exact = {one.name: one for one in definitions() if not one.name.endswith("/*")}
    for name in NAMES:
        found = [one for one in patterns if re.fullmatch(re.escape(one.name[:-1]) + ".*", name)]
        assert len(found) == (1 if "/" in name else 0), name
        one = exact.get(name) or found[0]
        if not one.hidden:
            assert one.axis == ("warmup/step" if name.startswith("warmup/") else "learner_step"), name


def test_a_sample_becomes_typed_cells() -> None:
    row = {"prompt_id": 3, "prompt": "p", "reward": 1, "finished": True, "phase": None}
    assert sample_cells(5, {**row, "judge": "fair", "n": 2}) == [
        5,
        None,
        "3",
        "p",
        None,
        1.0,
        True,
        "judge: fair, n: 2",
    ]
