"""A fake `tensorrt_llm.bindings.executor` of 1.2.1, strict where the real one crashes or warns.

Names and keywords are those of the published binding
(`cpp/tensorrt_llm/nanobind/executor`); rules are in the class that has them. It
answers with the PyTorch interpreter of the rank tensors that the fake
`trtllm-build` has embedded, batches in flight, and reuses the keys and values of
blocks with equal tokens and extra ids, so that a wrong id gives a wrong answer.
"""

import collections
import copy
import datetime
import enum
import itertools
import json
import os
import struct
import threading
import time
import traceback
import types
import weakref
from pathlib import Path

import torch
from internvl_runtime.engine import interface, sampling

from internvl_doubles import ranks

ModelType = enum.Enum("ModelType", "DECODER_ONLY ENCODER_ONLY ENCODER_DECODER")
BatchingType = enum.Enum("BatchingType", "STATIC INFLIGHT")
CapacitySchedulerPolicy = enum.Enum(
    "CapacitySchedulerPolicy", "MAX_UTILIZATION GUARANTEED_NO_EVICT STATIC_BATCH"
)
ContextChunkingPolicy = enum.Enum("ContextChunkingPolicy", "EQUAL_PROGRESS FIRST_COME_FIRST_SERVED")
FinishReason = enum.Enum(
    "FinishReason", "NOT_FINISHED END_ID STOP_WORDS LENGTH TIMED_OUT CANCELLED", start=0
)
_PAUSING = CapacitySchedulerPolicy.MAX_UTILIZATION
_STATIC = CapacitySchedulerPolicy.STATIC_BATCH
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED_BLOCKS = 4096
_MOST_ID = 2**64


class StrictError(TypeError):
    """Raised for what the binding would refuse, or what the real executor crashes on."""


def _strict(name, positional, **fields):
    """Return a class whose constructor takes the published keywords, of the published types."""

    def initialize(self, *given, **named):
        if len(given) > len(positional):
            raise StrictError(f"{name}: {len(given)} positional arguments")
        named = {**dict(zip(positional, given, strict=False)), **named}
        for keyword in named.keys() - fields.keys():
            raise StrictError(f"{name}.__init__(): incompatible function arguments: {keyword}")
        for keyword, (kinds, default) in fields.items():
            value = named.get(keyword, default)
            if value is _REQUIRED or not _is_of(value, kinds):
                raise StrictError(f"{name}.{keyword} is {value!r}, not {kinds}")
            setattr(self, keyword, value)

    initialize.__doc__ = f"__init__(self, {', '.join(fields)}) -> None"
    return type(name, (), {"__init__": initialize})


_REQUIRED = object()


def _is_of(value, kinds):
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    for kind in kinds:
        if kind is None and value is None:
            return True
        if isinstance(kind, list) and isinstance(value, list):
            return all(_is_of(each, kind[0]) for each in value)
        is_flag = isinstance(value, bool)
        if kind is float and isinstance(value, (int, float)) and not is_flag:
            return True
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not is_flag):
            return True
    return False


_OPTIONAL_FLOAT = ((float, None), None)
_OPTIONAL_INT = ((int, None), None)
_OPTIONAL_BOOL = ((bool, None), None)

