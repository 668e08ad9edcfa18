"""What the label files hold, a line at a time: candidates of a pool, ranked pairs, annotations.

    pool line ─► Candidates ─► Pair ─► ranked line ─► Annotation ─► preference row

Responses are called `a` and `b` in a ranked line and in an annotation. Which of the two a person saw first is
another matter, and recorded beside the choice (`first`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from cluster.data_files import BadRow
from rewards.preferences.records import Prompt, pair_key, response_key

Name = Literal["a", "b"]
Choice = Literal["a", "b", "tie", "skip", "undo"]
CHOICES: tuple[str, ...] = get_args(Choice)
POOL_COLUMNS = ("prompt", "responses", "finished", "gold", "policy")
"""The columns of a pool that mean something here; any other belongs to the prompt's row and is handed on."""


@dataclass(frozen=True, slots=True)
class Side:
    """One response, and where it came from: line of the pool, number in that line, both as a file has them.

    `finished`: the policy ended it itself. `gold`: its true reward, where the pool knows it.
    """

    text: str
    line: int
    response: int
    finished: bool = True
    policy: str = ""
    gold: float | None = None

    def source(self) -> dict[str, Any]:
        """What a ranked line says of it besides its text and gold reward."""
        told = {"line": self.line, "response": self.response, "finished": self.finished}
        return told | ({"policy": self.policy} if self.policy else {})


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt with its distinct responses; `row` is what else its line has, `repeated` counts the others."""

    prompt: Prompt
    sides: tuple[Side, ...]
    row: Mapping[str, Any] = field(default_factory=dict)
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to compare, the rule that chose them, and its score of them (None where it has none)."""

    key: str
    prompt: Prompt
    a: Side
    b: Side
    rule: str
    score: float | None
    provenance: Mapping[str, Any]
    row: Mapping[str, Any] = field(default_factory=dict)

    def side(self, name: Name) -> Side:
        """The response of that name."""
        return self.a if name == "a" else self.b

    def to_json(self, rank: int) -> dict[str, Any]:
        """A line of a ranked file."""
        line: dict[str, Any] = {
            "rank": rank,
            "key": self.key,
            "prompt": self.prompt,
            "a": self.a.text,
            "b": self.b.text,
            "rule": self.rule,
            "score": self.score,
            "provenance": {"a": self.a.source(), "b": self.b.source(), **self.provenance},
        }
        if self.a.gold is not None and self.b.gold is not None:
            line["gold"] = {"a": self.a.gold, "b": self.b.gold}
        if self.row:
            line["row"] = dict(self.row)
        return line


@dataclass(frozen=True, slots=True)
class Annotation:
    """One key press, or one line that another tool wrote; `choice` is in terms of the ranked line's a and b.

    `first` is the response that was shown first, empty where that is not known; `line` its place in a file.
    """

    key: str
    choice: Choice
    annotator: str = ""
    first: Literal["a", "b", ""] = ""
    seconds: float | None = None
    time: str = ""
    margin: float | None = None
    line: int = 0

    def to_json(self) -> dict[str, Any]:
        """A line of an annotations file."""
        written = {"key": self.key, "choice": self.choice, "annotator": self.annotator, "first": self.first}
        more = {"seconds": self.seconds, "time": self.time or None, "margin": self.margin}
        return written | {name: value for name, value in more.items() if value is not None}


# ---- from lines -----------------------------------------------------------------------------------------


def parse_candidates(line: int, row: Mapping[str, Any]) -> Candidates:
    """A pool's line; raises BadRow."""
    prompt = parse_prompt(row.get("prompt"))
    responses = row.get("responses")
    if not isinstance(responses, list):
        raise BadRow("missing column", "'responses' is no list of texts")
    for number, text in enumerate(responses):
        if not isinstance(text, str):
            raise BadRow("wrong type", f"response {number} is a {type(text).__name__}, not a text")
    finished = _beside(row, "finished", responses, bool)
    gold = _beside(row, "gold", responses, (int, float))
    policy = row.get("policy", "")
    if not isinstance(policy, str):
        raise BadRow("wrong type", f"'policy' is a {type(policy).__name__}, not a text")
    sides: dict[str, Side] = {}
    for number, text in enumerate(responses):
        sides.setdefault(
            response_key(text),
            Side(
                text,
                line,
                number,
                finished=finished[number] if finished is not None else True,
                policy=policy,
                gold=float(gold[number]) if gold is not None else None,
            ),
        )
    rest = {name: value for name, value in row.items() if name not in POOL_COLUMNS}
    return Candidates(prompt, tuple(sides.values()), rest, len(responses) - len(sides))


