"""The engine on CUDA: run by hand on a GPU machine, where CI has none.

PYTHONPATH=runtime:tests/support python -m pytest tests/gpu -c /dev/null
"""

import dataclasses
import functools
import gc
import math
import random
from pathlib import Path

import pytest
import torch
from asking import answer_alone, ask, assert_equal_but_for_ties, collect, picture, words
from internvl_runtime.artifacts import shapes, tensors
from internvl_runtime.engine import interface, stepping
from internvl_runtime.engine.pytorch import attention, loading, products, ranks, weights
from internvl_runtime.engine.tensorrt import requests as requests_of_tensorrt
from internvl_runtime.model import config, tensor_parallel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

TIES = {torch.float32: 2e-3, torch.bfloat16: 0.12, torch.float16: 0.02}
"""Margins of the two best logits, whose spread is about one, below which rounding may decide."""
CONTEXT = 3
LIMITS = interface.EngineLimits(
    max_sequence_tokens=4096, max_input_tokens=4095, max_batched_tokens=1024, max_batch_size=16,
    max_tiles_per_image=12, max_tiles_per_request=26,
)  # fmt: skip
FAMILIES = [config.Family.QWEN2, config.Family.INTERNLM2]


def tiny(family):
    return shapes.tiny_model(shapes.TINY, family, vocab_size=512)


def published(name, *, layers):
    """A published shape with fewer layers in both stacks."""
    shape = shapes.PUBLISHED[name]
    return dataclasses.replace(
        shape,
        language=dataclasses.replace(shape.language, num_hidden_layers=layers),
        vision=dataclasses.replace(shape.vision, num_hidden_layers=layers),
    )


MODELS = {
    "tiny-qwen2": functools.partial(tiny, FAMILIES[0]),
    "tiny-internlm2": functools.partial(tiny, FAMILIES[1]),
    "1B": functools.partial(published, "InternVL2_5-1B", layers=4),
    "8B": functools.partial(published, "InternVL2_5-8B", layers=3),
}


def random_weights(model, dtype):
    """Weights of both halves, by the names of a rank checkpoint."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape, deviation):
        drawn = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)
        return (drawn * deviation).to(dtype)

    def initial(name, shape):
        if len(shape) == 1:
            return (torch.zeros if name.endswith("bias") else torch.ones)(shape).to("cuda", dtype)
        return normal(*shape, deviation=math.prod(shape[1:]) ** -0.5)

    tower = {
        name: initial(name, shape)
        for name, shape in tensors.list_tensors(model)
        if not name.startswith("language_model")
    }
    language = model.language
    hidden, inner = language.hidden_size, language.intermediate_size
    rows = (language.num_attention_heads + 2 * language.num_key_value_heads) * language.head_size
    decoder = {
        "transformer.vocab_embedding.weight": normal(language.vocab_size, hidden, deviation=1.0),
        "transformer.ln_f.weight": torch.ones(hidden, device="cuda", dtype=dtype),
        "lm_head.weight": normal(language.vocab_size, hidden, deviation=hidden**-0.5),
    }
    for number in range(language.num_hidden_layers):
        root = f"transformer.layers.{number}."
        for name, shape in {
            "input_layernorm.weight": (hidden,), "post_layernorm.weight": (hidden,),
            "attention.qkv.weight": (rows, hidden),
            "attention.dense.weight": (hidden, rows - 2 * language.num_key_value_heads
                                       * language.head_size),
            "mlp.fc.weight": (inner, hidden), "mlp.gate.weight": (inner, hidden),
            "mlp.proj.weight": (hidden, inner),
        }.items():  # fmt: skip
            decoder[root + name] = initial(name, shape)
        if language.family is config.Family.QWEN2:
            decoder[f"{root}attention.qkv.bias"] = normal(rows, deviation=0.1)
    return {"vision.safetensors": tower, "rank0.safetensors": decoder}


@pytest.fixture
def load(monkeypatch):
    """Loads a shape with random weights; `plain` for torch's attention, one at a time."""

    def load_engine(
        model, dtype, *, device="cuda", plain=False, limits=LIMITS, group=None, **options
    ):
        every = random_weights(model, dtype)
        options = {"kv_cache_bytes": 2**30, **options}

        def load_weights(path, place):
            moved = {name: tensor.to(place) for name, tensor in every[path.name].items()}
            return weights.Weights(moved)

        monkeypatch.setattr(loading.weights, "load_weights", load_weights)
        if plain:
            monkeypatch.setattr(
                loading, "_choose_attention", lambda cache, _: attention.TorchAttention(cache)
            )
        engine = loading.load_engine(
            Path("/nowhere"),
            model,
            dataclasses.replace(limits, max_batch_size=1) if plain else limits,
            device=device,
            options=loading.Options(**options),
            group=group,
        )
        monkeypatch.undo()
        return engine

    yield load_engine
    gc.collect()
    torch.cuda.empty_cache()


def requests(seed, count):
    rng = random.Random(seed)
    shared = words(rng, 100)
    for number in range(count):
        parts = [shared[: rng.randrange(101)], words(rng, rng.randrange(1, 300))]
        if rng.random() < 0.4:
            parts.insert(1, picture(rng.randrange(4), tiles=rng.randrange(1, 4)))
        yield ask(f"r{number}", parts, context=CONTEXT, max_tokens=rng.randrange(4, 24))