SamplingConfig = _strict(
    "SamplingConfig", ["beam_width"],
    beam_width=(int, 1), top_k=_OPTIONAL_INT, top_p=_OPTIONAL_FLOAT, top_p_min=_OPTIONAL_FLOAT,
    top_p_reset_ids=_OPTIONAL_INT, top_p_decay=_OPTIONAL_FLOAT, seed=_OPTIONAL_INT,
    temperature=_OPTIONAL_FLOAT, min_tokens=_OPTIONAL_INT,
    beam_search_diversity_rate=_OPTIONAL_FLOAT, repetition_penalty=_OPTIONAL_FLOAT,
    presence_penalty=_OPTIONAL_FLOAT, frequency_penalty=_OPTIONAL_FLOAT,
    length_penalty=_OPTIONAL_FLOAT, early_stopping=_OPTIONAL_INT,
    no_repeat_ngram_size=_OPTIONAL_INT, num_return_sequences=_OPTIONAL_INT,
    min_p=_OPTIONAL_FLOAT, beam_width_array=(([[int]], None), None),
)  # fmt: skip
OutputConfig = _strict(
    "OutputConfig", ["return_log_probs"],
    return_log_probs=(bool, False), return_context_logits=(bool, False),
    return_generation_logits=(bool, False), exclude_input_from_output=(bool, False),
    return_encoder_output=(bool, False), return_perf_metrics=(bool, False),
    additional_model_outputs=((list, None), None),
)  # fmt: skip
PromptTuningConfig = _strict(
    "PromptTuningConfig", ["embedding_table", "input_token_extra_ids"],
    embedding_table=(torch.Tensor, _REQUIRED), input_token_extra_ids=(([int], None), None),
)  # fmt: skip
KvCacheConfig = _strict(
    "KvCacheConfig", [],
    enable_block_reuse=(bool, True), max_tokens=_OPTIONAL_INT,
    max_attention_window=(([int], None), None), sink_token_length=_OPTIONAL_INT,
    free_gpu_memory_fraction=_OPTIONAL_FLOAT, host_cache_size=_OPTIONAL_INT,
    onboard_blocks=(bool, True), cross_kv_cache_fraction=_OPTIONAL_FLOAT,
    secondary_offload_min_priority=_OPTIONAL_INT, event_buffer_max_size=(int, 0),
    enable_partial_reuse=(bool, True), copy_on_partial_reuse=(bool, True), use_uvm=(bool, False),
    max_gpu_total_bytes=(int, 0),
)  # fmt: skip
SchedulerConfig = _strict(
    "SchedulerConfig", ["capacity_scheduler_policy"],
    capacity_scheduler_policy=(
        CapacitySchedulerPolicy, CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
    ),
    context_chunking_policy=((ContextChunkingPolicy, None), None),
    dynamic_batch_config=(None, None),
)  # fmt: skip
ExecutorConfig = _strict(
    "ExecutorConfig", ["max_beam_width", "scheduler_config", "kv_cache_config"],
    max_beam_width=(int, 1), scheduler_config=(SchedulerConfig, SchedulerConfig()),
    kv_cache_config=(KvCacheConfig, KvCacheConfig()), enable_chunked_context=(bool, False),
    normalize_log_probs=(bool, True), iter_stats_max_iterations=(int, 1000),
    request_stats_max_iterations=(int, 0), batching_type=(BatchingType, BatchingType.INFLIGHT),
    max_batch_size=_OPTIONAL_INT, max_num_tokens=_OPTIONAL_INT, parallel_config=(None, None),
    gpu_weights_percent=(float, 1.0), max_queue_size=_OPTIONAL_INT,
    guided_decoding_config=(None, None), gather_generation_logits=(bool, False),
    mm_embedding_offloading=(bool, False), enable_trt_overlap=(bool, False),
    fail_fast_on_attention_window_too_large=(bool, False),
)  # fmt: skip
Request = _strict(
    "Request", ["input_token_ids", "max_tokens"],
    input_token_ids=([int], _REQUIRED), max_tokens=(int, _REQUIRED), streaming=(bool, False),
    sampling_config=(SamplingConfig, SamplingConfig()),
    output_config=(OutputConfig, OutputConfig()), end_id=_OPTIONAL_INT, pad_id=_OPTIONAL_INT,
    position_ids=(([int], None), None), bad_words=(([[int]], None), None),
    stop_words=(([[int]], None), None), embedding_bias=((torch.Tensor, None), None),
    # Nothing reads it where there is an engine.
    multimodal_embedding=((torch.Tensor, None), None),
    prompt_tuning_config=((PromptTuningConfig, None), None), client_id=_OPTIONAL_INT,
    return_all_generated_tokens=(bool, False), priority=(float, 0.5),
    num_return_sequences=(int, 1), guided_decoding_params=(None, None),
)  # fmt: skip


def _record(name, *fields):
    """Return a class of objects that are read only."""
    return type(name, (types.SimpleNamespace,), dict.fromkeys(fields))