def parse_prompt(value: Any) -> Prompt:
    """A text or chat messages; raises BadRow."""
    if isinstance(value, list):
        from cluster.chat import check_messages  # with it comes torch, seconds that texts need not wait for

        return check_messages(value)
    if not isinstance(value, str):
        kind = "missing" if value is None else f"a {type(value).__name__}"
        raise BadRow("missing column", f"'prompt' is {kind}, not a text or chat messages")
    if not value.strip():
        raise BadRow("empty prompt", "only white space")
    return value


def _beside(
    row: Mapping[str, Any], name: str, responses: Sequence[str], kind: type | tuple[type, ...]
) -> list[Any] | None:
    """An optional column with one value for each response."""
    values = row.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != len(responses):
        raise BadRow("wrong type", f"{name!r} is no list of {len(responses)} values, one for each response")
    for value in values:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadRow("wrong type", f"{name!r} holds {value!r:.40}")
    return values


def parse_pair(row: Mapping[str, Any]) -> Pair:
    """A ranked file's line; raises BadRow, also where its texts are not those that its key names."""
    prompt = parse_prompt(row.get("prompt"))
    texts = {name: row.get(name) for name in ("a", "b")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BadRow("missing column", f"{name!r} is no text")
    a, b = cast("str", texts["a"]), cast("str", texts["b"])
    key = pair_key(prompt, a, b)
    if row.get("key") != key:
        raise BadRow("changed pair", "prompt or responses are not those that its key names")
    told = row.get("provenance")
    gold = row.get("gold")
    told = told if isinstance(told, dict) else {}
    score = row.get("score")
    extra = row.get("row")
    return Pair(
        key,
        prompt,
        _side(a, told.get("a"), gold, "a"),
        _side(b, told.get("b"), gold, "b"),
        rule=str(row.get("rule", "")),
        score=_number(score, "score"),
        provenance={name: value for name, value in told.items() if name not in ("a", "b")},
        row=extra if isinstance(extra, dict) else {},
    )


def _side(text: str, told: Any, gold: Any, name: str) -> Side:
    told = told if isinstance(told, dict) else {}
    line, response = told.get("line"), told.get("response")
    return Side(
        text,
        line if isinstance(line, int) else 0,
        response if isinstance(response, int) else 0,
        finished=told.get("finished") is not False,
        policy=str(told.get("policy", "")),
        gold=_number(gold.get(name), "gold") if isinstance(gold, dict) else None,
    )


def parse_annotation(line: int, row: Mapping[str, Any]) -> Annotation:
    """An annotations file's line, or a ranked line into which a choice was written; raises BadRow."""
    key, choice = row.get("key"), row.get("choice")
    if not isinstance(key, str) or not key:
        raise BadRow("missing column", "'key' names no pair")
    if choice not in CHOICES:
        raise BadRow("bad choice", f"{choice!r:.40} is none of {', '.join(CHOICES)}")
    annotator, first, time = (row.get(name) or "" for name in ("annotator", "first", "time"))
    if not isinstance(annotator, str):
        raise BadRow("wrong type", f"'annotator' is a {type(annotator).__name__}, not a text")
    if first not in ("a", "b", ""):
        raise BadRow("wrong type", f"'first' is {first!r:.40}, not a or b")
    margin = _number(row.get("margin"), "margin")
    if margin is not None and margin < 0:
        raise BadRow("wrong type", f"'margin' is {margin:g}, below 0")
    return Annotation(
        key,
        cast("Choice", choice),
        annotator,
        cast("Literal['a', 'b', '']", first),
        seconds=_number(row.get("seconds"), "seconds"),
        time=str(time),
        margin=margin,
        line=line,
    )


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow("wrong type", f"{name!r} is {value!r:.40}, not a number")
    return float(value)


def as_line(row: Mapping[str, Any]) -> str:
    """JSON on one line."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
