"""One row to one pair, in the forms that people have, or BadRow with the reason why not.

    prompt          chosen, rejected
    text            texts                       the replies
    text, messages  messages                    the replies, or whole conversations that begin with the prompt
    messages        texts                       the replies
    (none)          messages                    whole conversations: what they share is the prompt
    (none)          texts                       whole dialogues: the prompt ends with the last mark of a
                                                reply, such as "\\n\\nAssistant:", in what they share

A message is `{"role", "content"}`, or `{"from", "value"}` as ShareGPT has it. Its content is a text, or a
list of parts `{"type": "text", "text": …}`.
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from cluster.chat import Message, check_messages, conversation, kind_of
from cluster.data_files import BadRow
from cluster.preferences.settings import PreferenceSettings
from rewards.preferences.records import Preference, Prompt, response_key

# What stands before a reply in the dialogues of common data sets.
REPLY_MARKS = (
    "\n\nAssistant:",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<start_of_turn>model\n",
    "<|assistant|>",
    "[/INST]",
    "### Response:",
    "### Assistant:",
    "\nASSISTANT:",
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]?")


def parse_pair(row: Mapping[str, Any], line: int, settings: PreferenceSettings) -> Preference:
    """The pair of a row; raises BadRow."""
    if settings.choice_column:
        row = _in_order(row, settings)
    chosen = _present(row, settings.chosen_column)
    rejected = _present(row, settings.rejected_column)
    prompt, chosen, rejected = _texts(row.get(settings.prompt_column), chosen, rejected, settings)
    prompt = _with_system(prompt, row, settings)
    if response_key(chosen) == response_key(rejected):
        raise BadRow("identical responses", "chosen and rejected are the same text")
    if settings.empty_responses == "put-aside":
        for name, text in ((settings.chosen_column, chosen), (settings.rejected_column, rejected)):
            if not text.strip():
                raise BadRow("empty response", f"{name!r} has no text")
    finished = _finished(row, settings)
    return Preference(
        prompt,
        chosen,
        rejected,
        margin=_margin(row, settings),
        weight=_not_negative(row, settings, "weight_column", 1.0),
        annotator=_name(row, settings, "annotator_column"),
        subset=_name(row, settings, "subset_column"),
        line=line,
        row={name: _present(row, name) for name in settings.keep_columns} or None,
        chosen_finished=finished[0],
        rejected_finished=finished[1],
    )


def _in_order(row: Mapping[str, Any], settings: PreferenceSettings) -> Mapping[str, Any]:
    """The row with the better response, and what belongs to it, in the columns of the chosen one."""
    value, *_ = (
        _present(row, name)
        for name in (settings.choice_column, settings.chosen_column, settings.rejected_column)
    )
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps is often saved as fractions
    choice = json.dumps(value) if isinstance(value, bool) else str(value).strip()
    first_better, second_better = settings.choices
    if choice == first_better:
        return row
    if choice != second_better:
        wanted = f"neither {first_better!r} nor {second_better!r}"
        raise BadRow("no choice", f"{settings.choice_column!r} is {choice[:40]!r}, {wanted}")
    turned = dict(row)
    for first, second in (
        (settings.chosen_column, settings.rejected_column),
        (settings.chosen_score_column, settings.rejected_score_column),
    ):
        for column, other in ((first, second), (second, first)):
            turned.pop(column, None)
            if other in row:
                turned[column] = row[other]
    finished = row.get(settings.finished_column)
    if isinstance(finished, dict):
        turned[settings.finished_column] = {
            "chosen": finished.get("rejected"),
            "rejected": finished.get("chosen"),
        }
    return turned


def _present(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        state = "null" if column in row else f"not among {', '.join(map(repr, row)) or 'no columns'}"
        raise BadRow("missing column", f"{column!r} is {state}")
    return value


# --- prompt and replies --------------------------------------------------------------------------------


def _texts(prompt: Any, chosen: Any, rejected: Any, settings: PreferenceSettings) -> tuple[Prompt, str, str]:
    """Prompt and two replies from any of the forms."""
    if prompt == []:
        raise BadRow("empty prompt", "no messages")
    if isinstance(prompt, list):
        prompt = check_messages(conversation(prompt, settings.prompt_column))
    elif not isinstance(prompt, str | None):
        raise BadRow("wrong type", f"{settings.prompt_column!r} is a {kind_of(prompt)}, no text or messages")
    if isinstance(prompt, str) and not prompt.strip():
        raise BadRow("empty prompt", "only white space")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _from_texts(prompt, chosen, rejected, settings)
    return _from_conversations(
        prompt,
        _reply_or_conversation(chosen, settings.chosen_column),
        _reply_or_conversation(rejected, settings.rejected_column),
        settings,
    )


def _from_texts(
    prompt: Prompt | None, chosen: str, rejected: str, settings: PreferenceSettings
) -> tuple[Prompt, str, str]:
    marks = (settings.reply_mark,) if settings.reply_mark else REPLY_MARKS
    if isinstance(prompt, list):
        return prompt, chosen, rejected
    if prompt is None:
        shared = chosen[: shared_length(chosen, rejected)]
        mark, end = _last_mark(shared, marks)
        if not mark:
            raise BadRow(
                "missing column",
                f"{settings.prompt_column!r} is missing, and what the responses share has no mark of a reply "
                f"such as {marks[0]!r} (preferences.reply_mark)",
            )
        prompt, chosen, rejected = shared[:end], chosen[end:], rejected[end:]
        if mark in chosen or mark in rejected:
            raise BadRow("several turns", f"the responses differ before their last {mark.strip()!r}")
        if not prompt.removesuffix(mark).strip():
            raise BadRow("empty prompt", f"nothing stands before {mark.strip()!r}")
    elif _ends_with_mark(prompt, marks) and chosen.startswith(prompt) and rejected.startswith(prompt):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if settings.dialogues == "messages" and prompt.rstrip().endswith("\n\nAssistant:"):
        return _dialogue(prompt), chosen.strip(), rejected.strip()
    return prompt, chosen, rejected


def shared_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _last_mark(text: str, marks: tuple[str, ...]) -> tuple[str, int]:
    """The mark that ends last in the text, and where it ends; ("", 0) if there is none."""
    found = [(text.rindex(mark) + len(mark), mark) for mark in marks if mark in text]
    end, mark = max(found, default=(0, ""))
    return mark, end


def _ends_with_mark(prompt: str, marks: tuple[str, ...]) -> bool:
    return any(prompt.rstrip().endswith(mark.rstrip()) for mark in marks)


def _dialogue(text: str) -> list[Message]:
    """`Human: …`, `Assistant: …` turns as chat messages; the open last turn is left out."""
    parts = _TURN.split(text)
    if parts[0].strip():
        raise BadRow("wrong type", "the dialogue has text before its first 'Human:' or 'Assistant:'")
    turns = [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return check_messages(turns[:-1])


def _reply_or_conversation(value: Any, column: str) -> list[Message]:
    """Messages that end with the assistant's; a text is such a message."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = conversation([value] if isinstance(value, dict) else value, column)
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise BadRow("wrong type", f"the last message of {column!r} is of role {role!r}, not 'assistant'")
    return messages