Result = _record(
    "Result", "is_final", "is_sequence_final", "sequence_index", "output_token_ids",
    "finish_reasons", "log_probs", "generation_logits", "request_perf_metrics",
)  # fmt: skip
IterationStats = _record(
    "IterationStats", "iter_latency_ms", "num_active_requests", "num_queued_requests",
    "kv_cache_stats", "inflight_batching_stats",
)  # fmt: skip
KvCacheStats = _record(
    "KvCacheStats", "max_num_blocks", "used_num_blocks", "tokens_per_block", "reused_blocks",
    "missed_blocks",
)  # fmt: skip
RequestPerfMetrics = _record("RequestPerfMetrics", "kv_cache_metrics")
InflightBatchingStats = _record(
    "InflightBatchingStats", "num_gen_requests", "num_context_requests", "num_paused_requests",
    "num_ctx_tokens",
)  # fmt: skip


class Response:
    """What a request got; `result` may be asked for only where there is no error."""

    def __init__(self, request_id, *, result=None, error_msg=None):
        self.client_id = None
        self._number = request_id
        self._result, self._error = result, error_msg

    @property
    def request_id(self):
        return self._number

    def has_error(self):
        return self._error is not None

    @property
    def error_msg(self):
        if self._error is None:
            raise StrictError("error_msg of a response without error")
        return self._error

    @property
    def result(self):
        if self._error is not None:
            raise StrictError("result of a response with an error")
        return self._result


class _Running:
    """A request in the executor."""

    def __init__(self, number, request, extra_ids):
        self.number, self.request = number, request
        self.token_ids = list(request.input_token_ids)
        self.extra_ids = extra_ids
        self.prompt_length = len(self.token_ids)
        self.computed = self.reused = 0
        self.has_begun = False
        self.generated, self.log_probs, self.logits = [], [], []
        self.is_cancelled = False
        table, self._rows = request.prompt_tuning_config, None
        # The real one reads a pinned table behind its owner's back, and has a copy from then on.
        self._table = weakref.ref(table.embedding_table) if table else None
        request.prompt_tuning_config = None

    def rows(self):
        """Return the table, which its owner keeps until it is read: up to the first token."""
        if self._rows is not None:
            return self._rows
        if (table := self._table()) is None:
            raise StrictError("the table's memory was let go before it was read")
        return table

    def keep_rows(self):
        """Have a copy from now on."""
        if self._table:
            self._rows = self.rows().clone()

    @property
    def is_in_context(self):
        return self.computed < self.prompt_length


