"""The tokenizers of both families, from the files that the published repositories ship.

Text never becomes a control token here: control ids are added by the template
alone. Decoding goes through the bytes of each token, so that it is linear and
can stop at any byte.
"""

import codecs
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from internvl_runtime import errors
from internvl_runtime.model import config, conversation

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2.5 splits text before byte-level BPE; source: its published tokenizer.json."""

_STOP_TOKENS = {
    config.Family.QWEN2: ("<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    config.Family.INTERNLM2: ("<|im_end|>", "</s>", "<|im_start|>"),
}


class Tokenizer(Protocol):
    """Text to token ids and token ids to bytes."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids at the very start of every prompt: BOS for the InternLM2 family, else nothing."""
        ...

    @property
    def control_ids(self) -> Mapping[conversation.Control, int]:
        """Ids of the tokens that only the template writes."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of every special token, by its text."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encode text, every character of it as text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token; a special token has none."""
        ...


def encode_with_special_tokens(tokens: Tokenizer, text: str) -> list[int]:
    """Encode text as the authors' code does: the words of special tokens become those tokens.

    Raises RequestError for `<IMG_CONTEXT>`, whose number must be that of the pictures' tokens.
    """
    ids: list[int] = []
    for number, piece in enumerate(_special_pattern(frozenset(tokens.special_ids)).split(text)):
        is_special = number % 2 == 1
        if piece == conversation.Control.IMAGE_CONTEXT:
            raise errors.RequestError(
                f"the text holds {piece}, which stands for a picture's tokens: send a picture",
                parameter="messages",
            )
        ids += [tokens.special_ids[piece]] if is_special else tokens.encode(piece)
    return ids


@functools.cache
def _special_pattern(words: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


class IncrementalDecoder:
    """Turns token ids into text as they come, never giving out half a character."""

    def __init__(self, tokens: Tokenizer) -> None:
        self._tokens = tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int], *, final: bool = False) -> str:
        """Return the characters that these ids complete; `final` flushes an unfinished one."""
        raw = b"".join(map(self._tokens.token_bytes, token_ids))
        return self._utf8.decode(raw, final=final)


def decode(tokens: Tokenizer, token_ids: Iterable[int]) -> str:
    """Return the text of an answer."""
    return IncrementalDecoder(tokens).push(token_ids, final=True)


