"""The ranks of the fake executor: rank 0 plans, and every one does the same with its own share.

Ranks that mpirun has started speak MPI and join their tensors, so that a rank file in
the wrong place gives wrong answers.
"""

import os
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from internvl_runtime.engine.pytorch import attention, block_pool, language, ranks, weights
from internvl_runtime.model import config as configs

from internvl_doubles import trtllm_build

_ORDERS = 1
"""The tag of rank 0's messages."""
_POLL_SECONDS = 0.0005
"""Between looks for an order: the machines of the tests have fewer cores than ranks."""


class _World:
    """`MPI_COMM_WORLD` as a group of the interpreter."""

    def __init__(self):
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size

    def add(self, part):
        wide = part.to(torch.float32).numpy()
        summed = np.empty_like(wide)
        self.comm.Allreduce(wide, summed)
        return torch.from_numpy(summed).to(part.dtype)

    def join(self, part):
        return torch.cat(self.comm.allgather(part), dim=-1)


class _Share:
    """One rank's part of the model, of running requests and of stored blocks."""

    def __init__(self, model, block):
        self._model, self._block = model, block
        self._running, self._stored = {}, {}

    def begin(self, number, tokens, keys):
        """Make room for a request; its first blocks are stored ones."""
        count = block_pool.blocks_for(tokens)
        self._running[number] = blocks = attention.allocate_cache(
            self._model.share, count, dtype=self._model.dtype, device=torch.device("cpu")
        )
        for index, key in enumerate(keys):
            for layer, values in zip(blocks, self._stored[key], strict=True):
                layer[self._places(index)] = values

    @torch.inference_mode()
    def compute(self, number, start, hidden):
        """Return the logits [vocabulary] of the last of a request's embeddings [T, hidden]."""
        blocks = self._running[number]
        attend = attention.TorchAttention(blocks)
        attend.begin([attention.Span(start, len(hidden), range(len(blocks[0])))])
        positions = torch.arange(start, start + len(hidden))
        (logits,) = self._model.forward(hidden, positions, torch.tensor([len(hidden) - 1]), attend)
        return logits

    def store(self, number, index, key):
        """Keep a request's block for others."""
        places = self._places(index)
        self._stored[key] = [layer[places].clone() for layer in self._running[number]]

    def forget(self, key):
        """Give a stored block up."""
        del self._stored[key]

    def drop(self, number):
        """Give a request's blocks up."""
        del self._running[number]

    def _places(self, index):
        each = self._block // block_pool.BLOCK_TOKENS
        return slice(index * each, (index + 1) * each)


class Ranks:
    """All ranks' shares, as rank 0 calls them; the other ranks `follow`."""

    def __init__(self, folder: Path, model: dict, *, block: int, most_tokens: int):
        size = model["mapping"]["world_size"]
        started = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
        if size != started:
            raise RuntimeError(f"mpiSize {started} must be equal to the engine's {size} ranks")
        self._world = _World() if size > 1 else None
        self.rank = self._world.rank if self._world else 0
        raw = (folder / f"rank{self.rank}.engine").read_bytes()
        if not raw.startswith(trtllm_build.MAGIC):
            raise RuntimeError("deserialization failed: magic tag does not match")
        tensors = safetensors.torch.load(raw[len(trtllm_build.MAGIC) :])
        self.model = language.LanguageModel(
            _language(model), weights.Weights(tensors), max_tokens=most_tokens,
            group=self._world or ranks.ALONE,
        )  # fmt: skip
        self._share = _Share(self.model, block)

    def compare(self, config):
        """Refuse ranks that were not all given the same."""
        if self._world and len({str(each) for each in self._world.comm.allgather(config)}) > 1:
            raise RuntimeError("the ranks' executors differ in their config")

    def do(self, order, *arguments):
        """Let every rank do the same; return what rank 0 makes of it."""
        self._tell(order, arguments)
        return getattr(self._share, order)(*arguments)

    def stop(self):
        """Let the other ranks end."""
        self._tell("stop", ())

    def follow(self):
        """Do what rank 0 says, until it says to stop."""
        comm = self._world.comm
        while True:
            while not comm.iprobe(source=0, tag=_ORDERS):
                time.sleep(_POLL_SECONDS)
            order, arguments = comm.recv(source=0, tag=_ORDERS)
            if order == "stop":
                return
            getattr(self._share, order)(*arguments)

    def _tell(self, order, arguments):
        if self._world:
            for rank in range(1, self._world.size):
                self._world.comm.send((order, arguments), dest=rank, tag=_ORDERS)


def _language(model):
    is_qwen = model["architecture"] == "Qwen2ForCausalLM"
    return configs.LanguageConfig(
        family=configs.Family.QWEN2 if is_qwen else configs.Family.INTERNLM2,
        **{
            name: model[name]
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        },
        rms_norm_eps=model["norm_epsilon"],
        rope_theta=model["rotary_base"],
    )  # fmt: skip
