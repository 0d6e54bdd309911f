"""From a manifest to an answer, and what happens when parts of the way break."""

import json
import os
import signal

import hf_reference
import httpx
import pictures
import pytest
import runtime_process
import shape_questions
from cluster_client import TINY, shapes_spec, tiny_spec
from internvl_operator.resources import naming
from internvl_runtime.artifacts import synthesize
from internvl_runtime.model import config, tokenizer
from internvl_runtime.vision import grid, tiles
from local_cluster import cluster, layout

SIZE = (360, 640)
CONTENT = [
    pictures.image_part(pictures.draw(*SIZE)),
    {"type": "text", "text": "What is in the picture?"},
]


def stream_tokens(client, name, *, max_tokens):
    """Ask for a stream; returns prompt ids and output ids."""
    body = {
        "model": name, "messages": [{"role": "user", "content": CONTENT}], "stream": True,
        "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True,
    }  # fmt: skip
    prompt_ids, output_ids = [], []
    url = f"{client.base_url(name)}/v1/chat/completions"
    with (
        httpx.Client(trust_env=False, timeout=120) as http,
        http.stream("POST", url, json=body) as stream,
    ):
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                prompt_ids += chunk.get("prompt_token_ids", [])
                for choice in chunk["choices"]:
                    output_ids += choice.get("token_ids", [])
    return prompt_ids, output_ids


@pytest.mark.ci
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", list(config.Family))
def test_a_streamed_answer_equals_the_reference_token_by_token(client, family, tmp_path):
    client.apply_model("demo", tiny_spec(family=family.value))
    client.wait_until_ready("demo")

    prompt_ids, ours = stream_tokens(client, "demo", max_tokens=16)

    recipe = synthesize.Recipe(TINY["shape"], family, TINY["seed"])
    synthesize.write_checkpoint(recipe, tmp_path, tokenizer_model=tmp_path, report=lambda *_: None)
    tokens = tokenizer.load_tokenizer(tmp_path, config.read_model_config(tmp_path))
    reference = hf_reference.load_reference(
        tmp_path, image_token_id=tokens.control_ids["<IMG_CONTEXT>"]
    )
    cut = tiles.cut_tiles(pictures.draw(*SIZE), grid.choose_grid(*SIZE, max_tiles=12))
    theirs, _ = hf_reference.generate_greedily(reference, prompt_ids, cut, max_tokens=16)
    assert ours == theirs[: len(ours)]
    assert len(ours) == 16 or ours[-1] in tokens.stop_ids


RANKS_SCRIPT = """
runtime() { /opt/internvl/bin/python -m internvl_runtime "$@" | tail -n 1; }
told() { /opt/internvl/bin/python -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }
source='{"bundled": {"name": "tiny-shapes"}}'
weights=$(runtime resolve --source "$source" | told weights)
runtime fetch --source "$source" --weights "$weights"
checkpoint=$(runtime convert --weights "$weights" --tensor-parallel-size 2 | told checkpoint)
engine=$(runtime build --checkpoint "$checkpoint" --flags "$FLAGS" | told engine)
runtime verify --engine "$INTERNVL_RUNTIME_CACHE_ROOT/engines/$engine"
"""


@pytest.mark.ci
def test_ranks_meet_in_a_restricted_pod(client):
    """No root, no capability, nothing to write to but /tmp and shared memory."""
    environment = {"INTERNVL_RUNTIME_CACHE_ROOT": "/tmp/cache",
                   "FLAGS": json.dumps(runtime_process.FLAGS)}  # fmt: skip
    client.apply({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ranks"},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": naming.pod_security(),
            "containers": [{
                "name": "ranks", "image": client.images["internvl-runtime"],
                "command": ["bash", "-euo", "pipefail", "-c", f"mkdir /tmp/cache\n{RANKS_SCRIPT}"],
                "env": [{"name": name, "value": value} for name, value in environment.items()],
                "securityContext": naming.container_security(),
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            }],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    })  # fmt: skip

    def is_over():
        return client.get("pod", "ranks")["status"]["phase"] in {"Succeeded", "Failed"}

    client.wait_until("the ranks have answered", is_over)
    log = client.kubectl("logs", "ranks")
    assert json.loads(log.splitlines()[-1])["verified"], log


