"""The five reference requests through the whole preparation: counts, ids and tile hashes."""

import hashlib
import json

import data
import pictures
import pytest
from internvl_runtime import settings
from internvl_runtime.artifacts import synthesize
from internvl_runtime.model import config
from internvl_runtime.server import inspection, schemas

Q1 = "<image>\n简述一下这张图片的内容。"
Q2 = "Image-1: <image>\nImage-2: <image>\n描述一下两张图片的不同。"
A2 = (
    "这两张图片展示了两种不同的动物。\n\n图片1中的动物是小熊猫，它有红棕色的毛发，白色的面部和耳朵边缘，"
    "以及黑色的眼圈。小熊猫正趴在木板上，背景是树木和绿叶。\n\n图片2中的动物是大熊猫，它有黑白相间的毛发，"
    "黑色的眼圈，耳朵和四肢，以及白色的面部和腹部。大熊猫正坐在地上，周围有绿色的植物和竹子。\n\n"
    "这两张图片中的动物在外观和栖息环境上都有明显的区别。"
)
Q3 = "描述一下图片-2中的熊猫所在的环境。"
QV = "".join(f"Frame{n}:<image>\n" for n in range(1, 7)) + "描述一下视频的内容。不要重复。"

FAMILIES = {config.Family.QWEN2: "InternVL2_5-1B", config.Family.INTERNLM2: "InternVL2_5-8B"}
FIRST = "e43ede5b77db39acb5149b4c13f55334"


def part(picture):
    if isinstance(picture, str):
        url = "file://" + str(data.require(f"images/{picture}").resolve())
        return {"type": "image_url", "image_url": {"url": url}}
    return pictures.image_part(pictures.draw(*picture))


def user(text, *sent):
    return {"role": "user", "content": [*map(part, sent), {"type": "text", "text": text}]}


def said(text):
    return {"role": "assistant", "content": text}


FRAMES = tuple(f"frame_{n}.jpg" for n in range(6))
TWO = ("image1.jpg", (1000, 1000))
CASES = {
    "one picture": (lambda: [user(Q1, "image1.jpg")], 3383, 3385, [13]),
    "two pictures": (lambda: [user(Q2, *TWO)], 5955, 5957, [13, 10]),
    "two turns": (
        lambda: [user(Q2, *TWO), said(A2), user(Q3)], 6084, 6081, [13, 10],
    ),
    "six frames": (lambda: [user(QV, *FRAMES)], 4697, 4699, [3] * 6),
    "wide picture": (lambda: [user(Q1, (1280, 720))], 2359, 2361, [9]),
    "text": (lambda: [user("Hello, who are you?")], 51, 53, []),
    "no placeholder": (
        lambda: [user(Q1.removeprefix("<image>\n"), "image1.jpg")], 3383, 3385, [13],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES.items(), ids=lambda item: item[0])
def family(request, tmp_path_factory):
    name, shape = request.param
    folder = tmp_path_factory.mktemp(name)
    tokenizer_model = data.require("tokenizers/internlm2.model")
    recipe = synthesize.Recipe(shape, None, 0)
    synthesize.write_small_files(recipe, folder, tokenizer_model=tokenizer_model)
    return name, folder


@pytest.mark.parametrize("case", CASES)
async def test_the_prompt_has_the_golden_number_of_tokens(family, case):
    name, folder = family
    messages, qwen, internlm2, tiles = CASES[case]
    read = tuple(schemas.Message.model_validate(message) for message in messages())

    inspected = await inspection.inspect(folder, read, config_=settings.Settings())

    described = json.loads(json.dumps(inspected.describe()))
    assert described["prompt_tokens"] == (qwen if name is config.Family.QWEN2 else internlm2)
    assert described["prompt_tokens"] == len(described["token_ids"])
    assert described["prompt_tokens"] == sum(described["parts"].values())
    assert [image["tiles"] for image in described["images"]] == tiles


async def test_the_tiles_of_the_reference_picture_are_described_by_their_hash(family):
    _, folder = family
    read = (schemas.Message.model_validate(user(Q1, "image1.jpg")),)

    (image,) = (await inspection.inspect(folder, read, config_=settings.Settings())).describe()[
        "images"
    ]

    assert image["tiles_sha256"].startswith(FIRST)
    assert (image["width"], image["height"]) == (1000, 747)
    assert (image["columns"], image["rows"], image["tiles"]) == (4, 3, 13)
    path = data.require("images/image1.jpg")
    assert image["content_hash"] == hashlib.sha256(b"12:" + path.read_bytes()).hexdigest()
