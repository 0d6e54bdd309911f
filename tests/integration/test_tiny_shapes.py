"""tiny-shapes answers right, and for the right reasons."""

import random

import httpx
import in_process
import PIL.Image
import pytest
import runtime_process
import shape_questions
from internvl_runtime.artifacts import source
from internvl_runtime.engine import folder, interface
from internvl_runtime.engine.pytorch import core
from internvl_runtime.model import conversation, prompt, tokenizer
from internvl_runtime.vision import grid, tiles
from tiny_shapes import questions, scenes

Kind = questions.Kind
MODELS = ("tiny-shapes",)
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


def test_fresh_questions_are_answered_right(shapes):
    count = 500
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
    "earlier turn dropped": (Kind.COLOUR_OF_IT, shape_questions.without_earlier_turns, 1 / 4),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_without_what_they_need_answers_fall_to_chance(shapes, control):
    kind, change, chance = CONTROLS[control]
    share = share_right(shapes, (change(question) for question in of_kind(kind)))
    print(f"{control}: {share:.3f}, chance {chance:.3f}")
    assert abs(share - chance) <= CHANCE_POINTS


class InProcess:
    """Asks the engine without a server, so that tiles and turns can be put wrong."""

    def __init__(self, engine_dir):
        self.tokens = folder.open_engine(engine_dir).load_tokenizer()
        self.engine = in_process.load(engine_dir)

    def ask(self, question, cut, segments=None):
        segments = segments or conversation.render(question.turns)
        request = core.Submitted(
            request_id="r",
            prompt=prompt.expand(segments, tiles=[len(own) for own in cut], tokens=self.tokens),
            content_hashes=in_process.hashes_of(cut),
            sampling=interface.Sampling(max_tokens=16, temperature=0.0),
            stop_token_ids=self.tokens.stop_ids,
        )
        return tokenizer.decode(self.tokens, in_process.tokens_of(self.engine, request, cut))


def tiles_of(scene):
    picture = PIL.Image.fromarray(scenes.draw(scene))
    return tiles.cut_tiles(picture, grid.Grid(scene.columns, scene.rows)).copy()


@pytest.fixture(scope="module")
def local(engine):
    return InProcess(engine)


def test_a_lost_system_turn_shows(local):
    rng = random.Random(SEED)
    for _ in range(20):
        question = questions.ask(Kind.NO_SYSTEM, rng, (1, 1))
        segments = list(conversation.render(question.turns))
        rest = segments[segments.index(conversation.Control.TURN_END) + 2 :]
        cut = [tiles_of(question.pictures[0])]
        assert local.ask(question, cut, rest) == questions.NO_SYSTEM_TURN


def test_the_model_has_at_most_8_megabytes():
    sizes = [path.stat().st_size for path in source.BUNDLED.glob("*/*.safetensors")]
    assert len(sizes) == len(MODELS)
    assert sum(sizes) < 8_000_000