@pytest.mark.ci
def test_the_bundled_model_answers_right_and_refuses_through_its_service(client):
    client.apply_model("demo", shapes_spec())
    client.wait_until_ready("demo")

    asked = list(shape_questions.fresh(60, seed="cluster"))
    answers = [client.ask_messages("demo", shape_questions.messages_of(q)) for q in asked]

    assert sum(a == q.answer for a, q in zip(answers, asked, strict=True)) >= 59
    inside = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/x.png"}}
    refused = client.post("demo", {"messages": [{"role": "user", "content": [inside, inside]}]})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["code"] == "fetch_forbidden"


@pytest.mark.ci
def test_children_heal_and_the_cache_outlives_the_resource(client):
    client.apply_model("demo", shapes_spec())
    client.wait_until_ready("demo")
    before = client.ask("demo", CONTENT)["choices"]

    for kind in ("deployment", "service"):
        uid = client.get(kind, "demo")["metadata"]["uid"]
        client.kubectl("delete", kind, "demo")
        client.wait_until(
            f"{kind} is back", lambda k=kind, u=uid: client.get(k, "demo")["metadata"]["uid"] != u
        )
    client.kubectl("delete", "jobs", "--all")
    client.kubectl("scale", "deployment", "demo", "--replicas=0")
    client.kubectl("scale", "deployment", "demo", "--replicas=1")
    client.wait_until_ready("demo")
    assert client.ask("demo", CONTENT)["choices"] == before
    assert client.list_objects("jobs") == []

    client.kubectl("delete", "ivl", "demo")
    client.wait_until("children go", lambda: not client.list_objects("deployments,services"))
    assert [c["metadata"]["name"] for c in client.list_objects("pvc")] == ["internvl-cache"]

    client.apply_model("again", shapes_spec())
    client.wait_until_ready("again")
    names = [job["metadata"]["name"] for job in client.list_objects("jobs")]
    assert len(names) == 1
    assert names[0].startswith("ivl-resolve-")
    assert client.ask("again", CONTENT)["choices"] == before


@pytest.mark.ci
def test_an_operator_restart_during_a_build_makes_no_second_job(client, operator):
    client.apply_model("demo", tiny_spec(seed=77))
    client.apply_model("twin", tiny_spec(seed=77))
    client.wait_until("a build runs", lambda: len(client.list_objects("jobs")) >= 2)
    operator.run_kubectl(
        "--namespace=internvl-system", "delete", "pod", "--all", "--grace-period=0", "--force"
    )
    client.wait_until_ready("demo")
    client.wait_until_ready("twin")

    before = client.get("ivl", "demo")["status"]["conditions"]
    operator.run_kubectl("--namespace=internvl-system", "delete", "pod", "--all", "--wait")
    operator.run_kubectl(
        "--namespace=internvl-system", "rollout", "status", "deployment/internvl-operator"
    )
    client.wait_until(
        "the operator works again",
        lambda: client.kubectl("annotate", "ivl", "demo", "--overwrite", "touched=1"),
    )
    assert client.get("ivl", "demo")["status"]["conditions"] == before
    told = client.kubectl("get", "events", "-o", "jsonpath={.items[*].reason}").split()
    assert told.count("Serving") == 2

    jobs = client.list_objects("jobs")
    stages = sorted(job["metadata"]["name"].split("-")[1] for job in jobs)
    assert stages == ["checkpoint", "engine", "resolve"]
    assert all(job["status"].get("succeeded") == 1 for job in jobs)
    assert all("failed" not in job["status"] for job in jobs)
    keys = [client.get("ivl", name)["status"]["keys"]["engine"] for name in ("demo", "twin")]
    assert keys[0] == keys[1]


