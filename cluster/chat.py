"""Chat messages in the forms that people have, and how a template ends a message of the assistant's.

A message is `{"role", "content"}`, or `{"from", "value"}` as ShareGPT has it. Its content is a text, or a
list of parts `{"type": "text", "text": …}`.
"""

from pathlib import Path
from typing import Any

from actors.end_tokens import end_tokens
from cluster.data_files import BadRow
from rewards.models.foreign import render

Message = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_REPLY = "reply"


def check_messages(value: list[Any]) -> list[dict[str, Any]]:
    """Chat messages with a role and a text each, the last one not the assistant's; else BadRow."""
    if not value:
        raise BadRow("empty prompt", "no messages")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadRow("wrong type", f"message {number} is a {type(message).__name__}, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise BadRow("wrong type", f"message {number} has no text under {key!r}")
    if not any(message["content"].strip() for message in value):
        raise BadRow("empty prompt", "no message has text")
    if value[-1]["role"] == "assistant":
        raise BadRow("wrong type", "the last message is the assistant's, so there is nothing to answer")
    return value


def conversation(value: Any, column: str) -> list[Message]:
    """Chat messages with role and content, and what else they hold that is not null."""
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{column!r} is a {kind_of(value)}, no text or messages")
    if not value:
        raise BadRow("empty response", f"{column!r} has no messages")
    return [_message(one, number, column) for number, one in enumerate(value, start=1)]


def _message(value: Any, number: int, column: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow("wrong type", f"message {number} of {column!r} is a {kind_of(value)}, not an object")
    message = {name: content for name, content in value.items() if content is not None}
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message and other in message:
            message[name] = message.pop(other)
        if name == "content" and isinstance(message.get(name), list):
            message[name] = _joined(message[name], number, column)
        if not isinstance(message.get(name), str):
            raise BadRow("wrong type", f"message {number} of {column!r} has no text under {name!r}")
    message["role"] = _ROLES.get(message["role"], message["role"])
    return message


def _joined(parts: list[Any], number: int, column: str) -> str:
    """The text of a message in parts, one after the other, as chat templates write it."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        if kind != "text" or not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRow(
                "wrong type",
                f"message {number} of {column!r} has a part of type {kind!r}: only parts of type 'text' with "
                "a text can be read, so leave such messages out",
            )
    return "".join(part["text"] for part in parts)


def kind_of(value: object) -> str:
    """What JSON calls a value's type, in a word."""
    names = {str: "text", list: "list", dict: "object", bool: "flag", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def turn_end(tokenizer: Any) -> int:
    """The token with which the chat template ends the assistant's messages, if sampling stops at it.

    It does at those that the model beside the tokenizer names. Else, and without a template, the tokenizer's
    end token. The two are not always one: a template may end messages with a token for the end of a turn,
    where the tokenizer names that for the end of a text.
    """
    end = int(tokenizer.eos_token_id)
    if not tokenizer.chat_template:
        return end
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = render(tokenizer, talk, generation_prompt=False)
    except ValueError:
        return end  # it is refused with its reason where a prompt is rendered
    after = text.rpartition(_REPLY)[2]
    folder = Path(str(tokenizer.name_or_path))
    if not after or not (folder / "config.json").is_file():
        return end
    stops = end_tokens(str(folder), tokenizer)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((int(token) for token in ids if token in stops), end)
