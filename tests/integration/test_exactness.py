"""Greedy tokens through HTTP equal those of transformers' own InternVL, token by token."""

import hf_reference
import httpx
import numpy as np
import pictures
import pytest
import runtime_process
from internvl_runtime.model import config, tokenizer
from internvl_runtime.vision import grid, tiles

TOKENS = 16
PORTRAIT, SQUARE = (360, 640), (300, 300)
CONVERSATIONS = {
    "text": (["Hello, who are you?"], []),
    "one picture": ([PORTRAIT, "What is in the picture?"], [PORTRAIT]),
    "two pictures": (["first", PORTRAIT, SQUARE, "compare them"], [PORTRAIT, SQUARE]),
}


def content_of(parts):
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else pictures.image_part(pictures.draw(*part))
        for part in parts
    ]


def tiles_of(sizes):
    cut = [
        tiles.cut_tiles(pictures.draw(*size), grid.choose_grid(*size, max_tiles=12))
        for size in sizes
    ]
    return np.concatenate(cut) if cut else None


@pytest.mark.filterwarnings("default")
def test_answers_equal_the_references(checkpoint, tmp_path):
    engine = runtime_process.build_engine(checkpoint, cache=tmp_path)
    tokens = tokenizer.load_tokenizer(checkpoint, config.read_model_config(checkpoint))
    reference = hf_reference.load_reference(
        checkpoint, image_token_id=tokens.control_ids["<IMG_CONTEXT>"]
    )
    with runtime_process.serve(engine) as server:
        for name, (parts, sizes) in CONVERSATIONS.items():
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": content_of(parts)}],
                "max_tokens": TOKENS,
                "temperature": 0,
                "return_token_ids": True,
            }
            url = f"{server.url}/v1/chat/completions"
            answer = httpx.post(url, json=body, timeout=120).json()
            ours = answer["choices"][0]["token_ids"]
            theirs = hf_reference.generate_greedily(
                reference, answer["prompt_token_ids"], tiles_of(sizes), max_tokens=TOKENS
            )
            assert ours == theirs[: len(ours)], name
            assert len(ours) == TOKENS or ours[-1] in tokens.stop_ids