class Executor:
    """One rank: `enqueue_request` from any thread, `await_responses` from one."""

    def __init__(self, model_path, model_type, executor_config):
        if not isinstance(model_path, (str, Path)) or model_type is not ModelType.DECODER_ONLY:
            raise StrictError("Executor(model_path, ModelType.DECODER_ONLY, executor_config)")
        if not isinstance(executor_config, ExecutorConfig):
            raise StrictError("executor_config")
        if executor_config.batching_type is not BatchingType.INFLIGHT:
            raise StrictError("the double batches in flight")
        if executor_config.scheduler_config.capacity_scheduler_policy is _STATIC:
            raise StrictError("the double batches in flight")
        share = executor_config.kv_cache_config.free_gpu_memory_fraction
        if share is not None and not 0 < share < 1:
            raise StrictError(f"free_gpu_memory_fraction is {share}")
        self._config = executor_config
        self._read(Path(model_path))
        if self._ranks.rank:
            # What is torn down without a word leaves the leader waiting.
            self._torn_down = weakref.finalize(self, os._exit, 3)
        self._requests = collections.deque()
        self._running = []
        self._responses = collections.deque()
        self._statistics = collections.deque(maxlen=executor_config.iter_stats_max_iterations)
        self._stored = collections.OrderedDict()
        self._keys = itertools.count()
        self.reused_blocks = self.missed_blocks = 0
        self._last = 0
        """Of the requests' ids."""
        self._faults = collections.deque()
        self.cancelled = []
        """Requests that were running or waiting when it was asked for; not of the real binding."""
        self._changed = threading.Condition()
        self._is_over, self._failure = False, None
        work = self._ranks.follow if self._ranks.rank else self._run
        self._thread = threading.Thread(target=work, name="executor double", daemon=True)
        self._thread.start()

    def _read(self, folder):
        described = json.loads((folder / "config.json").read_text())
        model, built = described["pretrained_config"], described["build_config"]
        most = self._config.max_batch_size or built["max_batch_size"]
        if most > built["max_batch_size"]:
            raise RuntimeError(
                f"Runtime configured max batch size ({most}) must not exceed engine max batch "
                f"size ({built['max_batch_size']})"
            )
        self._dtype = _DTYPES[model["dtype"]]
        self._batch, self._sequence = most, built["max_seq_len"]
        self._budget = self._config.max_num_tokens or built["max_num_tokens"]
        if self._budget > built["max_num_tokens"]:
            raise RuntimeError(
                f"Runtime configured max num tokens ({self._budget}) must not exceed engine max "
                f"num tokens ({built['max_num_tokens']})"
            )
        if self._config.max_beam_width > built["max_beam_width"]:
            raise RuntimeError(
                f"Runtime configured max beam width ({self._config.max_beam_width}) must not "
                f"exceed engine max beam width ({built['max_beam_width']})"
            )
        is_chunked = self._config.enable_chunked_context
        self._most_input = self._sequence - 1
        if not is_chunked:
            self._most_input = min(self._most_input, built["max_num_tokens"])
        self._rows = built["max_prompt_embedding_table_size"] // most
        self._block = built["plugin_config"]["tokens_per_block"]
        room = self._config.kv_cache_config.max_tokens
        if room is not None and room < self._sequence:
            if not self._config.fail_fast_on_attention_window_too_large:
                raise StrictError("the real one would serve shorter sequences, with a warning")
            raise RuntimeError(f"attention window {self._sequence} is too large for {room} tokens")
        if self._config.kv_cache_config.enable_partial_reuse:
            raise StrictError("the double reuses whole blocks")
        reuses = self._config.kv_cache_config.enable_block_reuse
        if reuses and built["plugin_config"]["use_paged_context_fmha"] not in {True, "enable"}:
            raise RuntimeError("KV cache reuse requires use_paged_context_fmha")
        if self._config.mm_embedding_offloading and not is_chunked:
            raise RuntimeError("mm_embedding_offloading requires chunked context")
        self._vocabulary, self._width = model["vocab_size"], model["hidden_size"]
        self._ranks = ranks.Ranks(folder, model, block=self._block, most_tokens=self._sequence)
        self._ranks.compare(_told(self._config))

    def fail_next(self, how):
        """Let what happens in flight happen: `error`, `timed_out`, `cancelled`, `paused`, `dead`.

        It meets the answer that computes next; not of the real binding.
        """
        self._faults.append(how)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()

    def shutdown(self):
        """End, on rank 0 once every answer has; elsewhere when rank 0 does."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()
        if self._ranks.rank:
            self._torn_down.detach()

    def can_enqueue_requests(self):
        return self._ranks.rank == 0

    def enqueue_request(self, request):
        self._check_alive()
        extra_ids = self._check(request)
        with self._changed:
            self._last = number = self._last + 1
            if len(request.input_token_ids) > self._most_input:
                message = (
                    f"Prompt length ({len(request.input_token_ids)}) exceeds maximum input length "
                    f"({self._most_input})."
                )
                self._responses.append(Response(number, error_msg=message))
            else:
                self._requests.append(_Running(number, copy.copy(request), extra_ids))
            self._changed.notify_all()
        return number

    def cancel_request(self, id):  # noqa: A002 - the published name
        self._check_alive()
        if not isinstance(id, int) or not 0 < id <= self._last:
            raise StrictError(f"cancel_request({id!r})")
        with self._changed:
            for each in [*self._requests, *self._running]:
                each.is_cancelled |= each.number == id
            self._changed.notify_all()

    def await_responses(self, timeout=None):
        if timeout is not None and not isinstance(timeout, datetime.timedelta):
            raise StrictError(f"timeout is {timeout!r}")
        seconds = None if timeout is None else timeout.total_seconds()
        self._check_alive()
        with self._changed:
            self._changed.wait_for(lambda: self._responses or self._failure, seconds)
            self._check_alive()
            responses = list(self._responses)
            self._responses.clear()
        return responses

    def get_latest_iteration_stats(self):
        self._check_alive()
        with self._changed:
            told = list(self._statistics)
            self._statistics.clear()
        return told

    def _check_alive(self):
        if self._ranks.rank:
            raise StrictError("requests and responses are rank 0's")
        if self._failure:
            raise RuntimeError(self._failure)
        if self._is_over:
            raise RuntimeError("the executor is shut down")

    def _check(self, request):
        """Apply the prompt table's rules; return the extra ids."""
        token_ids, table = request.input_token_ids, request.prompt_tuning_config
        room = self._sequence - len(token_ids)
        if request.max_tokens > room:
            raise StrictError(f"max_tokens {request.max_tokens} would be cut to {room}")
        if request.max_tokens < 1 or not token_ids:
            raise StrictError("an empty prompt, or no token to generate")
        _check_sampling(request.sampling_config, most_beams=self._config.max_beam_width)
        if not 0 <= request.priority <= 1:
            raise StrictError(f"priority {request.priority} is not in [0, 1]")
        rows = [(place, each) for place, each in enumerate(token_ids) if each >= self._vocabulary]
        if not rows and table is None:
            return [0] * len(token_ids)
        if table is None:
            raise StrictError(f"token id {rows[0][1]} without a prompt table")
        return self._check_table(table, rows, len(token_ids))

    def _check_table(self, table, rows, length):
        embeddings, extra_ids = table.embedding_table, table.input_token_extra_ids
        if embeddings.dtype != self._dtype:
            raise StrictError(
                "Request embedding table data type doesn't match model weight data type."
            )
        if embeddings.dim() != 2 or embeddings.shape[1] != self._width:
            raise StrictError(f"the table is {tuple(embeddings.shape)}, rows are of {self._width}")
        if embeddings.device.type != "cpu" or not embeddings.is_contiguous():
            raise StrictError("the leader sends tables that lie in the host's memory, in one piece")
        if self._config.mm_embedding_offloading and not embeddings.is_pinned():
            raise StrictError("mm_embedding_offloading requires a pinned table")
        if [each - self._vocabulary for _, each in rows] != list(range(len(embeddings))):
            raise StrictError("the prompt's rows are not those of the table, in their order")
        if len(embeddings) > self._rows:
            # The real one throws within the forward step, which ends every request.
            self._failure = (
                f"Prompt vocab size {len(embeddings)} is larger than max prompt vocab size of "
                f"{self._rows}"
            )
            raise StrictError(self._failure)
        if extra_ids is None and self._config.kv_cache_config.enable_block_reuse:
            raise StrictError(
                "Input token extra ids must be provided when enabling kv cache reuse with prompt "
                "table"
            )
        if extra_ids is None:
            return [0] * length
        places = {place for place, _ in rows}
        for place, extra in enumerate(extra_ids):
            if not 0 <= extra < _MOST_ID or bool(extra) != (place in places):
                raise StrictError(f"extra id {extra} at {place}")
        if len(extra_ids) != length:
            raise StrictError(f"{len(extra_ids)} extra ids for {length} tokens")
        return extra_ids

    def _run(self):
        try:
            while self._iterate():
                pass
            self._ranks.stop()
        except Exception as e:
            traceback.print_exc()
            with self._changed:
                self._failure = f"{type(e).__name__}: {e}"
                self._changed.notify_all()

    def _iterate(self):
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._running or self._is_over)
            # As the real one, it ends when every answer has.
            if self._is_over and not self._requests and not self._running:
                return False
            self._drop_cancelled()
            while self._requests and len(self._running) < self._batch:
                first = max(self._requests, key=lambda each: _as_float32(each.request.priority))
                self._requests.remove(first)
                self._running.append(first)
        began = time.monotonic()
        paused = self._meet_faults()
        chunks = self._plan()
        if chunks:
            self._compute(chunks)
            self._tell(chunks, time.monotonic() - began, paused=paused)
        return True

    def _meet_faults(self):
        """Return how many answers were paused."""
        paused = 0
        answering = [each for each in self._running if each.generated]
        while self._faults and answering:
            fault, each = self._faults.popleft(), answering.pop()
            if fault == "dead":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if fault == "paused":
                # Where blocks are short, and all is computed again later.
                if self._config.scheduler_config.capacity_scheduler_policy is not _PAUSING:
                    raise StrictError("no other policy pauses")
                self._drop(each)
                each.has_begun, each.computed = False, 0
                self._running.remove(each)
                self._requests.appendleft(each)
                paused += 1
            elif fault in {"timed_out", "cancelled"}:
                self._respond(each, [], FinishReason[fault.upper()])
            elif fault == "error":
                self._drop(each)
                with self._changed:
                    self._running.remove(each)
                    self._responses.append(Response(each.number, error_msg="Encountered an error"))
                    self._changed.notify_all()
            else:
                raise StrictError(fault)
        return paused

    def _drop_cancelled(self):
        for queue in (self._requests, self._running):
            for each in [each for each in queue if each.is_cancelled]:
                queue.remove(each)
                self.cancelled.append(each.number)
                self._drop(each)
                self._respond(each, [], FinishReason.CANCELLED)

    def _plan(self):
        """Return what each request computes: answers go on first, then prompts in pieces."""
        budget, chunks = self._budget, []
        for each in sorted(self._running, key=lambda running: running.is_in_context):
            if not each.has_begun:
                self._begin(each)
            length = min(len(each.token_ids) - each.computed, budget)
            if length:
                chunks.append((each, length))
                budget -= length
        return chunks

    def _begin(self, each):
        each.has_begun = True
        found = []
        if self._config.kv_cache_config.enable_block_reuse:
            # The last token is computed in any case: its logits are wanted.
            for end in range(self._block, each.prompt_length, self._block):
                key = self._key(each, end)
                if key not in self._stored:
                    break
                self._stored.move_to_end(key)
                found.append(self._stored[key])
        tokens = each.prompt_length + each.request.max_tokens
        self._ranks.do("begin", each.number, tokens, found)
        each.reused = len(found)
        each.computed = each.reused * self._block
        self.reused_blocks += each.reused
        self.missed_blocks += -(-each.prompt_length // self._block) - each.reused

    def _key(self, each, end):
        return tuple(each.token_ids[:end]), tuple(each.extra_ids[:end])

    def _compute(self, chunks):
        for each, length in chunks:
            ids = torch.tensor(each.token_ids[each.computed : each.computed + length])
            is_row = ids >= self._vocabulary
            hidden = self._ranks.model.embed(ids.where(~is_row, 0))
            if is_row.any():
                hidden[is_row] = each.rows()[ids[is_row] - self._vocabulary]
            logits = self._ranks.do("compute", each.number, each.computed, hidden)
            was_in_context = each.is_in_context
            each.computed += length
            if was_in_context:
                self._store(each, min(each.computed, each.prompt_length))
            if each.computed == len(each.token_ids):
                self._choose(each, logits)

    def _store(self, each, end):
        """Keep the blocks of a request's first tokens; the key is of all before, too."""
        for index in range(end // self._block):
            key = self._key(each, (index + 1) * self._block)
            if key not in self._stored:
                self._stored[key] = next(self._keys)
                self._ranks.do("store", each.number, index, self._stored[key])
        while len(self._stored) > _STORED_BLOCKS:
            _, oldest = self._stored.popitem(last=False)
            self._ranks.do("forget", oldest)

    def _drop(self, each):
        """Keep what an answer has computed: a next turn has it before its question."""
        if each.has_begun:
            self._store(each, each.computed)
            self._ranks.do("drop", each.number)

    def _choose(self, each, logits):
        if not each.generated:
            each.keep_rows()
        row = logits.numpy()
        wanted = _sampling(each.request.sampling_config)
        generated = collections.Counter(each.generated)
        prompt_ids = [token for token in each.request.input_token_ids if token < self._vocabulary]
        row = sampling.adjust(row, wanted, prompt_ids=prompt_ids, generated=generated)
        token = sampling.choose(
            row, wanted, request_id=str(each.number), position=len(each.generated)
        )
        told = sampling.log_probabilities(row, token, top=1)
        each.log_probs.append(0.0 if self._config.normalize_log_probs else told.chosen)
        each.logits.append(logits)
        each.generated.append(token)
        each.token_ids.append(token)
        each.extra_ids.append(0)
        self._answer(each, token)

    def _answer(self, each, token):
        request = each.request
        reason = FinishReason.NOT_FINISHED
        if token == request.end_id:
            reason = FinishReason.END_ID
        elif [token] in (request.stop_words or []):
            reason = FinishReason.STOP_WORDS
        elif len(each.generated) >= request.max_tokens:
            reason = FinishReason.LENGTH
        is_over = reason is not FinishReason.NOT_FINISHED
        # The token that ends an answer is not part of it; a stop word is.
        new = [] if reason is FinishReason.END_ID else [token]
        if request.streaming:
            if request.return_all_generated_tokens:
                new = [*each.generated[:-1], *new]
        else:
            if not is_over:
                return
            new = each.generated[: len(each.generated) - (reason is FinishReason.END_ID)]
            if not request.output_config.exclude_input_from_output:
                new = [*request.input_token_ids, *new]
        self._respond(each, new, reason)

    def _respond(self, each, token_ids, reason):
        output = each.request.output_config
        if output.return_generation_logits and not self._config.gather_generation_logits:
            raise StrictError("return_generation_logits without gather_generation_logits")
        is_over = reason is not FinishReason.NOT_FINISHED
        metrics = RequestPerfMetrics(
            kv_cache_metrics=types.SimpleNamespace(num_reused_blocks=each.reused)
        )
        result = Result(
            is_final=is_over, is_sequence_final=is_over, sequence_index=0,
            output_token_ids=[list(token_ids)], finish_reasons=[reason],
            log_probs=[list(each.log_probs)] if output.return_log_probs else None,
            generation_logits=torch.stack(each.logits).unsqueeze(0)
            if output.return_generation_logits and each.logits else None,
            request_perf_metrics=metrics if output.return_perf_metrics else None,
        )  # fmt: skip
        if is_over and each in self._running:
            self._drop(each)
        with self._changed:
            if is_over and each in self._running:
                self._running.remove(each)
            self._responses.append(Response(each.number, result=result))
            self._changed.notify_all()

    def _tell(self, chunks, seconds, *, paused):
        decodes = sum(length == 1 and bool(each.generated[1:]) for each, length in chunks)
        used = sum(-(-each.computed // self._block) for each in self._running)
        told = IterationStats(
            iter_latency_ms=1000 * seconds,
            num_active_requests=len(self._running), num_queued_requests=len(self._requests),
            kv_cache_stats=KvCacheStats(
                max_num_blocks=_STORED_BLOCKS, used_num_blocks=used,
                tokens_per_block=self._block, reused_blocks=self.reused_blocks,
                missed_blocks=self.missed_blocks,
            ),
            inflight_batching_stats=InflightBatchingStats(
                num_gen_requests=decodes, num_context_requests=len(chunks) - decodes,
                num_paused_requests=paused,
                num_ctx_tokens=sum(length for _, length in chunks) - decodes,
            ),
        )  # fmt: skip
        with self._changed:
            self._statistics.append(told)


def _check_sampling(config, *, most_beams):
    """Apply the ranges of `cpp/tensorrt_llm/executor/samplingConfig.cpp`."""
    if (config.top_k or 0) > 1024:
        raise StrictError("top_k would be cut to 1024")
    for name, is_legal in {
        "beam_width": lambda value: 1 <= value <= most_beams,
        "top_k": lambda value: value >= 0,
        "top_p": lambda value: 0 < value <= 1,
        "min_p": lambda value: 0 <= value <= 1,
        "temperature": lambda value: value >= 0,
        "repetition_penalty": lambda value: value > 0,
        "seed": lambda value: 0 <= value < _MOST_ID,
    }.items():
        value = getattr(config, name)
        if value is not None and not is_legal(value):
            raise StrictError(f"SamplingConfig.{name} is {value}")


def _as_float32(number):
    """Round as the leader does when it sends a request."""
    return struct.unpack("f", struct.pack("f", number))[0]


def _told(config):
    """Return what a config says, as plain values."""
    return {
        name: _told(value) if isinstance(value, (KvCacheConfig, SchedulerConfig)) else str(value)
        for name, value in vars(config).items()
    }


def _sampling(given):
    is_greedy = given.top_k == 1 or (not given.top_k and not given.top_p)
    return interface.Sampling(
        max_tokens=1,
        temperature=0.0 if is_greedy else (1.0 if given.temperature is None else given.temperature),
        top_p=given.top_p or 1.0,
        top_k=given.top_k or 0,
        min_p=given.min_p or 0.0,
        presence_penalty=given.presence_penalty or 0.0,
        frequency_penalty=given.frequency_penalty or 0.0,
        repetition_penalty=given.repetition_penalty or 1.0,
        seed=given.seed or 0,
    )
