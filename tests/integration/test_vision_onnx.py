"""The ONNX graph of the tower computes what the PyTorch engine's tower does."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from internvl_runtime.artifacts import convert, layout, safetensors_file, shapes, vision_onnx
from internvl_runtime.engine import pixels
from internvl_runtime.engine.pytorch import vision, weights
from internvl_runtime.model import config

TOLERANCE = 1e-4
"""Of features whose magnitude is one: float32 in another order."""


def write(checkpoint, folder, dtype):
    folder.mkdir()
    convert.write_checkpoint(checkpoint, folder, dtype=dtype, ranks=1, report=lambda *_: None)
    model = config.read_model_config(checkpoint)
    graph = vision_onnx.write_graph(
        model, safetensors_file.read_header(folder / layout.VISION_FILE)
    )
    onnx.save_model(graph, folder / "vision.onnx")
    return model, graph


def test_onnxruntime_gives_the_towers_features(checkpoint, tmp_path, capsys):
    folder = tmp_path / "float32"
    model, _ = write(checkpoint, folder, "float32")
    onnx.checker.check_model(str(folder / "vision.onnx"), full_check=True)
    tower = vision.VisionTower(
        model.vision, weights.load_weights(folder / layout.VISION_FILE, torch.device("cpu"))
    )
    session = onnxruntime.InferenceSession(
        folder / "vision.onnx", providers=["CPUExecutionProvider"]
    )

    for count in (1, 3):
        drawn = np.random.default_rng(count).integers(0, 256, (count, 448, 448, 3), np.uint8)
        tiles = torch.from_numpy(drawn)
        with torch.inference_mode():
            expected = tower.encode(tiles).numpy()
        given = pixels.normalize(tiles, dtype=torch.float32).numpy()
        (features,) = session.run([vision_onnx.OUTPUT], {vision_onnx.INPUT: given})
        error = np.abs(features - expected).max()
        with capsys.disabled():
            print(f" [{count} tiles: max abs error {error:.2e}]", end="")
        assert features.shape == (count, 256, model.language.hidden_size)
        assert error < TOLERANCE * max(1.0, np.abs(expected).max())


def test_in_bfloat16_the_graph_is_the_same_node_by_node(checkpoint, tmp_path):
    _, wide = write(checkpoint, tmp_path / "float32", "float32")
    _, narrow = write(checkpoint, tmp_path / "bfloat16", "bfloat16")

    assert len(wide.graph.node) == len(narrow.graph.node)
    for ours, theirs in zip(narrow.graph.node, wide.graph.node, strict=True):
        names = [
            [name.replace("BFLOAT16", "FLOAT") for name in node.input] for node in (ours, theirs)
        ]
        assert (ours.op_type, names[0], list(ours.output)) == (
            theirs.op_type, names[1], list(theirs.output),
        )  # fmt: skip
        attributes = [{a.name: a for a in node.attribute} for node in (ours, theirs)]
        if ours.op_type == "Cast":
            assert attributes[0]["to"].i in {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT}
        else:
            assert attributes[0] == attributes[1]
    kinds = {tensor.data_type for tensor in narrow.graph.initializer if tensor.external_data}
    assert kinds == {onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("name", ["InternVL2_5-1B", "InternVL2_5-26B"])
def test_the_graphs_of_the_published_towers_are_small_and_valid(name, tmp_path):
    model = shapes.PUBLISHED[name]
    _, tower = layout.layouts(model, 1)
    stored = safetensors_file.place(tower.infos(layout.Encoding("BF16")))

    graph = vision_onnx.write_graph(model, stored)

    assert graph.ByteSize() < 2_000_000
    named = {t.name for t in graph.graph.initializer if t.external_data}
    assert named == stored.keys()
