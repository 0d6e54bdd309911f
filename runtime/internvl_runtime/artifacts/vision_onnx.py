"""The vision tower with its projector as an ONNX graph whose weights stay where they are.

The graph is written node by node (opset 17) rather than traced: it needs no
torch, no memory but its own few megabytes, and the weights are references into
`vision.safetensors`, whose bytes have ONNX's own order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from internvl_runtime.artifacts import layout, safetensors_file
from internvl_runtime.model import config

INPUT, OUTPUT = "input", "encoder_output"
"""[tiles, 3, 448, 448], normalized, and [tiles, 256, hidden size of the language model]."""
_OPSET = 17
_IR = 8
"""What ONNX 1.12, the first with opset 17, wrote: TensorRT's parser and onnxruntime read it."""
_PROJECTOR_EPS = 1e-5
_DTYPES = {
    "F32": onnx.TensorProto.FLOAT,
    "F16": onnx.TensorProto.FLOAT16,
    "BF16": onnx.TensorProto.BFLOAT16,
}
_SIDE = config.TILE_SIZE // config.PATCH_SIZE


def write_graph(
    model: config.ModelConfig, stored: Mapping[str, safetensors_file.Stored]
) -> onnx.ModelProto:
    """Return the graph over the tensors of `vision.safetensors`, in their dtype.

    A file of the graph must lie beside that file, or be parsed as if it did.
    """
    graph = _Graph(stored)
    hidden = _embed(graph, model.vision)
    for number in range(model.vision.num_hidden_layers):
        hidden = _layer(graph, model.vision, f"vision_model.encoder.layers.{number}", hidden)
    return graph.finish(_project(graph, model.vision, hidden), model.language.hidden_size)


class _Graph:
    """Collects nodes; every method returns the name of what it has made."""

    def __init__(self, stored: Mapping[str, safetensors_file.Stored]) -> None:
        self._stored = stored
        (self._dtype,) = {_DTYPES[each.tensor.dtype] for each in stored.values()}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        output = f"{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def split(self, whole: str, sizes: Sequence[int]) -> list[str]:
        """Cut the last dimension."""
        root = f"Split_{len(self._nodes)}"
        outputs = [f"{root}_{part}" for part in range(len(sizes))]
        inputs = [whole, self.integers(*sizes)]
        self._nodes.append(helper.make_node("Split", inputs, outputs, name=root, axis=-1))
        return outputs

    def weight(self, name: str) -> str:
        """Refer to a tensor of the file."""
        if name not in self._initializers:
            stored = self._stored[name]
            proto = onnx.TensorProto(
                name=name,
                dims=stored.tensor.shape,
                data_type=self._dtype,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            place = {
                "location": layout.VISION_FILE,
                "offset": stored.offset,
                "length": stored.tensor.bytes,
            }
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))
            self._initializers[name] = proto
        return name

    def has(self, name: str) -> bool:
        """Whether the file holds a tensor."""
        return name in self._stored

    def integers(self, *values: int) -> str:
        """Add a shape or axes."""
        return self._constant(f"int64 {values}", np.array(values, np.int64))

    def number(self, value: float, *, wide: bool = False) -> str:
        """Add a scalar, in float32 where `wide`."""
        dtype = onnx.TensorProto.FLOAT if wide else self._dtype
        name = f"{onnx.TensorProto.DataType.Name(dtype)} {value!r}"
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, dtype, [], [value])
        return name

    def cast(self, states: str, *, wide: bool) -> str:
        """Convert to float32, or back to the weights' dtype."""
        return self.add("Cast", states, to=onnx.TensorProto.FLOAT if wide else self._dtype)

    def reshape(self, states: str, *shape: int) -> str:
        """Give another shape; 0 keeps a dimension."""
        return self.add("Reshape", states, self.integers(*shape))

    def linear(self, states: str, name: str) -> str:
        """Multiply with a weight (out, in), and add its bias where there is one."""
        across = self.add("Transpose", self.weight(f"{name}.weight"), perm=[1, 0])
        product = self.add("MatMul", states, across)
        if self.has(f"{name}.bias"):
            product = self.add("Add", product, self.weight(f"{name}.bias"))
        return product

    def layer_norm(self, states: str, name: str, eps: float) -> str:
        """Normalize the last dimension; statistics are float32 by the operator's definition."""
        weights = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", states, *weights, axis=-1, epsilon=eps)

    def rms_norm(self, states: str, name: str, eps: float) -> str:
        """Normalize in float32, round, then scale: the order of the reference."""
        wide = self.cast(states, wide=True)
        squares = self.add("Mul", wide, wide)
        mean = self.add("ReduceMean", squares, axes=[-1], keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.number(eps, wide=True)))
        narrow = self.cast(self.add("Div", wide, root), wide=False)
        return self.add("Mul", narrow, self.weight(f"{name}.weight"))

    def gelu(self, states: str) -> str:
        """Apply the exact GELU, by the error function."""
        inner = self.add("Erf", self.add("Div", states, self.number(2**0.5)))
        half = self.add("Mul", states, self.number(0.5))
        return self.add("Mul", half, self.add("Add", inner, self.number(1.0)))

    def finish(self, output: str, hidden: int) -> onnx.ModelProto:
        """Return the model with one input and one output."""
        size = config.TILE_SIZE
        self._nodes.append(helper.make_node("Identity", [output], [OUTPUT], name=OUTPUT))
        shapes: dict[str, list[str | int | None]] = {
            INPUT: ["tiles", 3, size, size],
            OUTPUT: ["tiles", config.TOKENS_PER_TILE, hidden],
        }
        given, made = (
            helper.make_tensor_value_info(name, self._dtype, shape)
            for name, shape in shapes.items()
        )
        graph = helper.make_graph(
            self._nodes, "internvit", [given], [made], list(self._initializers.values())
        )
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(
            graph, opset_imports=[opset], ir_version=_IR, producer_name="internvl-runtime"
        )

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(value, name)
        return name


