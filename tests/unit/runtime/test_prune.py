import pytest
from internvl_runtime import __main__
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys, prune

Kind = keys.Kind


def entry(kind, key, parent=None, *, at=0, size=10):
    return prune.Entry(kind, key, parent, f"2026-01-01T00:00:{at:02}", size)


def chain(*names, at):
    """An engine on a checkpoint on weights."""
    weights, checkpoint, engine = names
    return [
        entry(Kind.WEIGHTS, weights, at=at),
        entry(Kind.CHECKPOINTS, checkpoint, weights, at=at),
        entry(Kind.ENGINES, engine, checkpoint, at=at),
    ]


def names(gone):
    return [each.key for each in gone]


def test_the_newest_engines_of_each_model_stay_with_what_they_stand_on():
    entries = [
        *chain("w1", "c1", "e1", at=1),
        *chain("w1", "c2", "e2", at=2)[1:],
        *chain("w1", "c3", "e3", at=3)[1:],
        *chain("w2", "c4", "e4", at=0),
    ]
    gone = prune.plan(entries, keep_engines=2, in_use=[])
    assert names(gone) == ["e1", "c1"]


def test_what_is_in_use_stays_whatever_its_age():
    entries = [*chain("w1", "c1", "e1", at=1), *chain("w1", "c2", "e2", at=2)[1:]]
    assert names(prune.plan(entries, keep_engines=1, in_use=["e1"])) == []
    assert names(prune.plan(entries, keep_engines=0, in_use=["c1"])) == ["e1", "e2", "c2"]


def test_weights_go_only_for_want_of_room_and_the_oldest_first():
    entries = [
        *chain("w1", "c1", "e1", at=1),
        entry(Kind.WEIGHTS, "w0", at=0, size=100),
        entry(Kind.WEIGHTS, "w2", at=2, size=100),
    ]
    assert names(prune.plan(entries, keep_engines=1, in_use=[])) == []
    assert names(prune.plan(entries, keep_engines=1, in_use=[], free_bytes=50)) == ["w0"]
    assert names(prune.plan(entries, keep_engines=1, in_use=["w0"], free_bytes=105)) == ["w1", "w2"]


def test_what_lacks_its_parent_is_no_error():
    assert names(prune.plan([entry(Kind.ENGINES, "e", "gone")], keep_engines=0, in_use=[])) == ["e"]


@pytest.fixture
def published(tmp_path):
    cache = caches.Cache(tmp_path)
    inputs = keys.weights_inputs([{"path": "x", "size": 1, "identifier": "i"}])
    key = keys.key_of(Kind.WEIGHTS, inputs)
    with cache.workspace(Kind.WEIGHTS, key) as workspace:
        (workspace / "x").write_text("x")
        cache.publish(workspace, kind=Kind.WEIGHTS, inputs=inputs)
    return cache, prune.list_entries(cache)


def test_a_removed_folder_is_gone(published):
    cache, (found,) = published
    assert prune.remove(cache, found)
    assert prune.list_entries(cache) == []
    assert not cache.path_of(found.kind, found.key).exists()


def test_a_key_that_a_builder_holds_is_left_alone(published):
    cache, (found,) = published
    with cache.workspace(found.kind, found.key):
        assert not prune.remove(cache, found)
    assert prune.list_entries(cache) == [found]


def told(cache, *arguments, capsys):
    """Exit code and words of `internvl-runtime cache`."""
    code = __main__.main(["cache", *arguments, "--cache", str(cache.root)])
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).split())


def shorten(folder):
    (folder / "x").write_text("")
    return "x has 0 bytes, its manifest says 1"


def remove(folder):
    (folder / "x").unlink()
    return "x is missing"


def exchange(folder):
    (folder / "x").write_text("y")
    return "differs from its manifest"


@pytest.mark.parametrize("damage", [shorten, remove, exchange])
def test_verify_tells_of_every_damage(published, capsys, damage):
    cache, (found,) = published
    code, said = told(cache, "verify", capsys=capsys)
    assert (code, said.endswith("1 folders are whole")) == (0, True)
    words = damage(cache.path_of(found.kind, found.key))
    code, said = told(cache, "verify", capsys=capsys)
    assert code == __main__.EXIT_FAILED
    assert words in said


@pytest.mark.parametrize("damage", [shorten, remove])
def test_what_lacks_something_is_listed_and_goes(published, capsys, damage):
    cache, (found,) = published
    path = cache.path_of(found.kind, found.key)
    damage(path)
    assert "damaged:" in told(cache, "list", capsys=capsys)[1]
    assert "removed 1 of 1 folders" in told(cache, "prune", capsys=capsys)[1]
    assert not path.exists()


def test_a_publishing_that_was_cut_off_stays_for_the_next_builder(published, capsys):
    cache, (found,) = published
    path = cache.path_of(found.kind, found.key)
    (path / caches.MARKER).unlink()
    assert told(cache, "prune", capsys=capsys) == (0, "0 of 0 folders, 0 B")
    assert path.exists()
