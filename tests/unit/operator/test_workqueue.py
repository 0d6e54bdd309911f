import asyncio
import contextlib

import pytest
from internvl_operator import workqueue


async def run_briefly(queue, *, seconds=0.05, workers=2):
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(queue.run(workers), seconds)


async def test_many_calls_before_the_work_are_one():
    done = []

    async def work(key):
        done.append(key)

    queue = workqueue.WorkQueue(work)
    for _ in range(5):
        queue.add("a")
    queue.add("b")
    await run_briefly(queue)

    assert sorted(done) == ["a", "b"]


async def test_a_key_never_runs_twice_at_once_and_runs_again_if_it_came_meanwhile():
    running, most, runs = 0, 0, 0

    async def work(_key):
        nonlocal running, most, runs
        running, runs = running + 1, runs + 1
        most = max(most, running)
        if runs == 1:
            queue.add("a")
            queue.add("a")
        await asyncio.sleep(0)
        running -= 1

    queue = workqueue.WorkQueue(work)
    queue.add("a")
    await run_briefly(queue)

    assert (most, runs) == (1, 2)


async def test_a_key_that_is_forgotten_while_it_runs_does_not_come_back():
    runs = 0

    async def work(_key):
        nonlocal runs
        runs += 1
        queue.forget("a")
        return 0.001

    queue = workqueue.WorkQueue(work)
    queue.add("a")
    await run_briefly(queue)

    assert runs == 1


async def test_a_failure_does_not_end_the_worker():
    done = []

    async def work(key):
        if key == "bad":
            raise ValueError("no")
        done.append(key)

    queue = workqueue.WorkQueue(work)
    queue.add("bad")
    queue.add("good")
    await run_briefly(queue, workers=1)

    assert done == ["good"]


async def test_a_key_comes_back_after_the_delay_it_asks_for():
    runs = 0

    async def work(_key):
        nonlocal runs
        runs += 1
        return 0.001

    queue = workqueue.WorkQueue(work)
    queue.add("a")
    await run_briefly(queue)

    assert runs > 3


@pytest.mark.parametrize(("failures", "longest"), [(1, 1), (3, 4), (30, 300)])
def test_the_pause_doubles_up_to_a_bound(failures, longest):
    pauses = [workqueue.backoff_seconds(failures) for _ in range(50)]
    assert longest / 2 <= min(pauses) <= max(pauses) <= longest
