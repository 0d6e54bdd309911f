"""Writes tokenizer files as the published repositories have them.

Tests and synthetic models use small made-up vocabularies; the real ones come
from files that others publish.
"""

import base64
import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.model import tokenizer

QWEN_ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>",
    "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
"""Ids from the end of the BPE ranks upwards: 151643 to 151673 in the published models."""

INTERNLM2_OVERWRITTEN = (
    "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>",
    "<|im_start|>",
)  # fmt: skip
"""These take the ids of the last pieces of tokenizer.model, [UNUSED_TOKEN_141] to 146."""

INTERNLM2_APPENDED = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip

_PARTS_OF_A_MERGE = 2
_BASIC = ("<unk>", "<s>", "</s>")
_WORDS = (
    " the", " picture", " image", " shows", " what", " is", " in", " and", " red", " green",
    " blue", " circle", " square", " triangle", " top", " bottom", " left", " right", " of",
    " at", " a", "user", "system", "assistant", "InternVL", "Describe", " describe", "What",
)  # fmt: skip


def write_small_qwen(folder: Path, words: Sequence[str] = _WORDS) -> int:
    """Write a small vocabulary in the Qwen family's formats; returns the number of ids.

    Bytes and `words` are tokens, and so are the words' beginnings.
    """
    pieces = list(tokenizer.byte_of_character())
    merges = list(_chain_merges(word.replace(" ", "Ġ") for word in words))
    pieces += ["".join(merge) for merge in merges]
    return _write_qwen(folder, pieces, merges)


def write_real_qwen(folder: Path) -> int:
    """Write the published Qwen vocabulary, out of a Python package that ships it.

    Raises StageError when that package is not installed.
    """
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        raise errors.StageError(
            errors.Reason.MODEL_NOT_FOUND,
            "the Qwen vocabulary is not installed",
            remedy="install internvl-runtime[qwen-vocabulary], or synthesize --shape tiny",
        )
    lines = (Path(found.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = [base64.b64decode(line.split()[0]) for line in lines]
    character = {byte: char for char, byte in tokenizer.byte_of_character().items()}
    merges = [
        ("".join(map(character.__getitem__, left)), "".join(map(character.__getitem__, right)))
        for left, right in _merges_of_ranks(ranks)
    ]
    pieces = ["".join(map(character.__getitem__, token)) for token in ranks]
    return _write_qwen(folder, pieces, merges)


def write_small_internlm2(folder: Path, words: Sequence[str] = _WORDS) -> int:
    """Write a small sentencepiece model in the InternLM2 family's formats."""
    merges = list(_chain_merges(word.replace(" ", "▁") for word in words))
    characters = sorted({piece for merge in merges for piece in merge if len(piece) == 1})
    merged = ["".join(merge) for merge in merges]
    content = _sentencepiece_model(characters + merged)
    return _write_internlm2(folder, content)


def write_real_internlm2(folder: Path, model_file: Path) -> int:
    """Write the published InternLM2 tokenizer, out of a copy of its tokenizer.model."""
    if not model_file.is_file():
        raise errors.StageError(
            errors.Reason.MODEL_NOT_FOUND,
            f"there is no InternLM2 tokenizer.model at {model_file}",
            remedy="name a copy by INTERNVL_RUNTIME_TOKENIZER_MODEL, or synthesize --shape tiny",
        )
    return _write_internlm2(folder, model_file.read_bytes())


def _write_qwen(folder: Path, pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> int:
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    added = {token: len(pieces) + n for n, token in enumerate(QWEN_ADDED)}
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_described_tokens(
        folder, added, added=added, tokenizer_class="Qwen2Tokenizer", eos="<|im_end|>",
        pad="<|endoftext|>", bos=None,
    )  # fmt: skip
    return len(pieces) + len(added)


def _write_internlm2(folder: Path, content: bytes) -> int:
    import sentencepiece

    (folder / "tokenizer.model").write_bytes(content)
    size = sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size()
    first = size - len(INTERNLM2_OVERWRITTEN)
    special = {token: token_id for token_id, token in enumerate(_BASIC)}
    special |= {token: first + n for n, token in enumerate(INTERNLM2_OVERWRITTEN)}
    appended = {token: size + n for n, token in enumerate(INTERNLM2_APPENDED)}
    _write_described_tokens(
        folder, special | appended, added=appended, tokenizer_class="InternLM2Tokenizer",
        eos="</s>", pad="</s>", bos="<s>",
    )  # fmt: skip
    return size + len(appended)


def _write_described_tokens(
    folder: Path, described: dict[str, int], *, added: dict[str, int], tokenizer_class: str,
    eos: str, pad: str, bos: str | None,
) -> None:  # fmt: skip
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"eos_token": eos, "pad_token": pad} | ({"bos_token": bos} if bos else {})
    _write_json(folder / "added_tokens.json", added)
    _write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": list(added), **named},
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(token_id): {"content": token, **flags, "special": True}
                for token, token_id in sorted(described.items(), key=lambda item: item[1])
            },
            "additional_special_tokens": list(added),
            "add_bos_token": bos is not None,
            "model_max_length": 16384,
            "tokenizer_class": tokenizer_class,
            **named,
        },
    )


def _chain_merges(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield merges that build each word from its left end, each merge once."""
    seen = set()
    for word in words:
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            if merge not in seen:
                seen.add(merge)
                yield merge


def _merges_of_ranks(ranks: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Recover the merges that ranked tokens came from: each token's last two parts."""
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    for rank, token in enumerate(ranks):
        if len(token) > 1:
            parts = _split_below(token, rank_of, rank)
            yield parts[0], parts[1]


def _split_below(token: bytes, rank_of: dict[bytes, int], limit: int) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > _PARTS_OF_A_MERGE:
        candidates = [
            (rank_of.get(left + right, limit), position)
            for position, (left, right) in enumerate(itertools.pairwise(parts))
        ]
        best, position = min(candidates)
        if best >= limit:
            break
        parts[position : position + 2] = [parts[position] + parts[position + 1]]
    return parts


def _sentencepiece_model(pieces: Sequence[str]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2

    kinds = proto.ModelProto.SentencePiece
    model = proto.ModelProto()
    model.pieces.add(piece=_BASIC[0], score=0.0, type=kinds.UNKNOWN)
    for piece in _BASIC[1:]:
        model.pieces.add(piece=piece, score=0.0, type=kinds.CONTROL)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kinds.BYTE)
    for rank, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(rank), type=kinds.NORMAL)
    for number in range(141, 141 + len(INTERNLM2_OVERWRITTEN)):
        model.pieces.add(piece=f"[UNUSED_TOKEN_{number}]", score=0.0, type=kinds.USER_DEFINED)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString(deterministic=True))


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
