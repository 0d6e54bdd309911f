import base64
import importlib.util
import random
import unicodedata
from pathlib import Path

import data
import pytest
import sentencepiece
import tiktoken
from internvl_runtime import errors
from internvl_runtime.artifacts import shapes, tokenizer_files
from internvl_runtime.model import config, conversation, prompt, tokenizer

REFERENCE_QUESTION = "简述一下这张图片的内容。"
QWEN_IDS = [
    151644, 8948, 198, 105043, 90286, 21287, 13935, 116669, 3837, 105205, 13072, 20412, 67916,
    30698, 3837, 104625, 100633, 104455, 104800, 5373, 109065, 81217, 104581, 99721, 75317, 101101,
    100013, 9370, 42140, 53772, 35243, 26288, 102064, 104949, 1773, 151645, 198, 151644, 872, 198,
    151665, 151666, 198, 98237, 41932, 100158, 108893, 45930, 104597, 1773, 151645, 198, 151644,
    77091, 198,
]  # fmt: skip
INTERNLM2_IDS = [
    1, 92543, 9081, 364, 70447, 60628, 60384, 60721, 60775, 60978, 60353, 79448, 60357, 1214, 1070,
    30924, 60353, 69643, 68589, 76659, 71581, 60359, 77859, 60543, 75438, 68558, 68542, 69504,
    68640, 71434, 60838, 60921, 60368, 68790, 70218, 60355, 92542, 364, 92543, 1008, 364, 92544,
    92545, 364, 60743, 61235, 68300, 72998, 68467, 69979, 60355, 92542, 364, 92543, 525, 11353, 364,
]  # fmt: skip
INJECTIONS = ["<|im_end|>", "<img>", "<IMG_CONTEXT>", "</s>", "<s>", "[UNUSED_TOKEN_146]", "<unk>"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer_files.write_real_qwen(folder)
    return tokenizer.load_tokenizer(folder, shapes.PUBLISHED["InternVL2_5-1B"])


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory):
    source = data.require("tokenizers/internlm2.model")
    folder = tmp_path_factory.mktemp("internlm2")
    tokenizer_files.write_real_internlm2(folder, source)
    return tokenizer.load_tokenizer(folder, shapes.PUBLISHED["InternVL2_5-2B"])


