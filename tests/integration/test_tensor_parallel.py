"""The ranks of a converted checkpoint, joined, are the model of transformers, in float32."""

import hf_reference
import numpy as np
import pictures
import pytest
import simulated_ranks
from internvl_runtime.artifacts import convert
from internvl_runtime.model import config, conversation, prompt, tokenizer
from internvl_runtime.vision import grid, tiles

TOKENS = 8
LOGIT_TOLERANCE = 2e-3
"""Ranks sum in an order of their own; logits are of magnitude 10."""


@pytest.mark.filterwarnings("default")
def test_every_tensor_parallel_size_gives_the_references_logits(checkpoint, tmp_path):
    model = config.read_model_config(checkpoint)
    tokens = tokenizer.load_tokenizer(checkpoint, model)
    context = tokens.control_ids["<IMG_CONTEXT>"]
    cut = tiles.cut_tiles(pictures.draw(600, 300), grid.choose_grid(600, 300, max_tiles=4)).copy()
    question = (conversation.Image(0), "\nWhat is in the picture?")
    asked = [conversation.Turn(conversation.Role.USER, question)]
    segments = conversation.render(asked)
    asked_ids = list(prompt.expand(segments, tiles=[len(cut)], tokens=tokens).token_ids)
    reference = hf_reference.load_reference(checkpoint, image_token_id=context)
    answer, expected = hf_reference.generate_greedily(reference, asked_ids, cut, max_tokens=TOKENS)
    last = range(len(asked_ids) - 1, len(asked_ids) - 1 + TOKENS)

    for ranks in (1, 2, 4, 8):
        output = tmp_path / str(ranks)
        output.mkdir()
        convert.write_checkpoint(
            checkpoint, output, dtype="float32", ranks=ranks, report=lambda *_: None
        )
        every = simulated_ranks.logits_of(
            output, model, ranks, asked_ids + answer[:-1], cut, context=context, last=last
        )
        for logits in every:
            assert logits.argmax(-1).tolist() == answer, ranks
            assert np.abs(logits - expected).max() < LOGIT_TOLERANCE, ranks
