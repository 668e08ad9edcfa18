"""From a prompt and a response to the tokens that a reward model reads: one way, in training and scoring.

A prompt is a text or a list of chat messages, and becomes tokens as it does for a policy: chat messages and,
where the tokenizer has a template, texts go through the template with the generation prompt at its end; other
texts get the special tokens that the tokenizer puts before them. The response follows without any, and the
end token after it if it is finished.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.models.card import TextFormat
from rewards.models.foreign import TemplateRefusedError, render

PromptValue = str | Sequence[Mapping[str, Any]]
Item = tuple[PromptValue, str, bool]
"""A prompt, a response, and whether the response is finished (and not cut off)."""


class EncodingError(ValueError):
    """A prompt or response that the model cannot read; `reason` is a short fixed name."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and response, and the response's tokens without the end token."""

    ids: list[int]
    length: int


def tokens_after(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts after a text: 1 where it ends each with its end token.

    A prompt must go on, so they do not belong to it.
    """
    text = "a"
    plain, whole = (list(tokenizer(text, add_special_tokens=wanted)["input_ids"]) for wanted in (False, True))
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    start = next(starts, None)
    return 0 if start is None or not plain else len(whole) - start - len(plain)


class RewardEncoder:
    """Makes tokens for a reward model; raises EncodingError for what it cannot encode whole."""

    def __init__(self, tokenizer: Any, text: TextFormat) -> None:
        if text.apply_chat_template == "always" and not tokenizer.chat_template:
            raise ValueError(
                'reward_model.text.apply_chat_template = "always", but the tokenizer has no chat template: '
                'set "auto" or "never", or use a model with a template'
            )
        if text.end_token and tokenizer.eos_token_id is None:
            raise ValueError(
                "reward_model.text.end_token = true, but the tokenizer has no end token (eos_token): set one "
                "and save it, or set end_token to false"
            )
        self._tokenizer = tokenizer
        self._text = text
        # Some tokenizers name an end or padding token as their unknown one: that says nothing of a text.
        others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, None}
        self._unknown = frozenset({tokenizer.unk_token_id} - others)
        self._after = tokens_after(tokenizer)
        self._latest: tuple[PromptValue, list[int]] | None = None

    def encode(self, prompt: PromptValue, completion: str, finished: bool) -> list[int]:
        """Token ids of the prompt, the response, and the end token if it is finished."""
        return self.encode_item((prompt, completion, finished)).ids

    def encode_item(self, item: Item) -> Encoded:
        """The same, with the response's length, which length corrections need."""
        prompt, completion, finished = item
        if (
            self._latest is None or self._latest[0] != prompt
        ):  # the responses to a prompt mostly come together
            self._latest = (prompt, self._prompt(prompt))
        ids = self._latest[1]
        response = self._ids(completion, special=False)
        end = [int(self._tokenizer.eos_token_id)] if finished and self._text.end_token else []
        whole = [*ids, *response, *end]
        if len(whole) > self._text.max_length:
            raise EncodingError(
                "over-long",
                f"prompt and response have {len(whole)} tokens, and the reward model reads "
                f"{self._text.max_length} at most",
            )
        if len(whole) < 2:
            raise EncodingError("empty", "prompt and response have fewer than 2 tokens together")
        return Encoded(whole, len(response))

    def _prompt(self, prompt: PromptValue) -> list[int]:
        wanted, template = self._text.apply_chat_template, bool(self._tokenizer.chat_template)
        if isinstance(prompt, str):
            if not prompt.strip():
                raise EncodingError("empty prompt", "only white space")
            if wanted == "always" or (wanted == "auto" and template):
                return self._ids(self._render([{"role": "user", "content": prompt}]), special=False)
            ids = self._ids(prompt, special=True)
            return ids[: len(ids) - self._after]
        messages = [dict(one) for one in prompt if isinstance(one, Mapping)]
        if not messages or len(messages) != len(prompt):
            raise EncodingError("wrong type", f"the prompt is {prompt!r:.60}, not a text or chat messages")
        if not template or wanted == "never":
            cause = "templates are off" if template else "the tokenizer has none"
            raise EncodingError("no chat template", f"chat messages need one, but {cause}")
        return self._ids(self._render(messages), special=False)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        system = self._text.system_prompt
        if system and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
        try:
            return render(self._tokenizer, messages)
        except TemplateRefusedError as error:
            raise EncodingError("chat template refused", str(error)) from error

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids = [int(i) for i in self._tokenizer(text, add_special_tokens=special)["input_ids"]]
        if not self._unknown.isdisjoint(ids):
            raise EncodingError(
                "unknown token", "a character that the reward model's vocabulary does not have"
            )
        return ids
