"""The table that explains every metric."""

import re
from pathlib import Path

import pytest

from cluster import metrics


def test_the_page_of_metrics_is_the_generated_one() -> None:
    page = Path(metrics.__file__).parent.parent / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metrics.document(), "run: python -m cluster.metrics"


def test_names_are_found_exactly_or_by_family() -> None:
    names = [metric.name for section in metrics.SECTIONS.values() for metric in section]
    assert len(names) == len(set(names))

    def found(name: str) -> str | None:
        metric = metrics.lookup(name)
        return None if metric is None else metric.name

    assert found("reward/mean") == "reward/mean"
    assert found("reward/exact match") == "reward/<label>"
    assert found("reward/a/b") == "reward/<label>/<key>"
    assert found("reward/a/b/c") is None
    assert found("rewards/mean") is None
    assert found("timing_s/step") == "timing_s/step"
    assert found("timing_s/backward") == "timing_s/<stage>"


def test_an_entry_says_what_it_is_in_which_unit() -> None:
    for metric in (metric for section in metrics.SECTIONS.values() for metric in section):
        assert metric.meaning.endswith("."), metric.name
        assert all((metric.meaning, metric.unit, metric.healthy, metric.action)), metric.name
        assert "–" not in {metric.healthy, metric.action}, metric.name


ROOT = Path(metrics.__file__).parent.parent
NAME_IN_CODE = re.compile(r"""["']([a-z_0-9]+/[a-zA-Z_0-9/{}.\[\]]+)["']""")


NAMES = [metric.name for section in metrics.SECTIONS.values() for metric in section]


def names_in(source: Path) -> set[str]:
    """Texts in a source file that look like names of metrics."""
    prefixes = {name.split("/")[0] for name in NAMES}
    found = NAME_IN_CODE.findall(source.read_text())
    return {name for name in found if name.split("/")[0] in prefixes and not name.endswith("/")}


def documented(name: str) -> bool:
    """Whether an entry explains the name, or for a name with {…} some name that it can become."""
    plain = metrics.lookup(re.sub(r"\{[^}]*\}", "x", name)) is not None
    pattern = ".+".join(re.escape(part) for part in re.split(r"\{[^}]*\}", name))
    return plain or ("{" in name and any(re.fullmatch(pattern, known) for known in NAMES))


@pytest.mark.parametrize("package", ["cluster", "learner", "actors"])
def test_every_name_in_the_code_is_documented(package: str) -> None:
    found = {name: path.name for path in (ROOT / package).rglob("*.py") for name in names_in(path)}
    if package != "actors":
        assert len(found) > 20  # the search itself works
    undocumented = {name: file for name, file in found.items() if not documented(name)}
    assert undocumented == {}


def test_the_search_for_undocumented_names_finds_one(tmp_path: Path) -> None:
    source = tmp_path / "code.py"
    source.write_text(
        """row = {"lag/max": 1, "lag/no_such": 2, f"mismatch/{what}_by_lag/{lag}": 3, f"lag/{x}": 4}"""
    )
    assert names_in(source) == {"lag/max", "lag/no_such", "mismatch/{what}_by_lag/{lag}", "lag/{x}"}
    assert [name for name in sorted(names_in(source)) if not documented(name)] == ["lag/no_such"]
