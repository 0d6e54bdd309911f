import io
import json
from pathlib import Path

import pytest
from internvl_runtime import errors
from internvl_runtime.artifacts import convert, progress, shapes, source, stages, synthesize
from internvl_runtime.model import config
from internvl_runtime.store import cache, keys

NO_FILE = Path("absent")


def synthesized(folder, *, shape=shapes.TINY, family=config.Family.QWEN2, seed=1):
    recipe = synthesize.Recipe(shape, family, seed)
    synthesize.write_checkpoint(recipe, folder, tokenizer_model=NO_FILE, report=lambda *_: None)
    return folder


def quiet(stage="test"):
    return progress.Progress(stage, io.StringIO())


def folder_source(path):
    return source.FolderSource(path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_seeds_give_equal_bytes_and_others_other_ones(tmp_path):
    one, same = synthesized(tmp_path / "a"), synthesized(tmp_path / "b")
    other = synthesized(tmp_path / "c", seed=2)

    assert contents(one) == contents(same)
    assert contents(one) != contents(other)


@pytest.mark.parametrize("family", list(config.Family))
@pytest.mark.parametrize("shape", [shapes.TINY, shapes.TINY_6B_VISION])
def test_a_tiny_checkpoint_holds_every_tensor_in_several_files(tmp_path, shape, family):
    folder = synthesized(tmp_path, shape=shape, family=family)

    model = config.read_model_config(folder)
    shards = sorted(folder.glob("*.safetensors"))
    source.check_tensors(shards, model)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) >= 2
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert model.language.vocab_size % 2 == 1
    assert (model.language.num_attention_heads, model.language.num_key_value_heads) == (8, 2)


def test_the_sizes_that_a_synthetic_source_announces_are_those_it_writes(tmp_path):
    recipe = synthesize.Recipe(shapes.TINY, config.Family.INTERNLM2, 3)
    made = source.SyntheticSource(recipe, NO_FILE)
    identified = made.identify(cache.Cache(tmp_path), quiet())
    made.fetch(identified, tmp_path, quiet())

    sizes = {file["path"]: file["size"] for file in identified.files}
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}


def test_an_unknown_shape_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(errors.StageError, match="'huge'") as caught:
        synthesized(tmp_path, shape="huge")
    assert "InternVL2_5-8B" in caught.value.remedy


def test_a_mounted_folder_is_referenced_and_not_copied(tmp_path):
    model = synthesized(tmp_path / "model")
    store = cache.Cache(tmp_path / "cache")
    origin = folder_source(model)

    resolved = stages.resolve(origin, cache=store, stage=quiet())
    published = stages.fetch(origin, weights=resolved.weights, cache=store, stage=quiet())

    assert source.weights_folder(published) == model
    assert published.manifest.files == []


def test_the_weights_key_follows_the_content_and_not_the_place(tmp_path):
    store = cache.Cache(tmp_path / "cache")
    one = folder_source(synthesized(tmp_path / "a"))
    moved = folder_source(synthesized(tmp_path / "b"))
    other = folder_source(synthesized(tmp_path / "c", seed=2))

    def weights(origin):
        return stages.resolve(origin, cache=store, stage=quiet()).weights

    assert weights(one) == weights(moved)
    assert weights(one) != weights(other)


def test_weights_follow_their_folder_when_it_moves(tmp_path):
    store = cache.Cache(tmp_path / "cache")
    folders = [synthesized(tmp_path / name) for name in ("old", "new")]
    for folder in folders:
        origin = folder_source(folder)
        resolved = stages.resolve(origin, cache=store, stage=quiet())
        published = stages.fetch(origin, weights=resolved.weights, cache=store, stage=quiet())
        assert source.weights_folder(published) == folder


def test_a_folder_that_changes_after_resolving_is_refused(tmp_path):
    model = synthesized(tmp_path / "model")
    store = cache.Cache(tmp_path / "cache")
    origin = folder_source(model)
    resolved = stages.resolve(origin, cache=store, stage=quiet())
    (model / "generation_config.json").write_text('{"changed": true}')

    with pytest.raises(errors.StageError, match="weights key"):
        stages.fetch(origin, weights=resolved.weights, cache=store, stage=quiet())


def break_header(model):
    path = next(model.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    return "not a readable safetensors file", errors.Reason.DIGEST_MISMATCH


def remove_shard(model):
    next(model.glob("*.safetensors")).unlink()
    return "should have shape", errors.Reason.UNSUPPORTED_MODEL


def remove_all_shards(model):
    for path in model.glob("*.safetensors"):
        path.unlink()
    return r"no \*\.safetensors", errors.Reason.MODEL_NOT_FOUND


def break_config(model):
    (model / "config.json").write_text("{")
    return "can not be read as JSON", errors.Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    "damage",
    [break_header, remove_shard, remove_all_shards, break_config],
    ids=lambda f: f.__name__,
)
def test_a_broken_checkpoint_is_refused_with_what_is_wrong(tmp_path, damage):
    model = synthesized(tmp_path / "model")
    words, reason = damage(model)

    with pytest.raises(errors.StageError, match=words) as caught:
        stages.resolve(folder_source(model), cache=cache.Cache(tmp_path / "c"), stage=quiet())

    assert caught.value.reason is reason
    assert caught.value.remedy


def test_progress_lines_say_stage_step_and_amount():
    output = io.StringIO()
    report = progress.Progress("convert", output).step("write", unit="bytes")
    report(1, 10)
    report(2, 10)
    report(10, 10)

    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [line["done"] for line in lines] == [1, 10]
    assert lines[0] == {
        "schema": 1, "stage": "convert", "step": "write", "done": 1, "total": 10, "unit": "bytes",
        "percent": 10.0,
    }  # fmt: skip


def test_published_keys_of_the_weights_are_listed(tmp_path):
    store = cache.Cache(tmp_path / "cache")
    origin = folder_source(synthesized(tmp_path / "model"))
    resolved = stages.resolve(origin, cache=store, stage=quiet())
    stages.fetch(origin, weights=resolved.weights, cache=store, stage=quiet())
    converted = convert.convert(
        weights=resolved.weights,
        dtype="float32",
        tensor_parallel_size=1,
        cache=store,
        stage=quiet(),
    )

    again = stages.resolve(origin, cache=store, stage=quiet())

    assert again.checkpoints == [converted.path.name]
    assert again.engines == []
    assert keys.Kind.CHECKPOINTS.value in str(converted.path)
