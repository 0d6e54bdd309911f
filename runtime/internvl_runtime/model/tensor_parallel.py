"""How the ranks of tensor parallelism share a language model, as TensorRT-LLM's loader wants it.

Source of the rules: `tensorrt_llm/layers/attention.py` and
`tensorrt_llm/models/convert_utils.py` of TensorRT-LLM 1.2.
"""

import dataclasses

from internvl_runtime import errors
from internvl_runtime.model import config

MOST_RANKS = 8
"""GPUs of one pod: a rank's all-reduce uses memory that its neighbours map."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What each rank holds."""

    ranks: int
    layers: int
    head_size: int
    heads: int
    """Query heads."""
    key_value_heads: int
    """At least one: where ranks outnumber the heads, neighbouring ranks hold copies of one."""
    intermediate_size: int
    vocabulary_rows: int
    """Rows of lm_head, the last rank's filled up with zeros."""


def share(language: config.LanguageConfig, ranks: int) -> Share:
    """Return the share of each rank; raises StageError for a number that the model can not have."""
    legal = legal_sizes(language)
    if ranks not in legal:
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"tensor parallel size {ranks} does not fit {language.num_attention_heads} heads, "
            f"{language.num_key_value_heads} key/value heads and intermediate size "
            f"{language.intermediate_size}",
            remedy=f"use one of {', '.join(map(str, legal))}",
        )
    return Share(
        ranks=ranks,
        layers=language.num_hidden_layers,
        head_size=language.head_size,
        heads=language.num_attention_heads // ranks,
        key_value_heads=max(1, language.num_key_value_heads // ranks),
        intermediate_size=language.intermediate_size // ranks,
        vocabulary_rows=-(-language.vocab_size // ranks),
    )


def legal_sizes(language: config.LanguageConfig) -> list[int]:
    """Return the numbers of ranks that share heads and MLP evenly."""
    shared = language.num_key_value_heads
    return [
        ranks
        for ranks in range(1, MOST_RANKS + 1)
        if language.num_attention_heads % ranks == 0
        and language.intermediate_size % ranks == 0
        and (shared % ranks == 0 or ranks % shared == 0)
    ]
