"""Requests of token ids and noise for an engine in the test's own process."""

import dataclasses

import in_process
import numpy as np
from internvl_runtime.engine import interface, stepping
from internvl_runtime.model import config, prompt


def picture(seed, tiles=1):
    return np.random.default_rng(seed).integers(0, 256, (tiles, 448, 448, 3), dtype=np.uint8)


def ask(name, parts, *, context, max_tokens=8, **rest):
    """A request of token ids and pictures; returns it with its tiles by hash."""
    ids, placements, cut = [], [], []
    for part in parts:
        if isinstance(part, np.ndarray):
            length = config.TOKENS_PER_TILE * len(part)
            placements.append(prompt.ImagePlacement(len(cut), len(ids), length))
            ids += [context] * length
            cut.append(part)
        else:
            ids += part
    hashes = in_process.hashes_of(cut)
    sampling = rest.pop("sampling", interface.Sampling(max_tokens=max_tokens, temperature=0.0))
    request = stepping.Submitted(
        request_id=name,
        prompt=prompt.Prompt(tuple(ids), tuple(placements)),
        content_hashes=hashes,
        sampling=sampling,
        stop_token_ids=frozenset(),
        **rest,
    )
    return request, dict(zip(hashes, cut, strict=True))


def words(rng, count):
    return [rng.randrange(5, 250) for _ in range(count)]


def collect(engine, answers, until=None):
    while engine.has_work and not (until and until()):
        for step in engine.step():
            assert step.error is None, step.error
            answers.setdefault(step.request_id, []).extend(step.token_ids)


def answer_alone(engine, request, tiles):
    """Tokens, and how much better each was than the next best."""
    sampling = dataclasses.replace(request.sampling, log_probabilities=2)
    steps = list(stepping.answer(engine, dataclasses.replace(request, sampling=sampling), tiles))
    told = [step.log_probabilities[0].top for step in steps]
    margins = [best[1] - second[1] for best, second in told]
    return [token for step in steps for token in step.token_ids], margins


def assert_equal_but_for_ties(given, alone, margins, *, tie):
    for number, token in enumerate(given):
        if margins[number] < tie:
            return
        assert token == alone[number], (number, margins[number])
