"""What libraries make of a model's folder from others: one message instead of their many exceptions."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_RENDER_S = 10.0
_LONGEST_TEXT = 10_000_000  # characters that a template may make
_LONGEST = 400  # characters of a library's own words
_OTHER_SHAPES = "ignore_mismatched_sizes"
_OWN_CODE = "trust_remote_code"


@contextmanager
def opening(what: str, remedy: str = "give a folder saved with save_pretrained") -> Iterator[None]:
    """Raise whatever goes wrong inside as a ValueError "`what` (why); `remedy`".

    Configurations, tokenizers and weights are others' text: with an odd value in the right place,
    transformers and tokenizers raise anything, a bare Exception too.
    """
    try:
        yield
    except Exception as error:  # told, with its cause; nothing but the opening stands inside
        raise ValueError(f"{what} ({in_words(error)}); {remedy}") from error


def in_words(error: Exception) -> str:
    """A library's exception in one line, without remedies that there are not here."""
    text = " ".join(str(error).split())
    if _OWN_CODE in text:
        return "it needs code of its own (auto_map), which is never run here"
    if _OTHER_SHAPES in text:
        return "its weights have other shapes than its config.json says"
    if not isinstance(error, ValueError | OSError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def refuse_nonfinite(what: str, model: Any) -> None:
    """ValueError if a weight is NaN or infinite: every probability, or score, would be NaN with it."""
    import torch

    for name, weight in model.named_parameters():
        if weight.numel() and weight.is_floating_point():
            low, high = torch.aminmax(weight.detach())  # both NaN where any entry is
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise ValueError(
                    f"{what}: its weights {name} have entries that are NaN or infinite; use a folder that "
                    "was saved before its training went wrong"
                )


def refuse_tokens_beyond(what: str, tokenizer: Any, vocabulary: int) -> None:
    """ValueError where texts could become tokens that a model with this vocabulary does not have.

    Special tokens may lie beyond it (padding that was added for another tool, say) if none is an end token or
    what the tokenizer puts around a text.
    """
    end = tokenizer.eos_token_id
    special = set(tokenizer.all_special_ids) - {end}
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= vocabulary and i not in special}
    beyond |= {i: tokenizer.convert_ids_to_tokens(i) for i in tokenizer("")["input_ids"] if i >= vocabulary}
    if beyond:
        first = min(beyond)
        raise ValueError(
            f"{what}: its tokenizer has {len(beyond)} tokens beyond the model's vocabulary of {vocabulary} "
            f"({beyond[first]!r} is {first}): save model and tokenizer that belong together, or give the "
            "model the tokens (resize_token_embeddings) and save it again"
        )


class TemplateRefusedError(ValueError):
    """A chat template that makes no text of these messages; the message says why."""


def render(tokenizer: Any, messages: list[dict[str, Any]], *, generation_prompt: bool = True) -> str:
    """The text that a tokenizer's chat template makes of messages, by default with the generation prompt.

    A template is a program from the model's folder. transformers runs it in jinja's sandbox, where it can
    reach no file and no Python object, but it can divide by zero, call itself without end, ask for more
    memory than there is, or not end: that is a ValueError of its own, as the next row would fare no better.
    """
    try:
        with _deadline(_RENDER_S):
            text = str(
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        text.encode()  # half a surrogate pair is no text that could become tokens
    except _OverdueError:
        raise ValueError(
            f"the tokenizer's chat template did not end within {_RENDER_S:g} s; correct the template, or do "
            'without it (apply_chat_template = "never")'
        ) from None
    except Exception as error:  # the folder's own program; told, and the row is put aside
        raise TemplateRefusedError(in_words(error)) from error
    if len(text) > _LONGEST_TEXT:
        raise TemplateRefusedError(f"it made {len(text):,} characters of {len(messages)} messages")
    return text


class _OverdueError(BaseException):
    """The deadline passed. No Exception, so that nothing between takes it for an error of its own."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _OverdueError after so long; only in a main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def overdue(*_: object) -> None:
        raise _OverdueError

    before = signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
