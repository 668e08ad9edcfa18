"""Which attention kernel computes what a model's configuration says."""

from typing import Any


def exact_attention(config: Any, wanted: str) -> str:
    """`wanted`, or eager where fused attention would leave out a part of the model.

    Gemma 2 and its kin bound the scores of attention, s ← c·tanh(s/c), before the softmax. PyTorch's fused
    kernel ("sdpa") has no place for that, and transformers leaves it out without a word.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if wanted == "sdpa" and capped else wanted