@pytest.mark.parametrize("dtype", list(TIES), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_batches_equal_one_at_a_time_in_eager_torch(load, name, dtype):
    model, asked = MODELS[name](), list(requests(1, 24))
    eager = load(model, dtype, plain=True, lag=0)
    expected = {r.request_id: answer_alone(eager, r, tiles) for r, tiles in asked}
    del eager
    engine = load(model, dtype)
    kind = type(engine.runner._attend).__name__
    for request, tiles in asked:
        engine.submit(request, tiles)
    answers = {}
    collect(engine, answers)
    compared = 0
    for name_, (tokens, margins) in expected.items():
        assert len(answers[name_]) == len(tokens)
        assert_equal_but_for_ties(answers[name_], tokens, margins, tie=TIES[dtype])
        is_tie = [margin < TIES[dtype] for margin in margins]
        compared += is_tie.index(True) if True in is_tie else len(is_tie)
    total = sum(len(tokens) for tokens, _ in expected.values())
    print(f"{name} {dtype}: {kind}, {compared} of {total} tokens compared before a tie")
    assert compared > total / 20


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_the_cpu_in_float32(load, family):
    model, asked = tiny(family), list(requests(2, 12))
    cpu = load(model, torch.float32, device="cpu", plain=True)
    engine = load(model, torch.float32)
    for request, tiles in asked:
        tokens, margins = answer_alone(cpu, request, tiles)
        given = [t for step in stepping.answer(engine, request, tiles) for t in step.token_ids]
        assert_equal_but_for_ties(given, tokens, margins, tie=TIES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nccl_changes_no_token(load, dtype, tmp_path):
    """A group of one rank makes every call of several, and needs one GPU."""
    model, asked = published("InternVL2_5-8B", layers=3), list(requests(3, 12))
    group = ranks.Distributed(tmp_path / "ranks", rank=0, size=1, device="cuda")
    told = []
    for each in (None, group):
        engine, answers = load(model, dtype, group=each), {}
        for request, tiles in asked:
            engine.submit(request, tiles)
        collect(engine, answers)
        engine.close()
        told.append(answers)
        del engine
    assert told[0] == told[1]


def test_a_prompt_table_lies_pinned_in_the_hosts_memory():
    request, tiles = ask("r", [picture(1)], context=CONTEXT)
    features = {name: torch.ones(256, 8) for name in tiles}
    table = requests_of_tensorrt._table(request, features, "bfloat16")
    assert table.is_pinned()
    assert table.device.type == "cpu"


def test_the_cache_takes_what_the_largest_step_leaves_free(load):
    model = published("InternVL2_5-1B", layers=2)
    free, total = torch.cuda.mem_get_info()
    engine = load(model, torch.bfloat16, kv_cache_bytes=0)
    per_block = attention.bytes_per_block(tensor_parallel.share(model.language, 1), torch.bfloat16)
    taken = engine.scheduler.pool.count * per_block
    assert 0.7 * free < taken < free - 0.05 * total
    rng, answers = random.Random(1), {}
    for number in range(LIMITS.max_batch_size):
        parts = [picture(number, tiles=12), words(rng, 300)]
        way = interface.Sampling(max_tokens=4, top_p=0.9, log_probabilities=20)
        engine.submit(*ask(f"r{number}", parts, context=CONTEXT, sampling=way))
    collect(engine, answers)
    assert [len(tokens) for tokens in answers.values()] == [4] * LIMITS.max_batch_size
    assert engine.scheduler.budget == LIMITS.max_batched_tokens


def test_nothing_waits_for_the_device_but_for_the_tokens_of_the_step_before(load):
    engine = load(published("InternVL2_5-8B", layers=2), torch.bfloat16)
    ways = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3},
        {"temperature": 0.0, "log_probabilities": 5, "repetition_penalty": 1.2,
         "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": ((5, 1.0),)},
    ]  # fmt: skip

    def run(name):
        rng = random.Random(name)
        for number, way in enumerate(ways):
            request, tiles = ask(
                f"{name}{number}", [words(rng, 700), picture(rng.randrange(10**6), tiles=2)],
                context=CONTEXT, sampling=interface.Sampling(max_tokens=8, **way),
            )  # fmt: skip
            engine.submit(request, tiles)
        answers = {}
        collect(engine, answers)
        assert [len(tokens) for tokens in answers.values()] == [8] * len(ways)

    run("first, which compiles")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("second")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_fp8_products_are_those_of_their_emulation(tokens):
    generator = torch.Generator("cuda").manual_seed(2)
    states, rows = (
        torch.randn(count, 512, generator=generator, device="cuda") for count in (tokens, 768)
    )
    scales = rows.abs().amax(1) / 448
    quantized = (rows / scales[:, None]).to(torch.float8_e4m3fn)
    bias = torch.randn(768, generator=generator, device="cuda")

    on_the_card = products.Product(quantized, scales, bias.bfloat16())(states.bfloat16())
    emulated = products.Product(quantized, scales, bias)(states.bfloat16().float())

    assert (on_the_card - emulated).abs().max() < 2**-7 * emulated.abs().max()
