"""A Hugging Face style checkpoint to the TensorRT-LLM checkpoint layout.

Output: `config.json` and `rank{r}.safetensors` as TensorRT-LLM reads them, the
tower and projector with their published names in `vision.safetensors`, and the
model's own config and tokenizer files in `model/`. A group of tensors at a
time is made durable and recorded, so that a later try goes on behind it.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

from internvl_runtime import errors
from internvl_runtime.artifacts import checkpoint, journal, layout, progress, source, tensor_stream
from internvl_runtime.model import config, tokenizer
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

QUANTIZATIONS = {"None": None, "FP8": "FP8_PER_CHANNEL_PER_TOKEN"}
"""The offered quantizations and TensorRT-LLM's names of them."""
_NOT_COPIED = {"model.safetensors.index.json"}
_JOURNAL = "converted-groups"
"""In the output, until it is published."""
_MOST_UNSETTLED_BYTES = 256 * 2**20
"""What a kill costs; asking the disk more often costs speed."""
_UNSETTLED_PART = 1 / 8
"""Of small files."""


def convert(
    *,
    weights: str,
    dtype: str,
    quantization: str = "None",
    tensor_parallel_size: int,
    cache: caches.Cache,
    stage: progress.Progress,
) -> caches.Published:
    """Publish the checkpoint of some weights in a dtype, for a number of ranks.

    Raises StageError for a dtype, quantization or tensor parallel size that is not offered.
    """
    _check("dtype", dtype, checkpoint.DTYPES)
    _check("quantization", quantization, QUANTIZATIONS)
    inputs = keys.checkpoint_inputs(
        weights=weights,
        dtype=dtype,
        quantization=quantization,
        tensor_parallel_size=tensor_parallel_size,
    )
    key = keys.key_of(keys.Kind.CHECKPOINTS, inputs)
    with cache.workspace(keys.Kind.CHECKPOINTS, key) as workspace:
        published = cache.find(keys.Kind.CHECKPOINTS, key)
        if published:
            return published
        folder = source.weights_folder(cache.get(keys.Kind.WEIGHTS, weights))
        with caches.naming_a_full_disk(cache.root):
            digests = write_checkpoint(
                folder,
                workspace,
                dtype=dtype,
                quantization=quantization,
                ranks=tensor_parallel_size,
                report=stage.step("convert", unit="bytes"),
            )
            return cache.publish(
                workspace,
                kind=keys.Kind.CHECKPOINTS,
                inputs=inputs,
                references=[caches.Reference(keys.Kind.WEIGHTS.value, weights)],
                digests=digests,
                scratch=(_JOURNAL,),
            )


def write_checkpoint(
    folder: Path,
    output: Path,
    *,
    dtype: str,
    quantization: str = "None",
    ranks: int,
    report: progress.Report,
) -> dict[str, str]:
    """Convert the checkpoint in `folder`, or what is left of it where `output` holds a part.

    Returns the SHA-256 of the files with tensors.
    """
    model = config.read_model_config(folder)
    tokenizer.load_tokenizer(folder, model)
    layouts = layout.layouts(model, ranks)
    _copy_small_files(folder, output / "model")
    settings = describe_checkpoint(
        model.language, dtype=dtype, quantization=quantization, ranks=ranks
    )
    (output / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    converted = journal.Journal(output / _JOURNAL)
    encoding = checkpoint.encoding_of(dtype=dtype, quantization=quantization)
    counter = _Counter(report, sum(files.size(encoding) for files in layouts))
    digests: dict[str, str] = {}
    with tensor_stream.Reader(folder) as reader:
        for files in layouts:
            digests |= _write_files(files, output, reader, converted, counter, encoding)
    return digests


def _write_files(
    files: layout.Layout,
    output: Path,
    reader: tensor_stream.Reader,
    converted: journal.Journal,
    counter: "_Counter",
    encoding: layout.Encoding,
) -> dict[str, str]:
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(tensor_stream.Writer(output, files, encoding))
        batch = min(_MOST_UNSETTLED_BYTES, int(files.size(encoding) * _UNSETTLED_PART))
        settler = stack.enter_context(_Settler(writer, converted, batch))
        left = [group for group in files.groups if group.name not in converted.done]
        wanted = (tensor.sources for group in left for tensor in group.tensors)
        loaded = stack.enter_context(reader.load_ahead(wanted))
        for group in files.groups:
            size = dataclasses.replace(files, groups=(group,)).size(encoding)
            if group in left:
                for tensor in group.tensors:
                    writer.write(tensor.name, tensor.cut(next(loaded)))
                settler.add(group, size)
            else:
                writer.skip(group)
            counter.add(size)
        settler.finish()
        return writer.digests


class _Settler(contextlib.ExitStack):
    """Makes groups durable and records them, beside the writing of the next ones."""

    def __init__(
        self, writer: tensor_stream.Writer, converted: journal.Journal, batch_bytes: int
    ) -> None:
        super().__init__()
        self._writer, self._converted, self._batch_bytes = writer, converted, batch_bytes
        self._thread = self.enter_context(futures.ThreadPoolExecutor(1))
        self._settling: futures.Future[None] | None = None
        self._groups: list[str] = []
        self._bytes = 0

    def add(self, group: layout.Group, size: int) -> None:
        """Take a group that is written, and settle all of them when they are many bytes."""
        self._groups.append(group.name)
        self._bytes += size
        if self._bytes >= self._batch_bytes:
            self._begin()

    def finish(self) -> None:
        """Return when everything is durable."""
        self._begin()
        self._wait()

    def _begin(self) -> None:
        self._wait()
        self._settling = self._thread.submit(self._settle, self._groups)
        self._groups, self._bytes = [], 0

    def _wait(self) -> None:
        if self._settling:
            self._settling.result()

    def _settle(self, groups: list[str]) -> None:
        self._writer.sync()
        self._converted.add(*groups)


def describe_checkpoint(
    language: config.LanguageConfig, *, dtype: str, quantization: str, ranks: int
) -> dict[str, Any]:
    """Return TensorRT-LLM's config.json.

    `rotary_scaling` is null: dynamic NTK is the identity up to the 32,768
    positions that are offered, and TensorRT-LLM 1.2.1 can not read it.
    """
    by_family: dict[str, Any] = (
        {
            "architecture": "Qwen2ForCausalLM",
            "qwen_type": "qwen2",
            "attn_bias": True,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        }
        if language.family is config.Family.QWEN2
        else {
            "architecture": "InternLM2ForCausalLM",
            "attn_bias": False,
            "has_partial_lora_mask": False,
        }
    )
    return {
        **by_family,
        "dtype": dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": language.num_hidden_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "head_size": language.head_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "norm_epsilon": language.rms_norm_eps,
        "vocab_size": language.vocab_size,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": language.rope_theta,
        "rotary_scaling": None,
        "max_position_embeddings": language.max_position_embeddings,
        "hidden_act": "silu",
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "quantization": {"quant_algo": QUANTIZATIONS[quantization], "kv_cache_quant_algo": None},
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
    }


class _Counter:
    def __init__(self, report: progress.Report, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def add(self, count: int) -> None:
        self._done += count
        self._report(self._done, self._total)


def _copy_small_files(folder: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        is_small = path.suffix in {".json", ".txt", ".model"}
        if is_small and path.name not in _NOT_COPIED:
            shutil.copyfile(path, output / path.name)


def _check(field: str, given: str, offered: Mapping[str, object]) -> None:
    if given not in offered:
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"{field} {given} is not one of {', '.join(offered)}",
            remedy=f"change spec.engine.{field}",
        )