def _from_conversations(
    prompt: Prompt | None, chosen: list[Message], rejected: list[Message], settings: PreferenceSettings
) -> tuple[Prompt, str, str]:
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if not _same(chosen[i], rejected[i])), most)
    if len(chosen) != same + 1 or len(rejected) != same + 1:
        raise BadRow(
            "several turns",
            f"after {same} shared messages {len(chosen) - same} and {len(rejected) - same} follow: "
            "the responses must be one message each",
        )
    replies = chosen[-1]["content"], rejected[-1]["content"]
    shared = chosen[:same]
    if not shared:
        if prompt is None:
            raise BadRow(
                "missing column", f"{settings.prompt_column!r} is missing, and the responses share no message"
            )
        return prompt, *replies
    return _agreed(prompt, shared), *replies


def _agreed(prompt: Prompt | None, shared: list[Message]) -> list[Message]:
    """The prompt, given as a column and at the beginning of both conversations; BadRow if they disagree."""
    if prompt is None:
        return check_messages(shared)
    if isinstance(prompt, str):
        wanted = " ".join(prompt.split())
        contents = [" ".join(one["content"].split()) for one in shared]
        # The prompt's column may hold one of the messages, or all of them as some template wrote them.
        if wanted in contents or all(content in wanted for content in contents):
            return check_messages(shared)
    elif shared[0]["role"] == "assistant":  # the responses go on where the prompt stopped
        return check_messages([*prompt, *shared])
    else:
        spoken = [one for one in prompt if one["role"] != "system"]
        begun = [one for one in shared if one["role"] != "system"]
        if all(map(_same, spoken, begun)) and len(spoken) <= len(begun):
            has_system = shared[0]["role"] == "system" or prompt[0]["role"] != "system"
            return check_messages(shared if has_system else [prompt[0], *shared])
    raise BadRow("prompt disagrees", "the prompt is not how both conversations begin")


