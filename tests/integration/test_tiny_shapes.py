"""tiny-shapes answers right, and for the right reasons."""

import dataclasses
import random

import httpx
import numpy as np
import PIL.Image
import pytest
import runtime_process
import shape_questions
from internvl_runtime.artifacts import source
from internvl_runtime.engine import folder, interface
from internvl_runtime.engine.pytorch import generator
from internvl_runtime.model import conversation, prompt, tokenizer
from internvl_runtime.vision import grid, tiles
from tiny_shapes import questions, scenes

Kind = questions.Kind
MODELS = ("tiny-shapes", "tiny-shapes-internlm2")
SEED = 31
CONTROL = 200
CHANCE_POINTS = 0.05


@pytest.fixture(scope="module", params=MODELS)
def engine(request, tmp_path_factory):
    cache = tmp_path_factory.mktemp("shapes-cache")
    return runtime_process.build_engine_of(
        {"bundled": {"name": request.param}}, cache=cache, dtype="bfloat16"
    )


@pytest.fixture(scope="module")
def shapes(engine):
    with runtime_process.serve(engine) as server, httpx.Client(timeout=120) as client:

        def answer(question):
            body = {
                "messages": shape_questions.messages_of(question),
                "max_tokens": 16,
                "temperature": 0,
            }
            got = client.post(f"{server.url}/v1/chat/completions", json=body)
            assert got.status_code == 200, got.text
            return got.json()["choices"][0]["message"]["content"]

        yield answer


def share_right(answer, asked):
    asked = list(asked)
    return sum(answer(question) == question.answer for question in asked) / len(asked)


def test_fresh_questions_are_answered_right(shapes, engine):
    is_first = "internlm2" not in folder.open_engine(engine).model.language.family
    count = 500 if is_first else 100
    wrong = [
        (question.kind.value, question.answer, given)
        for question in shape_questions.fresh(count, seed=SEED)
        if (given := shapes(question)) != question.answer
    ]
    print(f"{count - len(wrong)} of {count} right; wrong: {wrong}")
    assert len(wrong) <= count / 100


def of_kind(kind, *, grids=((1, 1),), count=CONTROL):
    return shape_questions.fresh(count, seed=f"{SEED}/{kind}", kinds={kind: 1}, grids=grids)


CONTROLS = {
    "blank picture": (Kind.ONE_MARK, shape_questions.blank, 1 / 64),
    "pictures swapped": (Kind.SECOND_IMAGE, shape_questions.swapped, 1 / 16),
    "earlier turn dropped": (Kind.COLOUR_OF_IT, shape_questions.without_earlier_turns, 1 / 4),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_without_what_they_need_answers_fall_to_chance(shapes, control):
    kind, change, chance = CONTROLS[control]
    share = share_right(shapes, (change(question) for question in of_kind(kind)))
    print(f"{control}: {share:.3f}, chance {chance:.3f}")
    assert abs(share - chance) <= CHANCE_POINTS


def test_which_image_is_a_coin_toss_when_half_of_the_pairs_are_swapped(shapes):
    asked = [
        shape_questions.swapped(question) if number % 2 else question
        for number, question in enumerate(of_kind(Kind.WHICH_IMAGE))
    ]
    assert abs(share_right(shapes, asked) - 1 / 2) <= CHANCE_POINTS


class InProcess:
    """Asks the engine without a server, so that tiles and turns can be put wrong."""

    def __init__(self, engine_dir):
        opened = folder.open_engine(engine_dir)
        self.tokens = opened.load_tokenizer()
        self.model = generator.load_generator(opened)

    def ask(self, question, cut, segments=None):
        segments = segments or conversation.render(question.turns)
        expanded = prompt.expand(segments, tiles=[len(own) for own in cut], tokens=self.tokens)
        request = interface.GenerationRequest(
            request_id=interface.RequestId("r"),
            prompt=expanded,
            images=(),
            sampling=interface.Sampling(max_tokens=16, temperature=0.0),
            stop_token_ids=self.tokens.stop_ids,
        )
        made = [step.token_id for step in self.model.generate(request, cut) if step]
        return tokenizer.decode(self.tokens, made)


def tiles_of(scene):
    picture = PIL.Image.fromarray(scenes.draw(scene))
    return tiles.cut_tiles(picture, grid.Grid(scene.columns, scene.rows)).copy()


@pytest.fixture(scope="module")
def in_process(engine):
    return InProcess(engine)


def test_tiles_in_another_order_make_answers_fall_to_chance(in_process):
    rng = random.Random(SEED)
    grids = [one for one in questions.GRIDS if min(one) > 1]
    right = 0
    for question in of_kind(Kind.CORNER, grids=grids):
        own = tiles_of(question.pictures[0])
        shift = rng.randrange(1, len(own) - 1)
        moved = np.concatenate([np.roll(own[:-1], shift, axis=0), own[-1:]])
        right += in_process.ask(question, [moved]) == question.answer
    print(f"tiles in another order: {right / CONTROL:.3f}, chance 0.250")
    assert abs(right / CONTROL - 1 / 4) <= CHANCE_POINTS


def test_the_thumbnail_alone_does_not_hold_the_answer(in_process):
    grids = [one for one in questions.GRIDS if min(one) > 1]
    right = 0
    for question in of_kind(Kind.CORNER, grids=grids, count=CONTROL // 2):
        scene = question.pictures[0]
        own = tiles_of(scene)
        own[:-1] = tiles_of(dataclasses.replace(scene, marks=()))[:-1]
        right += in_process.ask(question, [own]) == question.answer
    print(f"thumbnail alone: {right / (CONTROL // 2):.3f}")
    assert right / (CONTROL // 2) < 0.5


def test_a_lost_system_turn_shows(in_process):
    rng = random.Random(SEED)
    for _ in range(20):
        question = questions.ask(Kind.NO_SYSTEM, rng, (1, 1))
        segments = list(conversation.render(question.turns))
        rest = segments[segments.index(conversation.Control.TURN_END) + 2 :]
        cut = [tiles_of(question.pictures[0])]
        assert in_process.ask(question, cut, rest) == questions.NO_SYSTEM_TURN


def test_both_models_together_have_at_most_8_megabytes():
    sizes = [path.stat().st_size for path in source.BUNDLED.glob("*/*.safetensors")]
    assert len(sizes) == len(MODELS)
    assert sum(sizes) < 8_000_000
