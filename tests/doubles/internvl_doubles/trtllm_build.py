"""A fake `trtllm-build` of TensorRT-LLM 1.2.1: its flags, checks, log and files; no engine.

It takes exactly the published flags (`tensorrt_llm/commands/build.py`), checks a
checkpoint as the loader does, and writes an engine folder whose rank engines
embed their rank's tensors. TRTLLM_BUILD_FAILS makes it fail in a known way.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from internvl_doubles import checkpoint

VERSION = "1.2.1"
MAGIC = b"fake TensorRT-LLM engine: rank tensors follow\n"
FAILURES = {
    "gpu-memory": "[TRT] [E] [virtualMemoryBuffer.cpp::resizePhysical::161] Error Code 2: "
    "OutOfMemory (Requested size was 42949672960 bytes.)",
    "architecture": "RuntimeError: Unsupported model architecture: sm_70 is not supported on SM70",
    "versions": "TypeError: pybind11::init(): factory function returned nullptr",
    "disk": "OSError: [Errno 28] No space left on device",
    "unknown": "RuntimeError: something else",
}
_SWITCH = ("enable", "disable")
_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
_FLAGS: dict[str, dict] = {
    "checkpoint_dir": {}, "model_config": {}, "build_config": {}, "model_cls_file": {},
    "model_cls_name": {}, "output_dir": {"default": "engine_outputs"},
    "max_batch_size": {"type": int, "default": 2048},
    "max_input_len": {"type": int, "default": 1024}, "max_beam_width": {"type": int, "default": 1},
    "max_num_tokens": {"type": int, "default": 8192}, "opt_num_tokens": {"type": int},
    "max_encoder_input_len": {"type": int, "default": 1024},
    "kv_cache_type": {"choices": ("continuous", "paged", "disabled")}, "paged_kv_cache": {},
    "input_timing_cache": {}, "output_timing_cache": {"default": "model.cache"},
    "profiling_verbosity": {"choices": ("layer_names_only", "detailed", "none")},
    "workers": {"type": int, "default": 1},
    "log_level": {
        "choices": ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")
    },
    "visualize_network": {}, "logits_dtype": {"choices": ("float16", "float32")}, "lora_dir": {},
    "lora_ckpt_source": {"choices": ("hf", "nemo")}, "lora_target_modules": {},
    "max_lora_rank": {"type": int, "default": 64}, "speculative_decoding_mode": {},
    "max_draft_len": {"type": int, "default": 0},
    "bert_attention_plugin": {"choices": _DTYPES}, "gpt_attention_plugin": {"choices": _DTYPES},
    "gemm_plugin": {"choices": (*_DTYPES, "fp8", "nvfp4")},
    "gemm_swiglu_plugin": {"choices": ("fp8", "disable")},
    "fp8_rowwise_gemm_plugin": {"choices": _DTYPES}, "lora_plugin": {"choices": _DTYPES},
    "dora_plugin": {"choices": _SWITCH}, "moe_plugin": {"choices": _DTYPES},
    "mamba_conv1d_plugin": {"choices": _DTYPES}, "nccl_plugin": {"choices": _DTYPES},
    "low_latency_gemm_plugin": {"choices": ("fp8", "disable")},
    "low_latency_gemm_swiglu_plugin": {"choices": ("fp8", "disable")},
    "gemm_allreduce_plugin": {"choices": ("float16", "bfloat16", "disable")},
    "context_fmha": {"choices": _SWITCH}, "bert_context_fmha_fp32_acc": {"choices": _SWITCH},
    "remove_input_padding": {"choices": _SWITCH}, "tokens_per_block": {"type": int, "default": 32},
    "use_paged_context_fmha": {"choices": _SWITCH}, "use_fp8_context_fmha": {"choices": _SWITCH},
    "fuse_fp4_quant": {"choices": _SWITCH}, "multiple_profiles": {"choices": _SWITCH},
    "paged_state": {"choices": _SWITCH}, "norm_quant_fusion": {"choices": _SWITCH},
    "reduce_fusion": {"choices": _SWITCH}, "user_buffer": {"choices": _SWITCH},
    "use_fused_mlp": {"choices": _SWITCH}, "pp_reduce_scatter": {"choices": _SWITCH},
}  # fmt: skip
_SWITCHES = (
    "strip_plan", "weight_sparsity", "weight_streaming", "fast_build", "enable_debug_output",
    "dry_run", "monitor_memory", "gather_context_logits", "gather_generation_logits",
    "gather_all_token_logits",
)  # fmt: skip
_ALIASES = {
    "max_seq_len": ("--max_seq_len", "--max_decoder_seq_len"),
    "max_prompt_embedding_table_size": (
        "--max_prompt_embedding_table_size", "--max_multimodal_len",
    ),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the published command line."""
    made = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False)
    for name, options in _FLAGS.items():
        made.add_argument(f"--{name}", **{"default": None, **options})
    for name in _SWITCHES:
        made.add_argument(f"--{name}", action="store_true")
    for name, aliases in _ALIASES.items():
        made.add_argument(*aliases, dest=name, type=int, default=None)
    return made


