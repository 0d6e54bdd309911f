"""The engine worker: a process that loads an engine and answers over a Unix socket.

The socket is served by the event loop; torch runs in one thread of its own,
which takes requests from a queue and looks for cancels between steps.
"""

import argparse
import asyncio
import concurrent.futures
import logging
import queue
import sys
from pathlib import Path

import torch

from internvl_runtime import errors
from internvl_runtime.engine import channel, folder, interface, verification
from internvl_runtime.engine.pytorch import generator as generators
from internvl_runtime.model import prompt

logger = logging.getLogger(__name__)


class Worker:
    """Answers requests one after the other."""

    def __init__(self, generator: generators.Generator, send: "Send") -> None:
        self._generator = generator
        self._send = send
        self._requests: queue.SimpleQueue[channel.Submit | None] = queue.SimpleQueue()
        self._unfinished: set[str] = set()
        self._cancelled: set[str] = set()

    def submit(self, request: channel.Submit) -> None:
        """Queue a request."""
        self._unfinished.add(request.request_id)
        self._requests.put(request)

    def cancel(self, request_id: str) -> None:
        """Stop a request before its next step; one that has ended is none."""
        if request_id in self._unfinished:
            self._cancelled.add(request_id)

    def stop(self) -> None:
        """End `run` behind what was submitted before."""
        self._requests.put(None)

    def run(self) -> None:
        """Answer requests until `stop`; runs in a thread of its own."""
        while (request := self._requests.get()) is not None:
            self._answer(request)
            self._unfinished.discard(request.request_id)
            self._cancelled.discard(request.request_id)

    def _answer(self, submitted: channel.Submit) -> None:
        try:
            tiles = [channel.take(shared) for shared in submitted.tiles]
            for step in self._generator.generate(_to_request(submitted), tiles):
                if submitted.request_id in self._cancelled:
                    self._send(channel.StepResult(submitted.request_id, (), error="cancelled"))
                    return
                if step is not None:
                    self._send(_to_result(submitted.request_id, step))
        except errors.RequestError as e:
            self._send(
                channel.StepResult(
                    submitted.request_id, (), error=e.message, parameter=e.parameter or ""
                )
            )
        except Exception:
            # One request that the engine can not bear must not end those of others.
            logger.exception("request %s failed", submitted.request_id)
            self._send(channel.StepResult(submitted.request_id, (), error="this request failed"))


class Send:
    """Sends steps from the engine's thread through the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter) -> None:
        self._loop = loop
        self._writer = writer

    def __call__(self, step: channel.StepResult) -> None:
        """Send one step."""
        message = channel.encode(channel.Steps((step,)))
        self._loop.call_soon_threadsafe(self._writer.write, message)


def load(engine_dir: Path) -> generators.Generator:
    """Load an engine and repeat its recorded answers."""
    engine = folder.open_engine(engine_dir)
    tokens = engine.load_tokenizer()
    generator = generators.load_generator(engine, tokens)
    verification.check(
        generator,
        engine.model,
        tokens,
        recorded=engine.read_verification(),
        dtype=engine.dtype,
    )
    return generator


async def serve(engine_dir: Path, socket: Path) -> None:
    """Connect to the server, load, and answer until it says stop or is gone."""
    reader, writer = await asyncio.open_unix_connection(socket)
    loop = asyncio.get_running_loop()
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
        try:
            generator = await loop.run_in_executor(thread, load, engine_dir)
        except errors.StageError as e:
            writer.write(channel.encode(channel.Failed(e.reason.value, e.message, e.remedy)))
            await writer.drain()
            return
        worker = Worker(generator, Send(loop, writer))
        running = loop.run_in_executor(thread, worker.run)
        writer.write(channel.encode(channel.Ready(channel.VERSION)))
        receiving = asyncio.ensure_future(_receive(reader, worker))
        await asyncio.wait([running, receiving], return_when=asyncio.FIRST_COMPLETED)
        worker.stop()
        await running
        receiving.cancel()
        writer.close()


async def _receive(reader: asyncio.StreamReader, worker: Worker) -> None:
    while True:
        try:
            message = await channel.read_to_worker(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        match message:
            case channel.Submit():
                worker.submit(message)
            case channel.Cancel(request_id):
                worker.cancel(request_id)
            case channel.Stop():
                return


def _to_request(submitted: channel.Submit) -> interface.GenerationRequest:
    return interface.GenerationRequest(
        request_id=interface.RequestId(submitted.request_id),
        prompt=prompt.Prompt(submitted.token_ids, submitted.placements),
        images=(),
        sampling=submitted.sampling,
        stop_token_ids=submitted.stop_token_ids,
        constraint=submitted.constraint,
    )


def _to_result(request_id: str, step: generators.Generated) -> channel.StepResult:
    return channel.StepResult(
        request_id,
        (step.token_id,),
        log_probabilities=step.log_probabilities,
        finish_reason=step.finish_reason,
    )


def main() -> int:
    """Run the worker; the server starts it."""
    parser = argparse.ArgumentParser(prog="internvl-engine-worker")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    asyncio.run(serve(arguments.engine, arguments.socket))
    return 0


if __name__ == "__main__":
    sys.exit(main())
