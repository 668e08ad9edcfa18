"""A tiny Llama from random weights with a character tokenizer, saved as any pretrained model is.

Nothing is downloaded. Tokens are single characters, so text → ids → text is exact for any text over the
alphabet. `tokenizer(text)` puts `<bos>` before the text and nothing after it; with
`add_special_tokens=False` it adds nothing. Text cannot spell a special token: `<eos>` in a prompt is
five characters.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from learner.settings import ScratchSettings

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # what vLLM's attention on a CPU can run


def alphabet_of(texts: Iterable[str]) -> str:
    """Every character that occurs in the texts, in code point order."""
    return "".join(sorted(set().union(*texts)))


def build_tokenizer(alphabet: str, max_length: int) -> Any:
    """A character tokenizer: ids 0–3 are pad, bos, eos, unk; then the alphabet in code point order."""
    if not alphabet:
        raise ValueError("a model from scratch needs an alphabet with at least one character")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set(alphabet))
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()  # characters join without the blanks that words would get
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def build_scratch_model(settings: ScratchSettings, alphabet: str, folder: Path, seed: int) -> Path:
    """Write a model folder that `AutoModelForCausalLM`, `AutoTokenizer` and vLLM open; returns the folder.

    The same settings, alphabet and seed give the same weights; torch's own generator is left as it was.
    The vocabulary is not padded: every id that the policy can sample is a token.
    """
    check_shape(settings)
    import torch
    import transformers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(alphabet, settings.max_length)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=_round_up(8 * settings.hidden_size // 3, 32),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=settings.tied_embeddings,
        attention_dropout=0.0,
        dtype=torch.float32,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # Only ids: a temperature or top-p here would become vLLM's default and bias every log-probability.
    model.generation_config = GenerationConfig(**ids)
    folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()  # it would break into the terminal display
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check_shape(settings: ScratchSettings) -> None:
    """Refuse a shape that no Llama can have."""
    size, heads = settings.hidden_size, settings.heads
    if size % heads:
        raise ValueError(
            f"model.scratch.heads = {heads} does not divide model.scratch.hidden_size = {size}: "
            f"choose for example heads = {_largest_divisor(size, heads)}"
        )
    if size // heads not in HEAD_SIZES:
        raise ValueError(
            f"model.scratch: hidden_size / heads = {size} / {heads} = {size // heads}, but vLLM's attention "
            f"on a CPU knows heads of {', '.join(map(str, HEAD_SIZES))} only: for example heads = 4 and "
            "hidden_size = 128"
        )


def _largest_divisor(size: int, largest: int) -> int:
    return next(d for d in range(largest, 0, -1) if size % d == 0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