def _embed(graph: _Graph, vision: config.VisionConfig) -> str:
    root, width = "vision_model.embeddings", vision.hidden_size
    kernel = graph.weight(f"{root}.patch_embedding.weight")
    bias = graph.weight(f"{root}.patch_embedding.bias")
    size = [config.PATCH_SIZE, config.PATCH_SIZE]
    patches = graph.add("Conv", INPUT, kernel, bias, kernel_shape=size, strides=size)
    rows = graph.add("Transpose", graph.reshape(patches, 0, width, _SIDE**2), perm=[0, 2, 1])
    tiles = graph.add("Slice", graph.add("Shape", INPUT), graph.integers(0), graph.integers(1))
    shape = graph.add("Concat", tiles, graph.integers(1, width), axis=0)
    first = graph.add("Expand", graph.weight(f"{root}.class_embedding"), shape)
    tokens = graph.add("Concat", first, rows, axis=1)
    return graph.add("Add", tokens, graph.weight(f"{root}.position_embedding"))


def _layer(graph: _Graph, vision: config.VisionConfig, root: str, hidden: str) -> str:
    mixed = _attend(graph, vision, f"{root}.attn", _norm(graph, vision, hidden, f"{root}.norm1"))
    hidden = graph.add("Add", hidden, graph.add("Mul", mixed, graph.weight(f"{root}.ls1")))
    inner = graph.linear(_norm(graph, vision, hidden, f"{root}.norm2"), f"{root}.mlp.fc1")
    inner = graph.linear(graph.gelu(inner), f"{root}.mlp.fc2")
    return graph.add("Add", hidden, graph.add("Mul", inner, graph.weight(f"{root}.ls2")))


def _norm(graph: _Graph, vision: config.VisionConfig, hidden: str, name: str) -> str:
    norm = graph.rms_norm if vision.norm_type == "rms_norm" else graph.layer_norm
    return norm(hidden, name, vision.layer_norm_eps)


def _attend(graph: _Graph, vision: config.VisionConfig, root: str, normed: str) -> str:
    width, heads, size = vision.hidden_size, vision.num_attention_heads, vision.head_size
    query, key, value = graph.split(graph.linear(normed, f"{root}.qkv"), [width] * 3)
    if vision.qk_normalization:
        query = graph.rms_norm(query, f"{root}.q_norm", vision.layer_norm_eps)
        key = graph.rms_norm(key, f"{root}.k_norm", vision.layer_norm_eps)
    query, key, value = (
        graph.add("Transpose", graph.reshape(part, 0, 0, heads, size), perm=perm)
        for part, perm in ((query, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (value, [0, 2, 1, 3]))
    )
    scaled = graph.add("Mul", query, graph.number(size**-0.5))
    shares = graph.add("Softmax", graph.add("MatMul", scaled, key), axis=-1)
    mixed = graph.add("Transpose", graph.add("MatMul", shares, value), perm=[0, 2, 1, 3])
    return graph.linear(graph.reshape(mixed, 0, 0, width), f"{root}.proj")


def _project(graph: _Graph, vision: config.VisionConfig, hidden: str) -> str:
    """Drop the class token, merge 2 x 2 patches into one token (`ps_version` v2), project."""
    width, half = vision.hidden_size, _SIDE // 2
    patches = graph.add(
        "Slice", hidden, graph.integers(1), graph.integers(_SIDE**2 + 1), graph.integers(1)
    )
    blocks = graph.reshape(patches, 0, half, 2, half, 2, width)
    blocks = graph.add("Transpose", blocks, perm=[0, 1, 3, 2, 4, 5])
    tokens = graph.reshape(blocks, 0, half * half, 4 * width)
    tokens = graph.layer_norm(tokens, "mlp1.0", _PROJECTOR_EPS)
    return graph.linear(graph.gelu(graph.linear(tokens, "mlp1.1")), "mlp1.3")
