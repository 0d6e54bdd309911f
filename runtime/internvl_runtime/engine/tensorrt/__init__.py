"""The engine of TensorRT-LLM 1.2.1 and TensorRT 10.14, in-flight batching by its executor."""
