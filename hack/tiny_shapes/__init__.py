"""tiny-shapes: a model whose answers can be right or wrong, and the questions that it knows."""
