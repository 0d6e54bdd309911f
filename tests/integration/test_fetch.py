"""Weights come whole from every kind of source, through every kind of trouble."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import httpx
import model_hub
import pytest
import runtime_process
import s3_server
from internvl_runtime import errors, settings
from internvl_runtime.artifacts import download, progress, shapes, sources, stages, synthesize
from internvl_runtime.model import config
from internvl_runtime.store import cache as caches
from model_hub import COMMIT, Fault
from obstore.store import S3Store

TOKEN = "hf_secret"  # noqa: S105 - of the loopback hub
FAST = download.Patience(failures=4, first_delay=0.01)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    recipe = synthesize.Recipe(shapes.TINY, config.Family.QWEN2, 3)
    synthesize.write_checkpoint(recipe, folder, tokenizer_model=folder, report=lambda *_: None)
    return folder


@pytest.fixture
def hub(published):
    with model_hub.serve(published) as running:
        running.extra = {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "README.md": b"r"}
        yield running


@pytest.fixture
def cache(tmp_path):
    return caches.Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(download, "Patience", lambda **_: FAST)


def hugging_face(hub, **more):
    return {"huggingFace": {"repository": "org/model", "endpoint": hub.url, **more}}


def model_scope(hub):
    return {"modelScope": {"repository": "org/model", "endpoint": hub.url}}


def folder(hub):
    return {"http": {"url": f"{hub.url}/folder"}}


def fetch(described, cache, **more):
    cache.root.mkdir(exist_ok=True)
    source = sources.parse_source(json.dumps(described), settings.Settings(**more))
    stage = progress.Progress("fetch")
    resolved = stages.resolve(source, cache=cache, stage=stage)
    return resolved, stages.fetch(source, weights=resolved.weights, cache=cache, stage=stage)


def assert_whole(weights, published):
    ours = {p.name: p.read_bytes() for p in weights.path.iterdir()}
    del ours[caches.MANIFEST], ours[caches.MARKER]
    assert ours == {p.name: p.read_bytes() for p in published.iterdir()}
    told = {f["path"]: f["sha256"] for f in weights.manifest.files}
    assert told == {name: hashlib.sha256(data).hexdigest() for name, data in ours.items()}


@pytest.mark.parametrize("described", [hugging_face, model_scope, folder])
def test_only_the_needed_files_are_fetched_and_all_of_them(hub, cache, published, described):
    _, weights = fetch(described(hub), cache)

    assert_whole(weights, published)
    asked = {name for name, _ in hub.requests}
    assert not asked & hub.extra.keys()


def test_a_branch_is_resolved_to_its_commit_and_that_is_fetched_from(hub, cache, published):
    resolved, weights = fetch(hugging_face(hub, revision="main"), cache)

    assert resolved.revision == COMMIT
    assert resolved.source == hugging_face(hub, revision=COMMIT)
    assert weights.manifest.provenance["revision"] == COMMIT
    again, _ = fetch(resolved.source, cache)
    assert again.weights == resolved.weights


def test_files_are_known_by_the_hubs_own_digests(hub, cache, published):
    _, weights = fetch(hugging_face(hub), cache)

    told = {f["path"]: f["identifier"] for f in weights.manifest.inputs["files"]}
    config_json = (published / "config.json").read_bytes()
    assert told["config.json"] == f"git:{model_hub.git_id(config_json)}"
    shard = published / "model-00001-of-00003.safetensors"
    assert told[shard.name] == f"sha256:{hashlib.sha256(shard.read_bytes()).hexdigest()}"


def test_a_token_goes_to_the_hub_and_to_no_other_host(hub, cache):
    hub.token = TOKEN
    fetch(hugging_face(hub), cache, HF_TOKEN=TOKEN)

    # The files came from another host, to which the hub had sent us.
    assert hub.headers
    assert all("Authorization" not in headers for headers in hub.headers)


def test_a_folder_without_sums_is_known_by_its_etags(hub, cache, published):
    resolved, _ = fetch(folder(hub), cache)
    hub.sums = True
    by_sums, weights = fetch(folder(hub), cache)

    assert by_sums.weights != resolved.weights
    identifiers = {f["identifier"].partition(":")[0] for f in weights.manifest.inputs["files"]}
    assert identifiers == {"sha256"}


def test_a_folder_whose_files_nothing_tells_apart_is_refused(hub, cache):
    hub.etags = False
    with pytest.raises(errors.StageError, match="neither an ETag") as caught:
        fetch(folder(hub), cache)
    assert "sha256sum" in caught.value.remedy


def test_headers_of_a_web_server_come_from_files(hub, cache, tmp_path):
    hub.token = TOKEN
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "Authorization").write_text(f"Bearer {TOKEN}\n")

    fetch(folder(hub), cache, source_headers_folder=secret)


TROUBLE = {
    "cut": [Fault(cut_after=300_000), Fault(cut_after=100_000)],
    "truncated body": [Fault(short_by=200_000)],
    "wrong byte once": [Fault(flip_byte=400_000)],
    "server errors": [Fault(status=500), Fault(status=502), Fault(status=503)],
    "too many requests": [Fault(status=429, headers=(("Retry-After", "0"),))],
    "a range that is ignored": [Fault(cut_after=300_000), Fault(ignore_range=True)],
    "a dead connection": [Fault(pause=3)],
    "silence within": [Fault(chunk_pause=0.01), Fault(cut_after=0)],
}


@pytest.mark.parametrize("described", [hugging_face, model_scope, folder])
@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_on_the_way_changes_no_byte(hub, cache, published, trouble, described):
    hub.sums = True
    source = sources.parse_source(json.dumps(described(hub)), settings.Settings(source_seconds=1))
    cache.root.mkdir()
    stage = progress.Progress("fetch")
    weights = stages.resolve(source, cache=cache, stage=stage).weights
    hub.faults.extend(TROUBLE[trouble])

    assert_whole(stages.fetch(source, weights=weights, cache=cache, stage=stage), published)
    assert not hub.faults


def test_a_file_that_stays_another_one_is_named(hub, cache):
    source = sources.parse_source(json.dumps(hugging_face(hub)), settings.Settings())
    cache.root.mkdir()
    stage = progress.Progress("fetch")
    weights = stages.resolve(source, cache=cache, stage=stage).weights
    hub.faults.extend([Fault(flip_byte=9)] * 99)

    with pytest.raises(errors.StageError, match="twice fetched") as caught:
        stages.fetch(source, weights=weights, cache=cache, stage=stage)
    assert caught.value.reason is errors.Reason.DIGEST_MISMATCH


REFUSALS = {
    "no such repository": (
        {"huggingFace": {"repository": "org/none"}}, {}, "ModelNotFound", "no repository org/none"),
    "no such revision": (
        {"huggingFace": {"repository": "org/model", "revision": "v9"}}, {}, "RevisionNotFound",
        "no revision 'v9'"),
    "gated": ({"huggingFace": {"repository": "org/model"}}, {"gated": True}, "ModelGated", "gated"),
    "wrong token": (
        {"huggingFace": {"repository": "org/model"}}, {"token": "other"}, "AuthenticationFailed",
        "401"),
    "ModelScope: no such repository": (
        {"modelScope": {"repository": "org/none"}}, {}, "ModelNotFound", "org/none"),
    "ModelScope: no such revision": (
        {"modelScope": {"repository": "org/model", "revision": "v9"}}, {}, "ModelNotFound", "v9"),
    "ModelScope: wrong token": (
        {"modelScope": {"repository": "org/model"}}, {"token": "other"}, "AuthenticationFailed",
        "401"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_have_a_reason_of_their_own(hub, cache, case):
    described, state, reason, words = REFUSALS[case]
    for name, value in state.items():
        setattr(hub, name, value)
    ((kind, fields),) = described.items()

    with pytest.raises(errors.StageError, match=words) as caught:
        fetch({kind: fields | {"endpoint": hub.url}}, cache, HF_TOKEN=TOKEN)
    assert caught.value.reason.value == reason
    assert caught.value.remedy


def test_a_source_that_is_not_there_is_unreachable(cache):
    with pytest.raises(errors.StageError, match="4 times in a row") as caught:
        fetch({"http": {"url": "http://127.0.0.1:9"}}, cache)
    assert caught.value.reason is errors.Reason.SOURCE_UNREACHABLE


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"ftp": {}}, "not known"),
        ({"http": {"url": "u"}, "folder": {"path": "p"}}, "exactly one"),
        ({"huggingFace": {"repo": "x"}}, "needs repository; it has repo"),
        ({"s3": {"uri": "bucket/x"}}, "'bucket/x'"),
        ({"http": {"url": "host/x"}}, "'host/x'"),
        ({"huggingFace": {"repository": "org/model", "endpoint": "host"}}, "'host'"),
    ],
)
def test_a_source_that_can_not_be_is_an_invalid_spec(cache, described, words):
    with pytest.raises(errors.StageError, match=words) as caught:
        fetch(described, cache)
    assert caught.value.reason is errors.Reason.INVALID_SPEC


def test_room_is_looked_for_before_the_first_byte(hub, cache, monkeypatch):
    source = sources.parse_source(json.dumps(hugging_face(hub)), settings.Settings())
    cache.root.mkdir()
    stage = progress.Progress("fetch")
    weights = stages.resolve(source, cache=cache, stage=stage).weights
    before = hub.sent
    usage = type("Usage", (), {"free": 1000, "total": 2000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)

    with pytest.raises(errors.StageError, match=r"1,000 are free.*are missing") as caught:
        stages.fetch(source, weights=weights, cache=cache, stage=stage)
    assert caught.value.reason is errors.Reason.DISK_FULL
    assert hub.sent == before


@pytest.fixture
def s3(published, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with s3_server.serve() as url:
        httpx.put(f"{url}/models").raise_for_status()
        for path in published.iterdir():
            put(url, path.name, path.read_bytes())
        put(url, "evil.bin", b"pickle")
        yield url


def put(url, name, content):
    store = S3Store(
        "models", prefix="internvl", endpoint=url, region="eu-west-1",
        client_options={"allow_http": True},
    )  # fmt: skip
    store.put(name, content)


def bucket(url):
    return {"s3": {"uri": "s3://models/internvl", "endpoint": url, "region": "eu-west-1"}}


def test_a_bucket_is_fetched_and_its_objects_are_checked(s3, cache, published):
    resolved, weights = fetch(bucket(s3), cache)

    assert_whole(weights, published)
    assert resolved.source == bucket(s3)
    content = (published / "config.json").read_bytes()
    (told,) = (f for f in weights.manifest.inputs["files"] if f["path"] == "config.json")
    assert told["identifier"] == f"etag:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


def test_an_object_that_changes_while_it_is_fetched_is_noticed(s3, cache, monkeypatch):
    source = sources.parse_source(json.dumps(bucket(s3)), settings.Settings())
    cache.root.mkdir()
    stage = progress.Progress("fetch")
    weights = stages.resolve(source, cache=cache, stage=stage).weights
    real = download.download

    def change_first(*arguments, **named):
        if "config.json" not in [file.path for file in arguments[1]] or len(arguments[1]) > 1:
            put(s3, "vocab.json", b"{}")
        return real(*arguments, **named)

    monkeypatch.setattr(download, "download", change_first)
    with pytest.raises(errors.StageError, match="has changed since it was listed") as caught:
        stages.fetch(source, weights=weights, cache=cache, stage=stage)
    assert caught.value.reason is errors.Reason.DIGEST_MISMATCH
    assert "Signature" not in caught.value.message


def test_a_bucket_that_is_not_there_is_named(s3, cache):
    with pytest.raises(errors.StageError, match="s3://none/x") as caught:
        fetch({"s3": bucket(s3)["s3"] | {"uri": "s3://none/x"}}, cache)
    assert caught.value.reason is errors.Reason.MODEL_NOT_FOUND


def test_a_stage_that_takes_too_long_ends_and_keeps_what_it_has(hub, cache, tmp_path):
    cache.root.mkdir()
    described = json.dumps(hugging_face(hub))
    weights = runtime_process.result_of("resolve", "--source", described, cache=cache.root)[
        "weights"
    ]
    hub.faults.extend([Fault(chunk_pause=1)] * 20)
    told = tmp_path / "termination"
    told.touch()

    done = runtime_process.run(
        "fetch", "--weights", weights, "--source", described, "--timeout", 3,
        cache=cache.root, termination_log=told,
    )  # fmt: skip

    assert done.returncode == 80
    assert json.loads(told.read_text())["reason"] == "BuildTimeout"
    assert "Traceback" not in done.stderr
    workspace = cache.root / "tmp" / f"weights-{weights}"
    assert sum(path.stat().st_size for path in workspace.glob("*.partial"))


def start_fetching(hub, weights, cache):
    return subprocess.Popen(
        [sys.executable, "-m", "internvl_runtime", "fetch", "--weights", weights,
         "--source", json.dumps(hugging_face(hub))],
        env={**os.environ, "INTERNVL_RUNTIME_CACHE_ROOT": str(cache.root),
             "INTERNVL_RUNTIME_TERMINATION_LOG": "/nonexistent"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_killed_fetch_goes_on_where_it_was(hub, cache, published):
    cache.root.mkdir()
    rng = random.Random(8)
    described = json.dumps(hugging_face(hub))
    weights = runtime_process.result_of("resolve", "--source", described, cache=cache.root)[
        "weights"
    ]
    hub.sent = 0
    for _ in range(3):
        hub.faults.extend([Fault(chunk_pause=0.05)] * 20)
        before = hub.sent
        process = start_fetching(hub, weights, cache)
        # On a busy machine the tries before may have fetched everything.
        while hub.sent == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.1, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
    hub.faults.clear()
    runtime_process.result_of(
        "fetch", "--weights", weights, "--source", described, cache=cache.root
    )

    assert_whole(cache.get(caches.keys.Kind.WEIGHTS, weights), published)
    ranges = [asked for name, asked in hub.requests if name.endswith(".safetensors") and asked]
    assert ranges
    assert hub.sent < 2 * sum(p.stat().st_size for p in published.iterdir())
