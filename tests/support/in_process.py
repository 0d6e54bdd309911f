"""An engine in the test's own process, so that its insides can be read."""

import dataclasses
import hashlib

import numpy as np
from internvl_runtime.engine import folder, stepping
from internvl_runtime.engine.pytorch import loading


def load(engine_dir, *, options=None, **changed_limits):
    """Return the engine of a published folder, with other limits where some are given."""
    opened = folder.open_engine(engine_dir)
    assert opened.checkpoint
    return loading.load_engine(
        opened.checkpoint,
        opened.model,
        dataclasses.replace(opened.limits, **changed_limits),
        options=options or loading.Options(),
    )


def hashes_of(cut):
    """Return content hashes of pictures' tiles."""
    return [hashlib.sha256(tiles.tobytes()).hexdigest() for tiles in cut]


def tokens_of(engine, request, cut):
    """Return the tokens of one request, answered alone."""
    tiles = dict(zip(hashes_of(cut), cut, strict=True))
    return [token for step in stepping.answer(engine, request, tiles) for token in step.token_ids]


def logits_of(engine, request, cut):
    """Return the logits of one request's answer, answered alone: [tokens, vocabulary]."""
    forward, rows = engine.runner.model.forward, []

    def record(hidden, positions, last, attend):
        logits = forward(hidden, positions, last, attend)
        rows.extend(logits.numpy())
        return logits

    engine.runner.model.forward = record
    try:
        tokens_of(engine, request, cut)
    finally:
        del engine.runner.model.forward
    return np.stack(rows)
