"""Requests in the executor's words; the fake's classes take the published keywords alone."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from internvl_doubles import executor
from internvl_runtime import errors
from internvl_runtime.engine import interface, stepping
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.engine.tensorrt import requests
from internvl_runtime.model import prompt

BUILT = builts.Built(
    dtype="bfloat16", vocab_size=512, hidden_size=4, bytes_per_token=64, max_batch_size=4,
    max_sequence_tokens=64, rows_per_request=8, tokens_per_block=32, ranks=1,
)  # fmt: skip
PLACED = (prompt.ImagePlacement(1, 2, 3), prompt.ImagePlacement(0, 6, 2))
"""The second picture stands before the first."""


def asked(token_ids=range(5, 15), placements=(), hashes=(), priority=0, stops=(), **sampling):
    return stepping.Submitted(
        request_id="r",
        prompt=prompt.Prompt(tuple(token_ids), tuple(placements)),
        content_hashes=tuple(hashes),
        sampling=interface.Sampling(**{"max_tokens": 8, "temperature": 0.0, **sampling}),
        stop_token_ids=frozenset(stops),
        priority=priority,
    )


def features_of(**tokens):
    return {name: torch.full((count, 4), float(ord(name))) for name, count in tokens.items()}


def create(request, features=None, **more):
    return requests.create(executor, request, features or {}, BUILT, **more)


def test_rows_follow_the_vocabulary_over_all_pictures():
    made = create(asked(placements=PLACED, hashes="ab"), features_of(a=2, b=3))
    assert made.input_token_ids == [5, 6, 512, 513, 514, 10, 515, 516, 13, 14]
    table = made.prompt_tuning_config.embedding_table
    assert table.dtype is torch.bfloat16
    assert table.device.type == "cpu"
    assert table.is_contiguous()
    assert table[:, 0].tolist() == [ord("b")] * 3 + [ord("a")] * 2


def test_extra_ids_are_those_of_the_pictures_and_nothing_else():
    ids = create(asked(placements=PLACED, hashes="ab"), features_of(a=2, b=3))
    ids = ids.prompt_tuning_config.input_token_extra_ids
    first, second = ids[2], ids[6]
    assert ids == [0, 0, first, first, first, 0, second, second, 0, 0]
    assert len({0, first, second}) == 3
    assert 0 < first < 2**64
    # Another turn, and the same picture twice.
    placed = [prompt.ImagePlacement(0, 0, 1), prompt.ImagePlacement(1, 4, 2)]
    later = requests.extra_ids(asked(placements=placed, hashes="bb"), 9)
    assert later == [first, 0, 0, 0, first, first, 0, 0, 0]


def test_a_hash_that_is_zero_is_none(monkeypatch):
    monkeypatch.setattr(requests, "_number", lambda name: 0)
    assert requests.extra_ids(asked(placements=PLACED, hashes="ab"), 10)[2] == 1


def test_a_text_has_no_table():
    made = create(asked())
    assert made.input_token_ids == list(range(5, 15))
    assert made.prompt_tuning_config is None


def test_an_answer_is_as_long_as_the_sequence_allows():
    assert create(asked(max_tokens=54)).max_tokens == 54
    assert create(asked(max_tokens=55)).max_tokens == 54
    assert create(asked(max_tokens=3)).max_tokens == 3


def test_stop_tokens_are_words_of_one():
    assert create(asked(stops=[9, 3])).stop_words == [[3], [9]]
    assert create(asked()).stop_words is None
    assert create(asked(stops=[9])).end_id is None


def test_what_comes_back():
    streamed, at_once = create(asked()), create(asked(log_probabilities=0), tells_logits=True)
    assert streamed.streaming
    assert not at_once.streaming
    for made, is_told in ((streamed, False), (at_once, True)):
        output = made.output_config
        assert output.return_log_probs is is_told
        assert output.return_generation_logits is is_told
        assert output.exclude_input_from_output is True
        assert output.return_perf_metrics is True


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, {"top_k": 1}),
        ({"temperature": 0.7}, {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": None}),
        (
            {"temperature": 1.0, "top_k": 9, "top_p": 0.5, "min_p": 0.1},
            {"temperature": 1.0, "top_k": 9, "top_p": 0.5, "min_p": 0.1},
        ),
        ({"repetition_penalty": 1.2}, {"top_k": 1, "repetition_penalty": 1.2}),
        ({"presence_penalty": 0.5}, {"top_k": 1, "presence_penalty": 0.5}),
        ({"frequency_penalty": -0.5}, {"top_k": 1, "frequency_penalty": -0.5}),
        (
            {"temperature": 1.0, "repetition_penalty": 0.9},
            {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None,
             "repetition_penalty": 0.9},
        ),
    ],
)  # fmt: skip
def test_sampling_is_told_field_by_field(wanted, expected):
    told = requests.sampling_of(asked(**wanted).sampling, "r")
    seed = told.pop("seed", None)
    assert told == {"beam_width": 1, **expected}
    assert (seed is None) == ("temperature" not in expected)


def test_a_request_brings_its_own_sampling():
    wanted = asked(temperature=0.7, top_k=3)
    told = vars(create(wanted).sampling_config)
    assert told | requests.sampling_of(wanted.sampling, "r") == told
    assert told["temperature"] == 0.7


def test_a_seed_repeats_an_answer_and_its_lack_does_not():
    def seed(name, **more):
        return requests.sampling_of(asked(temperature=1.0, **more).sampling, name)["seed"]

    assert seed("a", seed=4) == seed("b", seed=4) != seed("a", seed=5)
    assert seed("a") == seed("a") != seed("b")
    assert 0 <= seed("a") < 2**64


def test_priorities_keep_their_order():
    told = [create(asked(priority=each)).priority for each in range(-300, 301)]
    assert all(before > after for before, after in itertools.pairwise(told))
    assert 0 < told[-1] < told[0] < 1
    assert told[300] == 0.5


LONG = tuple(range(64))


@pytest.mark.parametrize(
    ("request_", "words", "parameter", "code"),
    [
        (asked(LONG), "64 prompt tokens, the engine was built for 63: send a shorter prompt or "
         "fewer and smaller pictures", "messages", "context_length_exceeded"),
        (asked(LONG[:20], [prompt.ImagePlacement(0, 0, 5), prompt.ImagePlacement(1, 5, 4)], "ab"),
         "9 image tokens, the engine was built for 8: send a shorter prompt or fewer and smaller "
         "pictures", "messages", "context_length_exceeded"),
        (asked(top_k=1025), "top_k is 1025; this engine takes at most 1024", "top_k", None),
        (asked([3, 512]), "token id 512 is not below 512, the size of the vocabulary", "prompt",
         "invalid_token"),
    ],
)  # fmt: skip
def test_what_is_beyond_the_engine_is_told(request_, words, parameter, code):
    with pytest.raises(errors.RequestError) as caught:
        requests.check(request_, BUILT)
    told = caught.value
    assert (told.message, told.parameter, told.code) == (words, parameter, code)


def test_what_the_engine_was_built_for_passes():
    requests.check(asked(LONG[:63], [prompt.ImagePlacement(0, 0, 8)], "a", top_k=1024), BUILT)
    requests.check(asked([0, 511]), BUILT)


def test_every_way_to_end_is_known():
    known = {reason: requests.finish_reason(executor, reason) for reason in executor.FinishReason}
    assert {reason: ours for reason, ours in known.items() if ours} == {
        executor.FinishReason.STOP_WORDS: interface.FinishReason.STOP,
        executor.FinishReason.LENGTH: interface.FinishReason.LENGTH,
    }


def test_the_newest_log_probabilities_are_told():
    told = requests.told([-1.0, -2.0, -3.0], [7, 8])
    assert [(each.chosen, each.top) for each in told] == [(-2.0, ()), (-3.0, ())]


def test_logits_are_told_without_the_padding_of_the_vocabulary():
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0], [4.0, 0.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    (first, second) = requests.told_of_logits(logits, [2, 0], top=2, vocab_size=3)
    total = math.log(sum(math.exp(each) for each in (1, 3, 2)))
    assert first.chosen == pytest.approx(2 - total, abs=1e-6)
    assert [token for token, _ in first.top] == [1, 2]
    assert [value for _, value in first.top] == pytest.approx([3 - total, 2 - total], abs=1e-6)
    assert second.top[0][0] == 0
    assert second.chosen == pytest.approx(second.top[0][1])


CONFIG = {
    "version": "1.2.1",
    "pretrained_config": {
        "dtype": "bfloat16", "vocab_size": 512, "hidden_size": 96, "num_hidden_layers": 3,
        "num_key_value_heads": 10, "head_size": 16,
        "mapping": {"world_size": 4, "tp_size": 4, "pp_size": 1},
    },
    "build_config": {
        "max_batch_size": 4, "max_seq_len": 4096,
        "max_prompt_embedding_table_size": 4 * 13 * 256 + 3,
        "plugin_config": {"use_paged_context_fmha": "enable", "tokens_per_block": 64},
    },
}  # fmt: skip


def read(folder, change=None):
    raw = json.loads(json.dumps(CONFIG))
    if change:
        change(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    return builts.read(folder)


def test_a_config_is_read_number_by_number(tmp_path):
    assert read(tmp_path) == builts.Built(
        dtype="bfloat16", vocab_size=512, hidden_size=96,
        # Keys and values, three layers, three heads on the fullest rank, 16 numbers, 2 bytes.
        bytes_per_token=2 * 3 * 3 * 16 * 2, max_batch_size=4, max_sequence_tokens=4096,
        rows_per_request=13 * 256, tokens_per_block=64, ranks=4,
    )  # fmt: skip
    assert read(tmp_path).max_input_tokens == 4095
    assert dataclasses.asdict(
        read(tmp_path, lambda raw: raw["build_config"]["plugin_config"].update(
            use_paged_context_fmha=True))
    ) == dataclasses.asdict(read(tmp_path))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.update(version="1.2.0"), "is of TensorRT-LLM 1.2.0, not 1.2.1"),
        (lambda raw: raw["pretrained_config"]["mapping"].update(world_size=8, pp_size=2),
         "the engine's stages are parallel, too: .*'pp_size': 2"),
        (lambda raw: raw["build_config"]["plugin_config"].update(use_paged_context_fmha="disable"),
         "^the engine was built without use_paged_context_fmha$"),
        (lambda raw: raw["build_config"].pop("max_seq_len"),
         "config.json of the engine can not be read: KeyError"),
    ],
)  # fmt: skip
def test_an_engine_that_is_not_ours_is_told(tmp_path, change, words):
    with pytest.raises(errors.EngineIncompatibleError, match=words) as caught:
        read(tmp_path, change)
    assert caught.value.remedy == "build the engine again with this release's builder image"


def test_a_missing_config_is_told(tmp_path):
    with pytest.raises(errors.EngineIncompatibleError, match="can not be read: FileNotFound"):
        builts.read(tmp_path)
