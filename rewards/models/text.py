"""From a prompt and a response to the tokens that a reward model reads: one way, in training and scoring.

A prompt is a text or a list of chat messages, and becomes tokens as it does for a policy: chat messages and,
where the tokenizer has a template, texts go through the template with the generation prompt at its end; other
texts get the special tokens that the tokenizer puts before them. The response follows without any, and the
end token after it if it is finished.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.models.card import TextFormat
from rewards.models.foreign import TemplateRefusedError, render

PromptValue = str | Sequence[Mapping[str, Any]]
Item = tuple[PromptValue, str, bool]
"""A prompt, a response, and whether the response is finished (and not cut off)."""
Text = tuple[str, bool]
"""A text, and whether it gets the special tokens that the tokenizer adds."""


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
        self._latest: tuple[PromptValue, Text] | None = None

    def encode(self, prompt: PromptValue, completion: str, finished: bool) -> list[int]:
        """Token ids of the prompt, the response, and the end token if it is finished."""
        return self.encode_item((prompt, completion, finished)).ids

    def encode_item(self, item: Item) -> Encoded:
        """The same, with the response's length, which length corrections need."""
        (found,) = self.encode_items([item])
        if isinstance(found, EncodingError):
            raise found
        return found

    def encode_items(self, items: Sequence[Item]) -> list[Encoded | EncodingError]:
        """Many at once, which uses all cores; in place of one that cannot be encoded stands why not."""
        prompts = [self._prompt(prompt) for prompt, _, _ in items]
        texts = [(completion, False) for _, completion, _ in items]
        ids = self._ids([*texts, *(one for one in prompts if not isinstance(one, EncodingError))])
        return [
            prompt if isinstance(prompt, EncodingError) else self._joined(ids[prompt], ids[text], finished)
            for prompt, text, (_, _, finished) in zip(prompts, texts, items, strict=True)
        ]

    def _joined(
        self, prompt: list[int] | None, response: list[int] | None, finished: bool
    ) -> Encoded | EncodingError:
        """The whole sequence, from the tokens of its parts or None for what has none."""
        if prompt is None or response is None:
            return EncodingError(
                "unknown token", "a character that the reward model's vocabulary does not have"
            )
        end = [int(self._tokenizer.eos_token_id)] if finished and self._text.end_token else []
        whole = [*prompt, *response, *end]
        if len(whole) > self._text.max_length:
            return EncodingError(
                "over-long",
                f"prompt and response have {len(whole)} tokens, and the reward model reads "
                f"{self._text.max_length} at most",
            )
        if len(whole) < 2:
            return EncodingError("empty", "prompt and response have fewer than 2 tokens together")
        return Encoded(whole, len(response))

    def _prompt(self, prompt: PromptValue) -> Text | EncodingError:
        # The responses to a prompt mostly come together: its template is not rendered for each.
        if self._latest is None or self._latest[0] != prompt:
            try:
                self._latest = (prompt, self._prompt_text(prompt))
            except EncodingError as error:
                return error
        return self._latest[1]

    def _prompt_text(self, prompt: PromptValue) -> Text:
        wanted, template = self._text.apply_chat_template, bool(self._tokenizer.chat_template)
        if isinstance(prompt, str):
            if not prompt.strip():
                raise EncodingError("empty prompt", "only white space")
            if wanted == "always" or (wanted == "auto" and template):
                return self._render([{"role": "user", "content": prompt}]), False
            return prompt, True
        messages = [dict(one) for one in prompt if isinstance(one, Mapping)]
        if not messages or len(messages) != len(prompt):
            raise EncodingError("wrong type", f"the prompt is {prompt!r:.60}, not a text or chat messages")
        if not template or wanted == "never":
            cause = "templates are off" if template else "the tokenizer has none"
            raise EncodingError("no chat template", f"chat messages need one, but {cause}")
        return self._render(messages), False

    def _render(self, messages: list[dict[str, Any]]) -> str:
        system = self._text.system_prompt
        if system and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
        try:
            return render(self._tokenizer, messages)
        except TemplateRefusedError as error:
            raise EncodingError("chat template refused", str(error)) from error

    def _ids(self, texts: Iterable[Text]) -> dict[Text, list[int] | None]:
        """Each text's tokens; None where the vocabulary does not have all of them."""
        found: dict[Text, list[int] | None] = {}
        distinct = list(dict.fromkeys(texts))
        for special in (False, True):
            part = [one for one in distinct if one[1] is special]
            if not part:
                continue
            told = self._tokenizer([text for text, _ in part], add_special_tokens=special)["input_ids"]
            after = self._after if special else 0
            for one, ids in zip(part, told, strict=True):
                kept = list(map(int, ids[: len(ids) - after]))
                found[one] = kept if self._unknown.isdisjoint(kept) else None
        return found