@pytest.mark.ci
@pytest.mark.skipif(os.environ.get("CLUSTER") == "current", reason="not the local cluster")
def test_killing_the_nodes_processes_and_the_operator_delays_but_does_not_stop(client, operator):
    client.apply_model("demo", tiny_spec(seed=78))
    where = layout.default_layout()
    for name in ("kubelet", "containerd", "kube-apiserver"):
        program = str(where.tool(name))
        commands = cluster._running_commands()
        (pid,) = [p for command, p in commands.items() if command[0] == program]
        os.kill(pid, signal.SIGKILL)
        client.wait_until("the API answers", lambda: client.get("ivl", "demo"))
    operator.run_kubectl(
        "--namespace=internvl-system", "delete", "pod", "--all", "--grace-period=0", "--force"
    )

    client.wait_until_ready("demo")

    assert client.ask("demo", CONTENT)["usage"]["completion_tokens"] > 0


@pytest.mark.ci
def test_a_change_is_rolled_out_and_a_bad_one_touches_nothing(client):
    client.apply_model("demo", shapes_spec())
    client.wait_until_ready("demo")
    first = client.get("ivl", "demo")["status"]["serving"]["engineKey"]

    client.apply_model("demo", {**shapes_spec(), "engine": {"backend": "TensorRT"}})
    message = client.wait_for_condition("demo", "Validated", "False", "InvalidSpec")
    assert "spec.engine.backend" in message
    assert client.ask("demo", "still there?")["usage"]["completion_tokens"] > 0

    client.apply_model("demo", {**shapes_spec(), "engine": {"dtype": "float32"}})
    client.wait_until_ready("demo")
    assert client.get("ivl", "demo")["status"]["serving"]["engineKey"] != first


def write_model(client, script):
    client.apply_claim("models")
    command = (
        "/opt/internvl/bin/python -m internvl_runtime synthesize --shape tiny --family qwen2"
        f" --output /data/good > /dev/null && {script}"
    )
    phase, log = client.run_pod("write-model", ["sh", "-c", command], claim="models")
    assert phase == "Succeeded", log


def claim_spec(path):
    source = {"persistentVolumeClaim": {"claimName": "models", "path": path}}
    return {**tiny_spec(), "model": {"source": source}}


@pytest.mark.ci
def test_faults_end_in_conditions_that_say_what_to_do(client):
    write_model(
        client,
        "cp -r /data/good /data/broken"
        " && truncate -s 1000 /data/broken/model-00001-of-00002.safetensors"
        " && cp -r /data/good /data/foreign"
        " && sed -i s/internvl_chat/llava/ /data/foreign/config.json",
    )
    named = {"model": {**tiny_spec()["model"], "name": "InternVL9-8B"}}
    cases = {
        "unknown": ({**tiny_spec(), **named}, "ModelNotFound", "InternVL2_5-8B"),
        "absent": (claim_spec("nothing"), "ModelNotFound", "no config.json"),
        "broken": (claim_spec("broken"), "DigestMismatch", "copy the file again"),
        "foreign": (claim_spec("foreign"), "UnsupportedModel", "model_type is 'llava'"),
    }
    for name, (spec, _, _) in cases.items():
        client.apply_model(name, spec)

    for name, (_, reason, words) in cases.items():
        message = client.wait_for_condition(name, "Ready", "False", reason)
        assert words in message, name

    events = client.kubectl("get", "events", "--field-selector=type=Warning")
    assert "DigestMismatch" in events


@pytest.mark.ci
def test_a_mounted_folder_is_served_and_kubectl_tells_the_story(client):
    write_model(client, "true")
    client.apply_model("demo", claim_spec("good"))
    client.wait_until_ready("demo")

    assert client.ask("demo", CONTENT)["usage"]["prompt_tokens"] > 3 * 256
    table = client.kubectl("get", "ivl").splitlines()
    headings = ["NAME", "PHASE", "PROGRESS", "MODEL", "ENGINE", "GPUS", "READY", "URL", "AGE"]
    assert table[0].split() == headings
    assert "Ready" in table[1]
    assert f"http://demo.{client.namespace}.svc:8000/v1" in table[1]
    story = client.kubectl("describe", "ivl", "demo")
    for reason in ("Valid", "Resolving", "Converting", "Building", "Starting", "Serving", "Ready"):
        assert reason in story
    assert client.kubectl("get", "all").count("internvldeployment.serving.internvl.dev/demo") == 1
