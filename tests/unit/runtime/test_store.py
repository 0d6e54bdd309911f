import errno
import json
from pathlib import Path

import pytest
from internvl_runtime import errors
from internvl_runtime.store import cache, keys

INPUTS = {"weights": "w", "dtype": "float32"}


def publish(root, inputs=INPUTS):
    store = cache.Cache(root)
    key = keys.key_of(keys.Kind.CHECKPOINTS, inputs)
    with store.workspace(keys.Kind.CHECKPOINTS, key) as workspace:
        (workspace / "model").mkdir(exist_ok=True)
        (workspace / "model" / "config.json").write_text("{}")
        (workspace / "rank0.safetensors").write_bytes(b"data")
        return store.publish(workspace, kind=keys.Kind.CHECKPOINTS, inputs=inputs)


def test_a_published_folder_is_found_by_its_key(tmp_path):
    published = publish(tmp_path)

    found = cache.Cache(tmp_path).get(keys.Kind.CHECKPOINTS, published.path.name)
    assert [file["path"] for file in found.manifest.files] == [
        "model/config.json",
        "rank0.safetensors",
    ]
    assert not list((tmp_path / "tmp").iterdir())


def test_the_name_is_the_digest_of_canonical_json(tmp_path):
    text = '{"inputs":{"dtype":"float32","weights":"w"},"kind":"checkpoints","schema":1}'
    assert keys.canonical_json(json.loads(text)).decode() == text
    assert publish(tmp_path).path.name == keys.key_of(keys.Kind.CHECKPOINTS, INPUTS)


def damage_marker(path: Path):
    (path / cache.MARKER).unlink()


def damage_manifest(path: Path):
    (path / cache.MANIFEST).write_text("{}")


def damage_size(path: Path):
    (path / "rank0.safetensors").write_bytes(b"dat")


def damage_presence(path: Path):
    (path / "model" / "config.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_marker, damage_manifest, damage_size, damage_presence],
    ids=lambda f: f.__name__,
)
def test_a_damaged_folder_is_not_found(tmp_path, damage):
    published = publish(tmp_path)
    damage(published.path)

    store = cache.Cache(tmp_path)
    assert store.find(keys.Kind.CHECKPOINTS, published.path.name) is None
    with pytest.raises(errors.StageError, match="not a complete folder"):
        store.get(keys.Kind.CHECKPOINTS, published.path.name)


def test_a_folder_under_another_name_is_not_trusted(tmp_path):
    published = publish(tmp_path)
    other = published.path.with_name("0" * 64)
    published.path.rename(other)

    assert cache.Cache(tmp_path).find(keys.Kind.CHECKPOINTS, other.name) is None


def test_a_damaged_folder_is_replaced_by_the_next_build(tmp_path):
    damage_size(publish(tmp_path).path)

    repaired = publish(tmp_path)

    assert (repaired.path / "rank0.safetensors").read_bytes() == b"data"
    listed = cache.Cache(tmp_path).list_published(keys.Kind.CHECKPOINTS)
    assert [published.path.name for published in listed] == [repaired.path.name]


def test_a_workspace_survives_a_failure(tmp_path):
    store = cache.Cache(tmp_path)

    with (
        pytest.raises(RuntimeError, match="cut"),
        store.workspace(keys.Kind.WEIGHTS, "k") as workspace,
    ):
        (workspace / "half").write_text("done so far")
        raise RuntimeError("cut")

    with store.workspace(keys.Kind.WEIGHTS, "k") as workspace:
        assert (workspace / "half").read_text() == "done so far"


def test_a_damaged_manifest_of_a_killed_try_does_not_count(tmp_path):
    store = cache.Cache(tmp_path)
    key = keys.key_of(keys.Kind.CHECKPOINTS, INPUTS)
    left_over = tmp_path / "tmp" / f"checkpoints-{key}" / cache.MANIFEST
    left_over.parent.mkdir(parents=True)
    left_over.write_text("from a try that was killed")

    publish(tmp_path)

    assert store.get(keys.Kind.CHECKPOINTS, key)


@pytest.mark.parametrize("killed_in", ["_replace_folder", "_mark"])
def test_what_lacked_only_its_place_or_marker_is_published_as_it_is(
    tmp_path, monkeypatch, killed_in
):
    store = cache.Cache(tmp_path)
    key = keys.key_of(keys.Kind.CHECKPOINTS, INPUTS)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, killed_in, die)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path)
    assert store.find(keys.Kind.CHECKPOINTS, key) is None

    with store.workspace(keys.Kind.CHECKPOINTS, key) as workspace:
        found = store.find(keys.Kind.CHECKPOINTS, key)
        assert not list(workspace.iterdir())

    assert found
    assert (found.path / "rank0.safetensors").read_bytes() == b"data"
    assert not list((tmp_path / "tmp").iterdir())


def test_a_full_disk_gets_its_reason_and_the_numbers(tmp_path):
    with (
        pytest.raises(errors.StageError, match="bytes are free") as caught,
        cache.naming_a_full_disk(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert caught.value.reason is errors.Reason.DISK_FULL
