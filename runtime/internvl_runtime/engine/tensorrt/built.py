"""What a language engine was built for: `config.json`, as `trtllm-build` 1.2.1 writes it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from internvl_runtime import errors

VERSION = "1.2.1"
LANGUAGE_FOLDER = "language"
VISION_FILE = "vision.engine"
_CONFIG = "config.json"
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """Limits of an engine, all of them checked before a request reaches the executor."""

    dtype: str
    vocab_size: int
    """Of the model: a prompt's ids from here on are rows of its prompt table."""
    hidden_size: int
    bytes_per_token: int
    """Of keys and values in all layers on one rank."""
    max_batch_size: int
    max_sequence_tokens: int
    rows_per_request: int
    """Of the prompt table: the engine's rows over its batch size."""
    tokens_per_block: int
    ranks: int

    @property
    def row_bytes(self) -> int:
        """Of a token's row in a prompt table."""
        return self.hidden_size * _ITEM_BYTES[self.dtype]

    @property
    def max_input_tokens(self) -> int:
        """Of a prompt that is computed in chunks, and has room for one token of an answer."""
        return self.max_sequence_tokens - 1


def read(folder: Path) -> Built:
    """Read a language engine's config.

    Raises EngineIncompatibleError for another version, or an engine without paged context
    attention, on which chunked prompts and the reuse of blocks stand.
    """
    try:
        return _read(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
    except (OSError, KeyError, ValueError) as e:
        raise _incompatible(f"{_CONFIG} of the engine can not be read: {e!r}") from e


def _read(raw: dict[str, Any]) -> Built:
    if raw["version"] != VERSION:
        raise _incompatible(f"the engine is of TensorRT-LLM {raw['version']}, not {VERSION}")
    model, build = raw["pretrained_config"], raw["build_config"]
    plugins = build["plugin_config"]
    mapping = model["mapping"]
    ranks: int = mapping["tp_size"]
    if mapping["world_size"] != ranks:
        raise _incompatible(f"the engine's stages are parallel, too: {mapping}")
    if plugins["use_paged_context_fmha"] not in {True, "enable"}:
        raise _incompatible("the engine was built without use_paged_context_fmha")
    return Built(
        dtype=model["dtype"],
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        bytes_per_token=2
        * model["num_hidden_layers"]
        * -(-model["num_key_value_heads"] // ranks)
        * model["head_size"]
        * _ITEM_BYTES[model["dtype"]],
        max_batch_size=build["max_batch_size"],
        max_sequence_tokens=build["max_seq_len"],
        rows_per_request=build["max_prompt_embedding_table_size"] // build["max_batch_size"],
        tokens_per_block=int(plugins["tokens_per_block"]),
        ranks=ranks,
    )


def _incompatible(message: str) -> errors.EngineIncompatibleError:
    return errors.EngineIncompatibleError(
        message, remedy="build the engine again with this release's builder image"
    )