def main() -> int:
    """Build."""
    print(f"[TensorRT-LLM] TensorRT-LLM version: {VERSION}", flush=True)
    arguments = parser().parse_args()
    try:
        _build(arguments)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _build(arguments: argparse.Namespace) -> None:
    _fail(os.environ.get("TRTLLM_BUILD_FAILS"))
    folder, output = Path(arguments.checkpoint_dir), Path(arguments.output_dir)
    config = checkpoint.read_config(folder)
    most = config["max_position_embeddings"]
    if (arguments.max_seq_len or most) > most:
        _log("W", f"max_seq_len {arguments.max_seq_len} is larger than {most}")
    ranks = config["mapping"]["world_size"]
    output.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        for warning in checkpoint.check_rank(config, folder / f"rank{rank}.safetensors"):
            _log("W", warning)
        _log("I", f"Compute capability: (9, 0)\n[TRT] [I] Set dtype to {config['dtype']}.")
        time.sleep(float(os.environ.get("TRTLLM_BUILD_SECONDS", "0")))
        _log("I", "Total time of building Unnamed Network 0: 00:00:07")
        path = output / f"rank{rank}.engine"
        _log("I", f"Serializing engine to {path}...")
        with (
            path.open("wb") as engine,
            (folder / f"rank{rank}.safetensors").open("rb") as rank_file,
        ):
            engine.write(MAGIC)
            shutil.copyfileobj(rank_file, engine)
        _log("I", "Engine serialized. Total time: 00:00:01")
    described = {
        "version": VERSION,
        "pretrained_config": config,
        "build_config": {
            "max_input_len": arguments.max_input_len,
            "max_seq_len": arguments.max_seq_len or most,
            "max_batch_size": arguments.max_batch_size,
            "max_beam_width": arguments.max_beam_width,
            "max_num_tokens": arguments.max_num_tokens,
            "max_prompt_embedding_table_size": arguments.max_prompt_embedding_table_size or 0,
            "kv_cache_type": (arguments.kv_cache_type or "paged").upper(),
            "plugin_config": {
                name: getattr(arguments, name)
                for name in ("gemm_plugin", "gpt_attention_plugin", "tokens_per_block",
                             "use_paged_context_fmha", "remove_input_padding", "context_fmha")
            },
        },
    }  # fmt: skip
    (output / "config.json").write_text(json.dumps(described, indent=4))
    if arguments.output_timing_cache:
        Path(arguments.output_timing_cache).write_bytes(b"timings")
    _log("I", "Total time of building all engines: 00:00:09")


def _fail(how: str | None) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how:
        print(FAILURES[how], flush=True)
        sys.exit(1)


def _log(severity: str, words: str) -> None:
    print(f"[11/23/2026-12:00:00] [TRT-LLM] [{severity}] {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
