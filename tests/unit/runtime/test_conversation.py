import hashlib

import pytest
from internvl_runtime import errors
from internvl_runtime.model.conversation import (
    SYSTEM_MESSAGE,
    Image,
    Role,
    Turn,
    Video,
    place_images,
    render,
)

SYSTEM = f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n"


def rendered(turns, **options):
    segments = render(turns, **options)
    return "".join(f"<image{s.index}>" if isinstance(s, Image) else str(s) for s in segments)


def test_the_system_message_is_the_published_one():
    digest = hashlib.sha256(SYSTEM_MESSAGE.encode()).hexdigest()
    assert digest == "bdb4d179c4c458dd9bd365588d3fd15aba0f2b755b4b192383416f610ad3396e"


def test_a_question_gets_the_default_system_turn():
    assert rendered([Turn(Role.USER, ("Hi",))]) == (
        f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_own_system_message_replaces_the_default():
    turns = [Turn(Role.SYSTEM, ("Be brief.",)), Turn(Role.USER, ("Hi",))]
    assert rendered(turns).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_a_models_own_system_message_replaces_the_templates():
    text = rendered([Turn(Role.USER, ("Hi",))], system_message="From config.json.")
    assert text.startswith("<|im_start|>system\nFrom config.json.<|im_end|>\n")


def test_history_is_rendered_turn_by_turn():
    turns = [Turn(Role.USER, ("Q",)), Turn(Role.ASSISTANT, ("A",)), Turn(Role.USER, ("R",))]
    assert rendered(turns).removeprefix(SYSTEM) == (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_empty_system_message_is_one():
    turns = [Turn(Role.SYSTEM, ("",)), Turn(Role.USER, ("Hi",))]
    assert rendered(turns).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


def test_a_message_without_content_is_its_header_alone():
    turns = [Turn(Role.USER, ("Q",)), Turn(Role.ASSISTANT, ("",)), Turn(Role.USER, ("R",))]
    assert "<|im_start|>assistant\n<|im_start|>user\nR<|im_end|>\n" in rendered(turns)


def test_a_video_is_its_frames_on_lines_of_their_own():
    turns = [Turn(Role.USER, (Video((Image(0), Image(1))), "What happens?"))]
    assert "user\nFrame1: <image0>\nFrame2: <image1>\nWhat happens?<|im_end|>" in rendered(
        place_images(turns)
    )


PLACED = [
    ((Image(0), "q"), (Image(0), "\n", "q")),
    (("q", Image(0)), ("q", "\n", Image(0))),
    ((Image(0), Image(1), "q"), (Image(0), "\n", Image(1), "\n", "q")),
    ((Image(0), "see <image> here"), ("see ", Image(0), " here")),
    ((Image(0), Image(1), "<image><image>"), ("", Image(0), "", Image(1), "")),
    (("one ", "text"), ("one ", "text")),
    ((Video((Image(0),)), "q"), (Video((Image(0),)), "q")),
    (("q", Video((Image(0),))), ("q", "\n", Video((Image(0),)))),
    ((Image(0), "<image>", Video((Image(1),))), ("", Image(0), "", Video((Image(1),)))),
]


@pytest.mark.parametrize(("parts", "expected"), PLACED, ids=str)
def test_pictures_take_their_places(parts, expected):
    (placed,) = place_images([Turn(Role.USER, parts)])
    assert placed.content == expected


def test_placeholders_take_the_pictures_in_order_over_the_whole_conversation():
    turns = [
        Turn(Role.USER, (Image(0), Image(1), "first <image>")),
        Turn(Role.ASSISTANT, ("I see an <image>.",)),
        Turn(Role.USER, ("then <image>",)),
    ]

    first, answer, second = place_images(turns)

    assert first.content == ("first ", Image(0), "")
    assert answer.content == ("I see an <image>.",)
    assert second.content == ("then ", Image(1), "")


MISMATCHED = [
    ((Image(0), "<image> and <image>"), r"2 <image> placeholders .* 1 pictures"),
    ((Image(0), Image(1), "<image>"), r"1 <image> placeholders .* 2 pictures"),
    (("<image>",), r"1 <image> placeholders .* 0 pictures"),
]


@pytest.mark.parametrize(("parts", "words"), MISMATCHED, ids=str)
def test_placeholders_and_pictures_must_be_equal_in_number(parts, words):
    with pytest.raises(errors.RequestError, match=words):
        place_images([Turn(Role.USER, parts)])
