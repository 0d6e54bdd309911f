"""tiny-shapes answers right, and for the right reasons."""

import concurrent.futures
import contextlib
import random

import httpx
import in_process
import PIL.Image
import pytest
import runtime_process
import shape_questions
from internvl_runtime.artifacts import source
from internvl_runtime.engine import folder, interface, stepping
from internvl_runtime.model import conversation, prompt, tokenizer
from internvl_runtime.vision import grid, tiles
from tiny_shapes import questions, scenes

Kind = questions.Kind
QWEN2, INTERNLM2 = "tiny-shapes", "tiny-shapes-internlm2"
AT_ONCE = 8
SEED = 31
CONTROL = 200
LONG_CONTROL = 800
"""Questions of a control whose share must be within 5 points: three standard deviations."""
CHANCE_POINTS = 0.05


@pytest.fixture(scope="module", params=[QWEN2, pytest.param(INTERNLM2, marks=pytest.mark.long)])
def engine(request, tmp_path_factory):
    cache = tmp_path_factory.mktemp("shapes-cache")
    return build(request.param, cache)


def build(name, cache):
    return runtime_process.build_engine_of(
        {"bundled": {"name": name}}, cache=cache, dtype="bfloat16"
    )


@contextlib.contextmanager
def serve(engine):
    """Asks a server several questions at once; gives a function that returns the answers."""
    with (
        runtime_process.serve(engine) as server,
        httpx.Client(timeout=120) as client,
        concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads,
    ):

        def answer(question):
            body = {
                "messages": shape_questions.messages_of(question),
                "max_tokens": 16,
                "temperature": 0,
            }
            got = client.post(f"{server.url}/v1/chat/completions", json=body)
            assert got.status_code == 200, got.text
            return got.json()["choices"][0]["message"]["content"]

        yield lambda asked: list(threads.map(answer, asked))


@pytest.fixture(scope="module")
def shapes(engine):
    with serve(engine) as answers:
        yield answers


def share_right(shapes, asked):
    asked = list(asked)
    given = shapes(asked)
    return sum(q.answer == text for q, text in zip(asked, given, strict=True)) / len(asked)


def assert_right(shapes, count, *, seed):
    asked = list(shape_questions.fresh(count, seed=seed))
    wrong = [
        (question.kind.value, question.answer, given)
        for question, given in zip(asked, shapes(asked), strict=True)
        if given != question.answer
    ]
    print(f"{count - len(wrong)} of {count} right; wrong: {wrong}")
    assert len(wrong) <= count / 100


def test_fresh_questions_are_answered_right(shapes):
    assert_right(shapes, 500, seed=SEED)


def test_the_other_family_answers_right(tmp_path):
    with serve(build(INTERNLM2, tmp_path)) as answers:
        assert_right(answers, 100, seed=SEED)


@pytest.mark.long
def test_two_thousand_fresh_questions_are_answered_right(shapes):
    assert_right(shapes, 2000, seed=SEED + 1)


def of_kind(kind, *, grids=((1, 1),), count=CONTROL):
    return shape_questions.fresh(count, seed=f"{SEED}/{kind}", kinds={kind: 1}, grids=grids)


CONTROLS = {
    "blank picture": (Kind.ONE_MARK, shape_questions.blank, 1 / 64),
    # Two pictures of 4 shapes and 4 colours are alike once in 16 times.
    "pictures swapped": (Kind.SECOND_IMAGE, shape_questions.swapped, 1 / 16),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_without_what_they_need_answers_fall_to_chance(shapes, control):
    kind, change, chance = CONTROLS[control]
    share = share_right(shapes, (change(question) for question in of_kind(kind)))
    print(f"{control}: {share:.3f}, chance {chance:.3f}")
    assert abs(share - chance) <= CHANCE_POINTS


def test_an_earlier_turn_is_what_the_answer_is_about(shapes):
    asked = list(of_kind(Kind.COLOUR_OF_IT))
    dropped = share_right(shapes, map(shape_questions.without_earlier_turns, asked))
    exchanged = share_right(
        shapes, map(shape_questions.with_earlier_turns_of, asked, [*asked[1:], asked[0]])
    )
    print(f"earlier turn dropped: {dropped:.3f}, another's: {exchanged:.3f}, chance {1 / 4:.3f}")
    assert abs(dropped - 1 / 4) <= CHANCE_POINTS
    assert abs(exchanged - 1 / 4) <= CHANCE_POINTS


class InProcess:
    """Asks the engine without a server, so that tiles and turns can be put wrong."""

    def __init__(self, engine_dir):
        self.tokens = folder.open_engine(engine_dir).load_tokenizer()
        self.engine = in_process.load(engine_dir)

    def ask(self, question, cut, segments=None):
        segments = segments or conversation.render(question.turns)
        request = stepping.Submitted(
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


def shuffle(cut, rng):
    """Put every grid tile at another place; each corner's mark is another's then."""
    order = [*range(len(cut) - 1)]
    while any(place == tile for place, tile in enumerate(order)):
        rng.shuffle(order)
    return cut[[*order, len(cut) - 1]]


def assert_corners_are_guessed(local, words, change):
    """Ask about corners of pictures whose tiles `change(tiles, scene)` has changed."""
    right = 0
    for question in of_kind(Kind.CORNER, grids=((2, 2),), count=LONG_CONTROL):
        (scene,) = question.pictures
        right += local.ask(question, [change(tiles_of(scene), scene)]) == question.answer
    print(f"{words}: {right / LONG_CONTROL:.3f}, chance {1 / 4:.3f}")
    assert abs(right / LONG_CONTROL - 1 / 4) <= CHANCE_POINTS


@pytest.mark.long
def test_with_its_tiles_in_another_order_a_corner_is_a_guess(local):
    rng = random.Random(SEED)
    assert_corners_are_guessed(local, "tiles shuffled", lambda cut, _: shuffle(cut, rng))


def keep_the_thumbnail(cut, scene):
    cut[:-1] = scene.ground
    return cut


@pytest.mark.long
def test_the_thumbnail_alone_tells_no_shape(local):
    assert_corners_are_guessed(local, "thumbnail alone", keep_the_thumbnail)


def test_the_models_have_at_most_8_megabytes():
    sizes = [path.stat().st_size for path in source.BUNDLED.glob("*/*.safetensors")]
    assert len(sizes) == len((QWEN2, INTERNLM2))
    assert sum(sizes) < 8_000_000
