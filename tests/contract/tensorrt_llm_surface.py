"""The published surface of TensorRT-LLM's engine flow that our code may use, with its sources.

The package can not be installed here. Each row names the public file and commit
in which it was read (https://github.com/NVIDIA/TensorRT-LLM); 1.2.1 is the last
release but one with these files.
"""

BUILD = ("tensorrt_llm/commands/build.py", "008b2b8d23af95e4e19fa6f354f9c5f6349b2bfc")
PLUGINS = ("tensorrt_llm/plugin/plugin.py", "c20322ffd3dc0740ca530c9fad989b22e64f6e06")
MODELING = ("tensorrt_llm/models/modeling_utils.py", "01ea6d79d454bb3ab10c7510a6f706ba039090c2")
LLAMA = ("tensorrt_llm/models/llama/config.py", "04100fd0a70976e86e0ac117f34942d06c21545d")
QWEN = ("tensorrt_llm/models/qwen/config.py", "0428c18828880e7c60c13cc5cc0794bbbc05c0a3")
INTERNLM2 = (
    "examples/models/core/internlm2/convert_checkpoint.py",
    "b93e14ca093e446615f3009cae6ca5a33c4f2f56",
)
MAPPING = ("tensorrt_llm/mapping.py", "05ebebb2c1d34320db9019f2b7ace6009a67e997")

FLAGS = {
    "--checkpoint_dir": BUILD,
    "--output_dir": BUILD,
    "--max_batch_size": BUILD,
    "--max_input_len": BUILD,
    "--max_seq_len": BUILD,
    "--max_num_tokens": BUILD,
    "--max_beam_width": BUILD,
    "--max_prompt_embedding_table_size": BUILD,
    "--kv_cache_type": BUILD,
    "--input_timing_cache": BUILD,
    "--output_timing_cache": BUILD,
    "--workers": BUILD,
    "--log_level": BUILD,
    # `add_plugin_argument` makes a flag of each field of PluginConfig.
    "--gemm_plugin": PLUGINS,
    "--gpt_attention_plugin": PLUGINS,
    "--tokens_per_block": PLUGINS,
    "--use_paged_context_fmha": PLUGINS,
    "--context_fmha": PLUGINS,
    "--remove_input_padding": PLUGINS,
}

CONFIG_KEYS = {
    **dict.fromkeys(
        (
            "architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "vocab_size", "hidden_act", "logits_dtype", "norm_epsilon", "position_embedding_type",
            "max_position_embeddings", "num_key_value_heads", "intermediate_size", "mapping",
            "quantization", "use_parallel_embedding", "embedding_sharding_dim", "head_size",
        ),
        MODELING,
    ),
    "rotary_base": LLAMA,
    "rotary_scaling": LLAMA,
    "attn_bias": LLAMA,
    "mlp_bias": QWEN,
    "qwen_type": QWEN,
    "tie_word_embeddings": QWEN,
    "has_partial_lora_mask": INTERNLM2,
}  # fmt: skip

MAPPING_KEYS = dict.fromkeys(("world_size", "tp_size", "pp_size"), MAPPING)
QUANTIZATION_KEYS = dict.fromkeys(("quant_algo", "kv_cache_quant_algo"), MODELING)
QUANTIZATION_VALUES = {None: MODELING, "FP8_PER_CHANNEL_PER_TOKEN": MODELING}
DISTRIBUTIONS = {"tensorrt": "10.14.1.48.post1", "tensorrt_llm": "1.2.1"}