def load_tokenizer(model_dir: Path, model: config.ModelConfig) -> Tokenizer:
    """Load the tokenizer of a checkpoint or engine folder.

    Raises StageError when a file is missing or broken, or when its ids do not
    fit the model's vocabulary.
    """
    is_qwen = model.language.family is config.Family.QWEN2
    try:
        tokens: Tokenizer = _load_qwen(model_dir) if is_qwen else _load_internlm2(model_dir)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise errors.StageError(
            errors.Reason.UNSUPPORTED_MODEL,
            f"the tokenizer in {model_dir} can not be loaded: {type(e).__name__}: {e}",
            remedy="copy the tokenizer files of the published repository beside config.json",
        ) from e
    if tokens.vocab_size > model.language.vocab_size:
        raise errors.StageError(
            errors.Reason.UNSUPPORTED_MODEL,
            f"the tokenizer knows {tokens.vocab_size} ids, but llm_config.vocab_size is "
            f"{model.language.vocab_size}",
            remedy="use the tokenizer files that belong to this checkpoint",
        )
    return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenTokenizer:
    """Byte-level BPE with NFC normalization."""

    bpe: tokenizers.Tokenizer
    prefix_ids: tuple[int, ...]
    control_ids: Mapping[conversation.Control, int]
    special_ids: Mapping[str, int]
    stop_ids: frozenset[int]
    bytes_by_id: tuple[bytes, ...]

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self.bytes_by_id)

    def encode(self, text: str) -> list[int]:
        """Encode text, every character of it as text."""
        return list(self.bpe.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token; a special token has none."""
        return self.bytes_by_id[token_id] if token_id < len(self.bytes_by_id) else b""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternLM2Tokenizer:
    """Sentencepiece BPE with byte fallback."""

    processor: sentencepiece.SentencePieceProcessor
    prefix_ids: tuple[int, ...]
    control_ids: Mapping[conversation.Control, int]
    special_ids: Mapping[str, int]
    stop_ids: frozenset[int]
    bytes_by_id: tuple[bytes, ...]
    overwritten: re.Pattern[str] | None
    """Pieces of the model file whose ids now belong to control tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self.bytes_by_id)

    def encode(self, text: str) -> list[int]:
        """Encode text, every character of it as text."""
        ids: list[int] = []
        for harmless in self._split_overwritten(text):
            ids += self.processor.encode(harmless)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token; a special token has none."""
        return self.bytes_by_id[token_id] if token_id < len(self.bytes_by_id) else b""

    def _split_overwritten(self, text: str) -> list[str]:
        if self.overwritten is None:
            return [text]
        cuts = [match.start() + 1 for match in self.overwritten.finditer(text)]
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _load_qwen(model_dir: Path) -> QwenTokenizer:
    bpe = tokenizers.Tokenizer(_read_bpe(model_dir))
    bpe.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    special = _read_special_ids(model_dir)
    vocabulary = bpe.get_vocab(with_added_tokens=False)
    bytes_by_id = [b""] * (1 + max(*vocabulary.values(), *special.values()))
    for piece, token_id in vocabulary.items():
        bytes_by_id[token_id] = bytes(map(byte_of_character().__getitem__, piece))
    return QwenTokenizer(
        bpe=bpe,
        prefix_ids=(),
        control_ids=_control_ids(special),
        special_ids=special,
        stop_ids=_stop_ids(special, config.Family.QWEN2),
        bytes_by_id=tuple(bytes_by_id),
    )


def _read_bpe(model_dir: Path) -> tokenizers.models.BPE:
    vocabulary = _read_json(model_dir / "vocab.json")
    lines = (model_dir / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition(" ") for line in lines if not line.startswith("#version")]
    try:
        return tokenizers.models.BPE(vocabulary, [(left, right) for left, _, right in pairs])
    except Exception as e:
        # The package raises nothing more precise for merges that are not in the vocabulary.
        raise ValueError(f"vocab.json and merges.txt do not fit: {e}") from e


def _load_internlm2(model_dir: Path) -> InternLM2Tokenizer:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    special = _read_special_ids(model_dir)
    size = 1 + max(processor.get_piece_size() - 1, *special.values())
    special_ids = frozenset(special.values())
    overwritten = [
        processor.id_to_piece(token_id)
        for token_id in special_ids
        if token_id < processor.get_piece_size()
        and not processor.is_control(token_id)
        and not processor.is_unknown(token_id)
    ]
    return InternLM2Tokenizer(
        processor=processor,
        prefix_ids=(special["<s>"],),
        control_ids=_control_ids(special),
        special_ids=special,
        stop_ids=_stop_ids(special, config.Family.INTERNLM2),
        bytes_by_id=tuple(
            b"" if token_id in special_ids else _piece_bytes(processor, token_id)
            for token_id in range(size)
        ),
        overwritten=re.compile("|".join(map(re.escape, overwritten))) if overwritten else None,
    )


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, token_id: int) -> bytes:
    if processor.is_control(token_id) or processor.is_unknown(token_id):
        return b""
    piece: str = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes([int(piece[3:-1], base=16)])
    return piece.replace("▁", " ").encode()


def _read_special_ids(model_dir: Path) -> dict[str, int]:
    """Read the special tokens' ids out of whichever published files hold them."""
    ids: dict[str, int] = {}
    added = model_dir / "added_tokens.json"
    if added.is_file():
        ids |= _read_json(added)
    described = _read_json(model_dir / "tokenizer_config.json").get("added_tokens_decoder", {})
    for token_id, token in described.items():
        content = token["content"]
        if ids.setdefault(content, int(token_id)) != int(token_id):
            raise ValueError(
                f"{content} is {ids[content]} in added_tokens.json and {token_id} in "
                "tokenizer_config.json"
            )
    return ids


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _control_ids(special: Mapping[str, int]) -> dict[conversation.Control, int]:
    return {control: special[control.value] for control in conversation.Control}


def _stop_ids(special: Mapping[str, int], family: config.Family) -> frozenset[int]:
    return frozenset(special[token] for token in _STOP_TOKENS[family])


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return GPT-2's map from the printable characters of a vocabulary to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(hidden))]
    return dict(zip(characters, printable + hidden, strict=True))
