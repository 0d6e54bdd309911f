import hashlib

import pytest
from internvl_runtime import errors
from internvl_runtime.model.conversation import (
    SYSTEM_MESSAGE,
    Image,
    Role,
    Turn,
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


PLACED = [
    ((Image(0), "q"), (Image(0), "\n", "q")),
    (("q", Image(0)), ("q", "\n", Image(0))),
    ((Image(0), Image(1), "q"), (Image(0), "\n", Image(1), "\n", "q")),
    ((Image(0), "see <image> here"), ("see ", Image(0), " here")),
    ((Image(0), Image(1), "<image><image>"), ("", Image(0), "", Image(1), "")),
    (("no picture but <image>",), ("no picture but <image>",)),
]


@pytest.mark.parametrize(("parts", "expected"), PLACED, ids=str)
def test_pictures_take_their_places(parts, expected):
    assert place_images(parts) == expected


def test_placeholders_and_pictures_must_be_equal_in_number():
    with pytest.raises(errors.RequestError, match=r"2 <image> placeholders .* 1 pictures"):
        place_images((Image(0), "<image> and <image>"))
