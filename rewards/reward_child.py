"""The child process for code that may not end: a user's reward function, or a regular expression.

Run as a script by `rewards.child_process`, with an interpreter of its own and only the standard library, so
that it starts fast and shares nothing with torch or Ray. It speaks JSON lines on copies of its standard
input and output; the originals then point elsewhere, so that printing cannot garble an answer.

    parent: {"load": ..., "memory_bytes": n, "path": [...], "secrets": [names of variables]}
    child:  {"ready": true} | {"error": text}
    parent: {"id": n, "args": [...]}
    child:  {"id": n, "result": ...} | {"id": n, "error": text}
"""

import errno
import fcntl
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HIDDEN = "[redacted]"
SHORTEST_SECRET = 8  # shorter values would be found in ordinary words
MAX_TEXT = 500  # characters of a user's exception or value that are worth reporting
MAX_KEY = 100  # characters of the name of a number beside the reward
REWARD_KEYS = ("reward", "score")


class RefusedError(Exception):
    """What was loaded or returned is not usable; the message says what it was."""


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    die_with_parent(int(sys.argv[1]))

    setup = json.loads(requests.readline())
    sys.path[:] = list(dict.fromkeys([*setup["path"], *sys.path]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_address_space(setup["memory_bytes"])
    secrets = [os.environ[name] for name in setup["secrets"] if name in os.environ]
    try:
        call = load(setup["load"])
    except BaseException as error:  # noqa: BLE001 - reported to the parent, which refuses the configuration
        send(replies, {"error": describe(error, secrets)})
        return
    send(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        send(replies, {"id": request["id"], **answer(call, request["args"], secrets)})


def die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process group when the parent's end of the `lifeline` pipe closes.

    The signal needs no cooperation: it also ends code that never returns to the interpreter. (A death
    signal from prctl would also fire when merely the thread that started us ends.)
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):  # the parent was gone before the signal was armed
        os.killpg(os.getpgrp(), signal.SIGKILL)


def limit_address_space(wanted: int) -> None:
    """Set RLIMIT_AS, or keep a lower limit that is already in force."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def send(replies: Any, message: dict[str, Any]) -> None:
    """Write one JSON line whole: a write to a pipe may be short, and user code's signals may interrupt it."""
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[replies.write(data) :]


def answer(call: Callable[..., Any], arguments: list[Any], secrets: Sequence[str] = ()) -> dict[str, Any]:
    """Call it; whatever it raises, even SystemExit, becomes an error with a message."""
    try:
        return {"result": call(*arguments)}
    except BaseException as error:  # noqa: BLE001 - reported to the parent as a typed reward error
        return {"error": describe(error, secrets)}


# --- Loading ---------------------------------------------------------------------------------------------


def load(spec: Mapping[str, str]) -> Callable[..., Any]:
    """Turn `{"pattern"}`, `{"module", "attribute"}` or `{"file", "attribute"}` into what answers requests."""
    if "pattern" in spec:
        return searcher(re.compile(spec["pattern"]))
    source = spec.get("file") or spec["module"]
    module = module_of_file(spec["file"]) if "file" in spec else importlib.import_module(spec["module"])
    target: Any = module
    for name in spec["attribute"].split("."):
        if not hasattr(target, name):
            public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
            raise RefusedError(
                f"{source!r} has no {spec['attribute']!r}; it has {', '.join(public) or 'nothing'}"
            )
        target = getattr(target, name)
    if not callable(target):
        raise RefusedError(
            f"{spec['attribute']!r} of {source!r} is a {type(target).__name__}, not a function"
        )
    refuse_wrong_signature(target)
    return lambda prompt, completion, row: result_of(target(prompt, completion, row))


def module_of_file(path: str) -> ModuleType:
    """Import a file as Python runs a script: its folder comes first on the path, for files beside it."""
    sys.path.insert(0, str(Path(path).parent))
    name = Path(path).stem
    if name in sys.modules:  # a file called json.py must not replace the standard library's
        name = f"reward_file_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RefusedError(f"{path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look a module up by its name
    spec.loader.exec_module(module)
    return module


def refuse_wrong_signature(function: Callable[..., Any]) -> None:
    """Refuse a function that three positional arguments do not fit, before any completion is sampled."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-ins may have none
        return
    try:
        signature.bind("prompt", "completion", {})
    except TypeError as error:
        raise RefusedError(
            f"it takes {signature}, but is called as (prompt, completion, row): {error}"
        ) from None


def searcher(pattern: re.Pattern[str]) -> Callable[[str], dict[str, Any]]:
    """Answers whether `pattern` is found in a text, and what its group 1 is there."""

    def search(text: str) -> dict[str, Any]:
        match = pattern.search(text)
        return {"found": match is not None, "group": match.group(1) if match and pattern.groups else None}

    return search


# --- Results ---------------------------------------------------------------------------------------------


def result_of(value: Any) -> dict[str, Any]:
    """Normalise what a function returned to `{"reward": float, "components": {name: float}}`.

    Of a mapping's other entries numbers are kept (a flag counts as 0 or 1, so that its mean is a share);
    text and the like is the user's own note and not logged.
    """
    if not isinstance(value, Mapping):
        return {"reward": number(value, "it returned"), "components": {}}
    key = next((key for key in REWARD_KEYS if key in value), None)
    if key is None:
        keys = ", ".join(shown(name) for name in value) or "none"
        raise RefusedError(f"it returned a mapping without 'reward'; its keys: {keys}")
    components = {}
    for name, entry in value.items():
        if name == key:
            continue
        if not isinstance(name, str) or not name:
            raise RefusedError(f"it returned a mapping with the key {shown(name)}; keys must be text")
        if not name.isprintable() or len(name) > MAX_KEY:
            raise RefusedError(
                f"it returned a mapping with the key {name[:MAX_KEY]!a}; keys name metrics: at most "
                f"{MAX_KEY} characters that can be printed"
            )
        if is_flag(entry):
            components[name] = float(bool(entry))
        elif hasattr(entry, "__float__"):
            components[name] = number(entry, f"it returned a mapping whose {name!r} is")
    return {"reward": number(value[key], f"it returned a mapping whose {key!r} is"), "components": components}


def is_flag(value: Any) -> bool:
    """A bool of Python or of numpy."""
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def number(value: Any, what: str) -> float:
    """A finite float of a number-like value (numpy and torch scalars too), or a refusal that shows it."""
    if is_flag(value):
        return float(bool(value))
    if inspect.iscoroutine(value):
        value.close()
        raise RefusedError(f"{what} a coroutine; a reward function cannot be async")
    if not hasattr(value, "__float__"):
        raise RefusedError(f"{what} {shown(value)} ({type(value).__name__}); return a number")
    try:
        result = float(value)
    except Exception as error:  # noqa: BLE001 - a value's own __float__ is user code
        raise RefusedError(
            f"{what} {shown(value)} ({type(value).__name__}), not one number: {error}"
        ) from None
    if not math.isfinite(result):
        raise RefusedError(f"{what} {result}; a reward must be a finite number")
    return result


def shown(value: Any) -> str:
    """A short representation."""
    text = repr(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


def spellings(secret: str) -> list[str]:
    """How a secret may stand in a text, the longest first: plainly, quoted as in Python or JSON, in a URL."""
    from urllib.parse import quote, quote_plus

    in_address = (way(secret, safe="", errors="surrogateescape") for way in (quote, quote_plus))
    found = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], *in_address}
    return sorted(found, key=len, reverse=True)


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """The text without these values, however they are spelled."""
    long = {value for value in secrets if len(value) >= SHORTEST_SECRET}
    for secret in sorted(long, key=len, reverse=True):  # one may be part of another
        for spelling in spellings(secret):
            text = text.replace(spelling, HIDDEN)
    return text


def describe(error: BaseException, secrets: Sequence[str] = ()) -> str:
    """Type, message and innermost line of an exception; a refusal is its own description.

    Secrets are hidden before a long message is cut, which would leave part of one.
    """
    if isinstance(error, RefusedError):
        return without_secrets(str(error), secrets)
    text = f"it raised {type(error).__name__}"
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - an exception's own __str__ is user code too
        message = "(its message cannot be shown)"
    if message:
        text += f": {without_secrets(message, secrets)[:MAX_TEXT]}"
    trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in trace if frame.filename != __file__ and "importlib" not in frame.filename]
    if frames:
        last = frames[-1]
        line = without_secrets(str(last.line), secrets)
        text += f" (line {last.lineno} of {last.filename}, in {last.name}: {line})"
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        text += "; it may need more than scoring.reward_memory_gib allows"
    return text


if __name__ == "__main__":
    main()
