"""Tokens and logits equal those of transformers' own InternVL on the same weights, in float32."""

import hf_reference
import httpx
import in_process
import numpy as np
import pictures
import pytest
import runtime_process
from internvl_runtime.engine import interface, stepping
from internvl_runtime.model import config, prompt, tokenizer
from internvl_runtime.vision import grid, tiles

TOKENS = 16
LOGIT_TOLERANCE = 2e-3
"""Both sum in float32 in orders of their own; logits are of magnitude 10."""
PORTRAIT, SQUARE, LARGE = (360, 640), (300, 300), (700, 700)
CONVERSATIONS = {
    "text": [("user", ["Hello, who are you?"])],
    "one picture": [("user", [PORTRAIT, "What is in the picture?"])],
    "three pictures": [("user", ["first", PORTRAIT, SQUARE, "compare them", LARGE])],
    "two turns": [
        ("system", ["Be brief."]),
        ("user", [SQUARE, "What is it?"]),
        ("assistant", ["the red circle"]),
        ("user", ["And here?", PORTRAIT]),
    ],
}


def messages_of(conversation):
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else pictures.image_part(pictures.draw(*part))
                for part in parts
            ],
        }
        for role, parts in conversation
    ]


def sizes_of(conversation):
    return [part for _, parts in conversation for part in parts if not isinstance(part, str)]


def tiles_of(size):
    cut = tiles.cut_tiles(pictures.draw(*size), grid.choose_grid(*size, max_tiles=12))
    return cut.copy()


@pytest.mark.filterwarnings("default")
def test_answers_equal_the_references(checkpoint, tmp_path):
    engine = runtime_process.build_engine(checkpoint, cache=tmp_path)
    tokens = tokenizer.load_tokenizer(checkpoint, config.read_model_config(checkpoint))
    context = tokens.control_ids["<IMG_CONTEXT>"]
    reference = hf_reference.load_reference(checkpoint, image_token_id=context)
    ours = in_process.load(engine)
    with runtime_process.serve(engine) as server:
        for name, conversation in CONVERSATIONS.items():
            body = {
                "model": "tiny",
                "messages": messages_of(conversation),
                "max_tokens": TOKENS,
                "temperature": 0,
                "return_token_ids": True,
                "ignore_eos": True,
            }
            url = f"{server.url}/v1/chat/completions"
            answer = httpx.post(url, json=body, timeout=120).json()
            answered = answer["choices"][0]["token_ids"]
            prompt_ids = answer["prompt_token_ids"]
            cut = [tiles_of(size) for size in sizes_of(conversation)]
            every = np.concatenate(cut) if cut else None

            expected, theirs = hf_reference.generate_greedily(
                reference, prompt_ids, every, max_tokens=TOKENS
            )
            assert answered == expected, name
            logits = in_process.logits_of(ours, request_of(prompt_ids, context, cut), cut)
            assert np.abs(logits - theirs).max() < LOGIT_TOLERANCE, name


def request_of(prompt_ids, context, cut):
    """A request for a prompt whose pictures lie where the context tokens do."""
    placements, position = [], 0
    for index, own in enumerate(cut):
        position = prompt_ids.index(context, position)
        placements.append(prompt.ImagePlacement(index, position, 256 * len(own)))
        position += 256 * len(own)
    return stepping.Submitted(
        request_id="r",
        prompt=prompt.Prompt(tuple(prompt_ids), tuple(placements)),
        content_hashes=in_process.hashes_of(cut),
        sampling=interface.Sampling(max_tokens=TOKENS, temperature=0.0),
        stop_token_ids=frozenset(),
    )
