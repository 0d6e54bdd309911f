"""Ranks as threads of one process: each sees the others through a barrier, as over MPI."""

import threading
from concurrent import futures

import torch
from internvl_runtime.engine.pytorch import attention, block_pool, language, vision, weights


class Group:
    """One rank's view."""

    def __init__(self, rank, size, barrier, parts):
        self.rank, self.size = rank, size
        self._barrier, self._parts = barrier, parts

    def _exchange(self, part):
        self._parts[self.rank] = part
        self._barrier.wait(60)
        every = list(self._parts)
        self._barrier.wait(60)
        return every

    def add(self, part):
        return torch.stack(self._exchange(part)).sum(0)

    def join(self, part):
        return torch.cat(self._exchange(part), dim=-1)


def logits_of(checkpoint, model, size, token_ids, tiles, *, context, last):
    """Return every rank's logits [len(last), vocabulary] of one prompt with pictures."""
    barrier, parts = threading.Barrier(size), [None] * size

    def run(rank):
        group = Group(rank, size, barrier, parts)
        return _forward(checkpoint, model, group, token_ids, tiles, context=context, last=last)

    with futures.ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(run, range(size)))


@torch.inference_mode()
def _forward(checkpoint, model, group, token_ids, tiles, *, context, last):
    cpu = torch.device("cpu")
    tower = vision.VisionTower(
        model.vision, weights.load_weights(checkpoint / "vision.safetensors", cpu)
    )
    rank_file = checkpoint / f"rank{group.rank}.safetensors"
    decoder = language.LanguageModel(
        model.language,
        weights.load_weights(rank_file, cpu),
        max_tokens=len(token_ids),
        group=group,
    )
    ids = torch.tensor(token_ids)
    hidden = decoder.embed(ids)
    features = tower.encode(torch.from_numpy(tiles)).flatten(0, 1)
    # The answer's own tokens may be anything, a picture's placeholder too.
    (places,) = torch.nonzero(ids == context, as_tuple=True)
    hidden[places[: len(features)]] = features
    blocks = block_pool.blocks_for(len(token_ids))
    cache = attention.allocate_cache(decoder.share, blocks, dtype=torch.float32, device=cpu)
    attend = attention.TorchAttention(cache)
    attend.begin([attention.Span(0, len(token_ids), range(blocks))])
    return decoder.forward(hidden, torch.arange(len(token_ids)), torch.tensor(last), attend).numpy()
