"""Demonstrations as chats: whole conversations, and the token with which a template ends a turn."""

from pathlib import Path
from typing import Any

import pytest
from data_helpers import put_aside, write

from cluster.data import DataSettings, Encoder, Quarantine, load_demonstrations

SPECIAL = ["<eos>", "<bos>", "<turn>", "<end>"]
TEMPLATE = (
    "<bos>{% for m in messages %}<turn>{{ m['role'][0] }}{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>a{% endif %}"
)
WITH_TAGS = (
    "<bos>{% for m in messages %}<turn>{{ m['role'][0] }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['content'] }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<turn>a{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "so on"},
]


@pytest.fixture(params=[TEMPLATE, WITH_TAGS], ids=["plain", "generation tags"])
def tokenizer(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """One whose end token is not what its template ends turns with; sampling stops at both."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    characters = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz ?"]
    inner = Tokenizer(models.WordLevel({one: i for i, one in enumerate(characters)}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = request.param
    folder = tmp_path / "model"
    made.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 0}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    return AutoTokenizer.from_pretrained(folder)


def read(tmp_path: Path, tokenizer: Any, rows: list[Any], **settings: Any) -> tuple[list[Any], Quarantine]:
    path = write(tmp_path / "rows.jsonl", rows)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    pairs = load_demonstrations(
        path,
        tokenizer,
        60,
        quarantine=quarantine,
        settings=DataSettings.model_validate({"train": str(path)} | settings),
    )
    return pairs, quarantine


def test_a_demonstration_is_what_the_template_makes_of_the_whole_chat(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"messages": TALK},
        {"prompt": TALK[:3], "completion": [TALK[3]]},
        {"prompt": "hi", "completion": "ho"},
    ]
    pairs, _ = read(tmp_path, tokenizer, rows)
    for (prompt, completion), talk in zip(pairs, [TALK, TALK, TALK[:2]], strict=True):
        whole = tokenizer.apply_chat_template(talk, return_dict=False)
        assert [*prompt, *completion] == whole
        assert tokenizer.decode(completion) == talk[-1]["content"] + "<end>"


@pytest.mark.parametrize("tokenizer", [WITH_TAGS], indirect=True)
def test_the_loss_is_on_the_tokens_that_the_generation_tags_name(tmp_path: Path, tokenizer: Any) -> None:
    ((prompt, completion),), _ = read(tmp_path, tokenizer, [{"messages": TALK[:2]}])
    tagged = tokenizer.apply_chat_template(TALK[:2], return_dict=True, return_assistant_tokens_mask=True)
    assert tagged["assistant_masks"] == [0] * len(prompt) + [1] * len(completion)


def test_a_template_whose_end_does_not_stop_sampling_keeps_the_end_token(
    tmp_path: Path, tokenizer: Any
) -> None:
    folder = Path(tokenizer.name_or_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    ((_, completion),), _ = read(tmp_path, tokenizer, [{"messages": TALK}])
    assert tokenizer.decode(completion) == "so on<eos>"


def test_a_prompt_without_template_keeps_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "hi", "completion": "ho"}]
    ((_, completion),), _ = read(tmp_path, tokenizer, rows, apply_chat_template="never")
    assert tokenizer.decode(completion) == "ho<eos>"


def test_an_end_token_in_the_text_is_not_doubled(tmp_path: Path, tokenizer: Any) -> None:
    ((_, completion),), _ = read(tmp_path, tokenizer, [{"prompt": "hi", "completion": "ho<end>"}])
    assert tokenizer.decode(completion) == "ho<end>"


def test_conversations_in_other_forms_and_under_other_names(tmp_path: Path, tokenizer: Any) -> None:
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK[:2]]
    both = {"prompt": "something else", "messages": TALK[:2]}
    found = [
        read(tmp_path, tokenizer, [{"conversations": shared}])[0],
        read(tmp_path, tokenizer, [{"messages": parts}])[0],
        read(tmp_path, tokenizer, [both], prompt_column="messages")[0],
    ]
    assert found[0] == found[1] == found[2] == read(tmp_path, tokenizer, [{"messages": TALK[:2]}])[0]


def test_conversations_that_demonstrate_nothing_are_put_aside(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"messages": TALK},
        {"messages": TALK[:3]},
        {"messages": []},
        {"messages": TALK[1:2]},
        {"messages": [*TALK[:3], {"role": "assistant", "content": None}]},
        {"messages": "hi"},
        {"prompt": "hi", "completion": [{"role": "user", "content": "ho"}]},
        {"prompt": "hi", "completion": "ho<end>and<end>"},
    ]
    pairs, quarantine = read(tmp_path, tokenizer, rows)
    assert len(pairs) == 1
    found = put_aside(quarantine)
    assert [line for line, _ in found] == [2, 3, 4, 5, 6, 7, 8]
    assert found[-1][1] == "end token inside"


def test_prompts_of_reinforcement_come_from_conversations_too(tmp_path: Path, tokenizer: Any) -> None:
    settings = DataSettings(train=str(tmp_path))
    encoder = Encoder(tokenizer, settings, 60)
    row = {"messages": TALK}
    assert encoder.source(row) == TALK[:3]
    assert encoder.source({"messages": TALK[:3]}) == TALK[:3]
    assert tokenizer.decode(encoder.prompt(row)[0]).endswith("<turn>uand<end><turn>a")


def test_a_prompt_has_no_token_that_the_tokenizer_puts_after_texts(tmp_path: Path, tokenizer: Any) -> None:
    from tokenizers import processors

    from rewards.models.card import TextFormat
    from rewards.models.text import RewardEncoder

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 0)]
    )
    assert tokenizer.decode(tokenizer("hi")["input_ids"]) == "<bos>hi<eos>"
    rows = [{"prompt": "hi", "completion": "ho"}]
    ((prompt, completion),), _ = read(tmp_path, tokenizer, rows, apply_chat_template="never")
    assert tokenizer.decode([*prompt, *completion]) == "<bos>hiho<eos>"
    encoder = RewardEncoder(tokenizer, TextFormat(max_length=9, apply_chat_template="never"))
    assert tokenizer.decode(encoder.encode("hi", "ho", True)) == "<bos>hiho<eos>"
