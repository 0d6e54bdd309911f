"""What rank 0 tells is what the ranks behind it do."""

import queue
import types

import pytest
import torch
from internvl_runtime import errors
from internvl_runtime.engine.pytorch import attention, following

SPANS = [attention.Span(0, 3, [4, 5]), attention.Span(17, 1, [6, 7, 8])]


class Group:
    """Both ends of a connection of two ranks."""

    def __init__(self):
        self.told, self.shared, self.least_of, self.closed = queue.Queue(), queue.Queue(), [], 0

    def tell(self, numbers):
        self.told.put(numbers)

    def hear(self):
        return self.told.get_nowait()

    def share(self, tensor):
        if self.shared.empty():
            self.shared.put(tensor)
            return tensor
        return self.shared.get()

    def least(self, number):
        self.least_of.append(number)
        return number

    def close(self):
        self.closed += 1


class Model:
    """Keeps what it is run on; also stands for its attention."""

    device, dtype = torch.device("cpu"), torch.float32
    language = types.SimpleNamespace(hidden_size=8)

    def __init__(self):
        self.runs, self.blocks = [], []

    def create_attention(self, blocks):
        self.blocks.append(blocks)
        return self

    def begin(self, spans):
        self.spans = spans

    def forward(self, hidden, positions, last, attend):
        assert attend is self
        assert hidden[last].shape == (len(last), hidden.shape[1])
        self.runs.append((self.spans, hidden, positions.tolist(), last.tolist()))


def test_ranks_behind_rank_0_run_the_same_tokens():
    group, model = Group(), Model()
    leader = following.Leader(group)
    hidden = torch.rand(4, 8)
    leader.allocate(9)
    assert leader.measure(70) == 70
    leader.allocate(5)
    with leader.step(SPANS, hidden, [2, 3]):
        pass
    leader.stop()

    following.follow(group, model, model.create_attention, lambda blocks: 10 * blocks)

    assert model.blocks == [9, 5]
    assert group.least_of == [70, 90]
    ((spans, run, positions, last),) = model.runs
    assert (spans, positions, last) == (SPANS, [0, 1, 2, 17], [2, 3])
    assert torch.equal(run, hidden)
    assert group.closed == 2


def test_a_step_within_a_prompt_chooses_nothing():
    group, model = Group(), Model()
    leader = following.Leader(group)
    leader.allocate(9)
    with leader.step(SPANS[:1], torch.rand(3, 8), []):
        pass
    leader.stop()
    following.follow(group, model, model.create_attention, lambda blocks: blocks)
    assert model.runs[0][3] == []


def test_a_step_that_fails_on_rank_0_alone_ends_all():
    group = Group()
    leader = following.Leader(group)

    def fail():
        with leader.step(SPANS, torch.rand(4, 8), [3]):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(errors.RankFailedError, match="of all ranks: CUDA out of memory"):
        fail()
    told = group.told.qsize()
    # The others are in the step, and would not hear it.
    leader.stop()
    assert (group.told.qsize(), group.closed) == (told, 0)


def test_a_leader_that_has_lost_a_rank_tells_no_more():
    class Broken(Group):
        def tell(self, numbers):
            super().tell(numbers)
            raise errors.RankLostError("another rank is gone")

    group = Broken()
    leader = following.Leader(group)
    with pytest.raises(errors.RankLostError), leader.step(SPANS, torch.zeros(4, 8), [2, 3]):
        raise AssertionError
    group.told.get_nowait()
    leader.stop()
    assert group.told.empty()


def test_an_order_of_another_release_ends_the_rank():
    group, model = Group(), Model()
    group.tell([9])
    with pytest.raises(errors.RankFailedError, match="rank 0 has ordered 9"):
        following.follow(group, model, model.create_attention, int)
