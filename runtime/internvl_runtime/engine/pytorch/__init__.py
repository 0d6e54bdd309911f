"""The PyTorch engine: the same rank checkpoints that TensorRT-LLM reads."""