def _same(first: Message, second: Message) -> bool:
    return bool(first["role"] == second["role"] and first["content"].strip() == second["content"].strip())


def _with_system(prompt: Prompt, row: Mapping[str, Any], settings: PreferenceSettings) -> Prompt:
    """The prompt with the row's own system message before it, if it has none yet."""
    if not settings.system_column:
        return prompt
    system = row.get(settings.system_column)
    if system is not None and not isinstance(system, str):
        raise BadRow("wrong type", f"{settings.system_column!r} is a {kind_of(system)}, not a text")
    if not system or not system.strip():
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


# --- margin, weight, names, ends -----------------------------------------------------------------------


def _margin(row: Mapping[str, Any], settings: PreferenceSettings) -> float:
    if not settings.chosen_score_column:
        return settings.margin_scale * _not_negative(row, settings, "margin_column", 0.0)
    better = as_number(_present(row, settings.chosen_score_column), settings.chosen_score_column)
    worse = as_number(_present(row, settings.rejected_score_column), settings.rejected_score_column)
    if better < worse:
        raise BadRow("scores contradict", f"chosen scores {better:g}, rejected {worse:g}")
    return settings.margin_scale * (better - worse)


def _optional(row: Mapping[str, Any], settings: PreferenceSettings, field: str) -> Any:
    """The value of an optional column, None if the row has none and need not have it."""
    column = getattr(settings, field)
    if not column:
        return None
    return _present(row, column) if settings.required(field) else row.get(column)


def _not_negative(row: Mapping[str, Any], settings: PreferenceSettings, field: str, default: float) -> float:
    value = _optional(row, settings, field)
    if value is None:
        return default
    column = getattr(settings, field)
    number = as_number(value, column, unread(field))
    if number < 0:
        raise BadRow(f"negative {field.removesuffix('_column')}", f"{column!r} is {number:g}")
    return number


def as_number(value: Any, column: str, remedy: str = "") -> float:
    """A number, or a text that is one, as a float; BadRow for anything else, with the remedy."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("wrong type", f"{column!r} is a {kind_of(value)}, not a number{remedy}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise BadRow("non-finite number", f"{column!r} is too large")
    return number


def unread(field: str) -> str:
    """The end of a message on an optional column, for one that means something else in the user's file."""
    return f'; preferences.{field} = "" leaves the column unread'


def _name(row: Mapping[str, Any], settings: PreferenceSettings, field: str) -> str:
    value = _optional(row, settings, field)
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps is often saved as fractions
    if isinstance(value, bool) or not isinstance(value, str | int):
        told = (
            f"{getattr(settings, field)!r} is a {kind_of(value)}, not a text or whole number{unread(field)}"
        )
        raise BadRow("wrong type", told)
    return sys.intern(str(value).strip())


def _finished(row: Mapping[str, Any], settings: PreferenceSettings) -> tuple[bool, bool]:
    """Whether the chosen and the rejected response end where their text does; yes where nothing is said."""
    value = _optional(row, settings, "finished_column")
    if value is None:
        return True, True
    sides = [value.get(side) for side in ("chosen", "rejected")] if isinstance(value, dict) else []
    if not sides or not all(isinstance(side, bool | None) for side in sides):
        wanted = '{"chosen": true, "rejected": false}'
        told = f"{settings.finished_column!r} is not of the form {wanted}{unread('finished_column')}"
        raise BadRow("wrong type", told)
    return sides[0] is not False, sides[1] is not False