@pytest.fixture(scope="module", params=list(config.Family))
def small(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    is_qwen = request.param is config.Family.QWEN2
    write = tokenizer_files.write_small_qwen if is_qwen else tokenizer_files.write_small_internlm2
    size = write(folder)
    return tokenizer.load_tokenizer(
        folder, shapes.tiny_model(shapes.TINY, request.param, vocab_size=size)
    )


def expand_reference_question(tokens):
    parts = (conversation.Image(0), REFERENCE_QUESTION)
    turns = conversation.place_images([conversation.Turn(conversation.Role.USER, parts)])
    return prompt.expand(conversation.render(turns), tiles=[13], tokens=tokens)


def test_qwen_gives_the_golden_ids_of_the_reference_question(qwen):
    expanded = expand_reference_question(qwen)

    context = qwen.control_ids[conversation.Control.IMAGE_CONTEXT]
    assert len(expanded.token_ids) == 3383
    assert [i for i in expanded.token_ids if i != context] == QWEN_IDS


def test_internlm2_gives_the_golden_ids_of_the_reference_question(internlm2):
    expanded = expand_reference_question(internlm2)

    context = internlm2.control_ids[conversation.Control.IMAGE_CONTEXT]
    assert len(expanded.token_ids) == 3385
    assert [i for i in expanded.token_ids if i != context] == INTERNLM2_IDS


def test_qwen_encodes_random_text_as_tiktoken_does(qwen):
    package = Path(importlib.util.find_spec("dashscope").origin).parent
    lines = (package / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    reference = tiktoken.Encoding(
        "qwen", pat_str=tokenizer.QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    for text in random_texts(20_000):
        normalized = unicodedata.normalize("NFC", text)
        assert qwen.encode(text) == reference.encode_ordinary(normalized), text
        assert tokenizer.decode(qwen, qwen.encode(text)) == normalized


def test_internlm2_encodes_random_text_as_sentencepiece_does(internlm2):
    model = data.require("tokenizers/internlm2.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))

    for text in random_texts(20_000):
        assert internlm2.encode(text) == reference.encode(text), text
        assert tokenizer.decode(internlm2, internlm2.encode(text)) == text


def random_texts(count):
    """Words, digits, blanks, marks, several scripts, combining marks and any code point."""
    rng = random.Random(7)
    common = [
        "the", " of", "Image", "'s", "'LL", "don", "0", "123", ".", ",", "!", "?", "'", '"', "\n",
        "\t", "\r\n", " ", "  ", "\u3000", "\xa0", "你好", "世界", "图片", "é", "e\u0301", "ñ", "ﬁ",
        "Ω", "\u2126", "한국", "नमस्ते", "ไทย", "العربية", "😀", "👩‍👩‍👧", "<", "|", ">", "[", "]",
        "_", "{}", "//", "==", "\\n",
    ]  # fmt: skip
    for _ in range(count):
        parts = rng.choices(common, k=rng.randrange(24))
        if rng.random() < 0.3:
            parts.insert(rng.randrange(len(parts) + 1), any_character(rng))
        yield "".join(parts)


def any_character(rng):
    while True:
        code = rng.randrange(1, 0x110000)
        if not 0xD800 <= code <= 0xDFFF:
            return chr(code)


def test_the_authors_behaviour_can_be_switched_on(small):
    text = "look at <ref>it</ref><|im_end|>"

    ids = tokenizer.encode_with_special_tokens(small, text)

    words = ("<ref>", "</ref>", "<|im_end|>")
    assert [i for i in ids if i in small.special_ids.values()] == [
        small.special_ids[word] for word in words
    ]
    assert tokenizer.decode(small, ids) == "look at it"


def test_the_tokens_of_a_picture_can_never_be_typed(small):
    with pytest.raises(errors.RequestError, match="IMG_CONTEXT"):
        tokenizer.encode_with_special_tokens(small, "a <IMG_CONTEXT> b")


def test_decoding_is_linear(small):
    decoder = tokenizer.IncrementalDecoder(small)
    ids = small.encode("the picture ") * 20_000

    calls = 0
    plain = small.token_bytes

    def counted(token_id):
        nonlocal calls
        calls += 1
        return plain(token_id)

    decoder._tokens = type("Counted", (), {"token_bytes": staticmethod(counted)})()
    for token_id in ids:
        decoder.push([token_id])

    assert calls == len(ids)


@pytest.mark.parametrize("text", INJECTIONS)
def test_text_of_a_user_never_becomes_a_control_token(small, text):
    ids = small.encode(f"a {text} b")

    assert not set(ids) & (set(small.control_ids.values()) | small.stop_ids)
    assert tokenizer.decode(small, ids) == f"a {text} b"


def test_decoding_gives_whole_characters_and_all_of_them(small):
    text = "naïve 你好 😀 the picture"
    decoder = tokenizer.IncrementalDecoder(small)

    pieces = [decoder.push([token_id]) for token_id in small.encode(text)]

    assert "".join(pieces) + decoder.push([], final=True) == text
    assert "\ufffd" not in "".join(pieces)


def test_an_unfinished_character_is_shown_as_replaced_at_the_end(small):
    decoder = tokenizer.IncrementalDecoder(small)

    assert decoder.push(small.encode("😀")[:-1]) == ""
    assert decoder.push([], final=True) == "\ufffd"


def test_only_internlm2_begins_with_bos(small):
    is_internlm2 = isinstance(small, tokenizer.InternLM2Tokenizer)
    assert small.prefix_ids == ((1,) if is_internlm2 else ())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(errors.StageError, match=r"vocab\.json"):
        tokenizer.load_tokenizer(tmp_path, shapes.PUBLISHED["InternVL2_5-1B"])
