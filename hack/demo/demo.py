"""From a manifest to an answer: what `make demo` shows."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import rich.panel
import rich.table
import yaml
from local_cluster import cluster, layout, steps

from demo import pods, product
from demo import target as targets

NAMESPACE = "internvl-demo"
EXAMPLE = targets.ROOT / "examples" / "tiny-shapes.yaml"
PICTURE = targets.ROOT / "examples" / "shapes.png"
QUESTION = "What is in the picture?"
ANSWER = "a blue square at the top right"
UPGRADE_ANNOTATION = "serving.internvl.dev/upgrade"
_READY_SECONDS = 900.0
_MODEL_CLAIM = "demo-model"
_SLACK_BYTES = 10**9


def run_demo() -> None:
    """Bring everything up, ask, and say how to go on."""
    started = time.monotonic()
    target = targets.choose_target()
    if target.is_local:
        steps.console.rule("1. a Kubernetes cluster")
        cluster.up(layout.default_layout(), cluster.Gpus())
        target = targets.choose_target()
    steps.console.rule("2. the images")
    references = product.build_images(target)
    steps.console.rule("3. the operator")
    product.install(target, references)
    steps.console.rule("4. the model")
    manifest = _apply_model(target, references)
    wait_until_ready(target, manifest["metadata"]["name"])
    steps.console.rule("5. the question")
    _show_answer(ask(target, manifest["metadata"]["name"], references))
    steps.console.print(f"\nfrom the first step to the answer: {time.monotonic() - started:.0f} s")
    _show_next_commands(target, manifest["metadata"]["name"])


def reload() -> None:
    """Build, push and roll out the code as it is now, and wait until it runs in the pods."""
    started = time.monotonic()
    target = targets.choose_target()
    references = product.build_images(target)
    product.install(target, references)
    names = target.run_kubectl(
        "get", "ivl", f"--namespace={NAMESPACE}", "-o", "jsonpath={.items[*].metadata.name}"
    ).split()
    annotation = f"{UPGRADE_ANNOTATION}={time.time_ns()}"
    with steps.step(f"roll out the new runtime of {', '.join(names)}"):
        target.run_kubectl(
            "annotate", "ivl", *names, "--overwrite", annotation, f"--namespace={NAMESPACE}"
        )
        list_images = [
            *target.kubectl, "get", "pods", f"--namespace={NAMESPACE}",
            "--selector=app.kubernetes.io/component=runtime",
            "-o", "jsonpath={.items[*].spec.containers[0].image}",
        ]  # fmt: skip

        def only_new_pods() -> bool:
            return set(steps.run(list_images).split()) == {references["internvl-runtime"]}

        steps.wait_for(
            "rollout", only_new_pods, seconds=_READY_SECONDS, hint="kubectl describe ivl"
        )
    for name in names:
        wait_until_ready(target, name)
    steps.console.print(f"the new code runs after {time.monotonic() - started:.0f} s")


def remove_demo() -> None:
    """Remove what the demo has made; the local cluster goes as a whole."""
    target = targets.choose_target()
    if target.is_local:
        cluster.down(layout.default_layout(), purge=False)
        return
    with steps.step("remove the demo"):
        target.run_kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
        steps.run([*target.helm, "uninstall", product.RELEASE, f"--namespace={product.NAMESPACE}"])
        target.run_kubectl("delete", "namespace", product.NAMESPACE, "--ignore-not-found")


def wait_until_ready(target: targets.Target, name: str) -> None:
    """Follow a resource until it is Ready, showing each phase once with its time."""
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        status = _read_status(target, name)
        phase = status.get("phase", "Pending")
        if phase == "Ready":
            return
        if phase in {"Failed", "Invalid"} or time.monotonic() > deadline:
            story = target.run_kubectl("describe", "ivl", name, f"--namespace={NAMESPACE}")
            raise steps.ClusterError(f"{name} is {phase}:\n{story}")
        with steps.step(f"{name}: {phase}"):
            while _read_status(target, name).get("phase") == phase and time.monotonic() < deadline:
                time.sleep(0.5)


def ask(target: targets.Target, name: str, references: dict[str, str]) -> dict[str, Any]:
    """Ask from a pod inside the cluster; returns the OpenAI response."""
    with steps.step("ask from a pod inside the cluster"):
        script = targets.ROOT / "examples" / "ask.py"
        files = target.run_kubectl(
            "create", "configmap", "demo-question", f"--namespace={NAMESPACE}", "--dry-run=client",
            "-o", "json", f"--from-file={script}", f"--from-file={PICTURE}",
        )  # fmt: skip
        target.run_kubectl(
            "apply", "--server-side", "--force-conflicts", "-f", "-", input_text=files
        )
        pod = ["pod/demo-question", f"--namespace={NAMESPACE}"]
        target.run_kubectl("delete", *pod, "--ignore-not-found", "--wait")
        manifest = _asking_pod(name, image=references["internvl-runtime"])
        target.run_kubectl("apply", "--server-side", "-f", "-", input_text=json.dumps(manifest))
        phase = "--for=jsonpath={.status.phase}=Succeeded"
        target.run_kubectl("wait", *pod, phase, "--timeout=300s")
        answer: dict[str, Any] = json.loads(target.run_kubectl("logs", *pod))
    return answer


def _apply_model(target: targets.Target, references: dict[str, str]) -> dict[str, Any]:
    product.ensure_namespace(target, NAMESPACE)
    manifest: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    folder = os.environ.get("MODEL")
    if folder:
        _copy_model(target, Path(folder), image=references["internvl-runtime"])
        source = {"persistentVolumeClaim": {"claimName": _MODEL_CLAIM, "path": "model"}}
        manifest["metadata"]["name"] = "demo-model"
        manifest["spec"]["model"] = {"source": source}
        manifest["spec"]["engine"]["dtype"] = "bfloat16"
    with steps.step(f"apply {EXAMPLE.name}"):
        target.run_kubectl(
            "apply", "--server-side", f"--namespace={NAMESPACE}", "-f", "-",
            input_text=json.dumps(manifest),
        )  # fmt: skip
    return manifest


def _copy_model(target: targets.Target, folder: Path, *, image: str) -> None:
    """Copy a checkpoint's folder into a claim, through a pod that mounts it."""
    if not (folder / "config.json").is_file():
        raise steps.ClusterError(f"MODEL={folder} has no config.json: name a checkpoint's folder")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": _MODEL_CLAIM, "namespace": NAMESPACE},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": str(size + _SLACK_BYTES)}},
        },
    }
    pod = pods.restricted_pod(
        "demo-copy",
        namespace=NAMESPACE,
        image=image,
        command=["sleep", "infinity"],
        path="/model",
        volume={"persistentVolumeClaim": {"claimName": _MODEL_CLAIM}},
    )
    with steps.step(f"copy {folder} ({size / 1e9:.1f} GB) into claim {_MODEL_CLAIM}"):
        content = json.dumps({"apiVersion": "v1", "kind": "List", "items": [claim, pod]})
        target.run_kubectl("apply", "--server-side", "-f", "-", input_text=content)
        name = ["pod/demo-copy", f"--namespace={NAMESPACE}"]
        target.run_kubectl("wait", *name, "--for=condition=Ready", "--timeout=600s")
        inside = [*target.kubectl, "exec", "--stdin", *name, "--"]
        steps.run([*inside, "sh", "-c", "rm -rf /model/model && mkdir /model/model"])
        _pipe(
            ["tar", "--dereference", "--create", f"--directory={folder}", "."],
            [*inside, "tar", "--extract", "--no-same-owner", "--directory=/model/model"],
        )
        target.run_kubectl("delete", *name, "--grace-period=1")


def _pipe(source: list[str], sink: list[str]) -> None:
    """Run two commands with a pipe between them; raises ClusterError when one fails."""
    with subprocess.Popen(source, stdout=subprocess.PIPE) as reading:
        writing = subprocess.run(sink, stdin=reading.stdout, check=False)
    if reading.returncode or writing.returncode:
        raise steps.ClusterError(f"copying failed: {' '.join(source)} | {' '.join(sink)}")


def _asking_pod(name: str, *, image: str) -> dict[str, Any]:
    base_url = f"http://{name}.{NAMESPACE}.svc:8000/v1"
    command = ["/opt/internvl/bin/python", "/demo/ask.py"]
    picture = f"/demo/{PICTURE.name}"
    return pods.restricted_pod(
        "demo-question",
        namespace=NAMESPACE,
        image=image,
        command=[*command, base_url, name, picture, QUESTION],
        path="/demo",
        volume={"configMap": {"name": "demo-question"}},
    )


def _read_status(target: targets.Target, name: str) -> dict[str, Any]:
    command = ["get", "ivl", name, f"--namespace={NAMESPACE}", "-o", "json"]
    status: dict[str, Any] = json.loads(target.run_kubectl(*command)).get("status", {})
    return status


def _show_answer(answer: dict[str, Any]) -> None:
    """Show an answer; raises ClusterError when the model that knows shapes is wrong."""
    usage = answer["usage"]
    words = answer["choices"][0]["message"]["content"]
    table = rich.table.Table.grid(padding=(0, 2))
    table.add_row("picture", str(PICTURE.relative_to(targets.ROOT)))
    table.add_row("question", QUESTION)
    table.add_row("answer", words)
    table.add_row(
        "usage",
        f"{usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} completion tokens",
    )
    steps.console.print(rich.panel.Panel(table, title=f"model {answer['model']}", expand=False))
    if os.environ.get("MODEL"):
        return
    if words != ANSWER:
        raise steps.ClusterError(f"the answer is wrong: the picture shows {ANSWER}")
    steps.console.print("✓ the answer is right", style="green")


def _show_next_commands(target: targets.Target, name: str) -> None:
    where = layout.default_layout()
    tools = f"export PATH={where.binaries}:$PATH KUBECONFIG={where.kubeconfig}\n"
    steps.console.print("Try next:", style="bold")
    print(
        (tools if target.is_local else "")
        + f"kubectl -n {NAMESPACE} get ivl\n"
        + f"kubectl -n {NAMESPACE} describe ivl {name}\n"
        + f"kubectl -n {NAMESPACE} get events --sort-by=.metadata.creationTimestamp\n"
        + "make reload      # after a change of the code\n"
        + "make demo-down"
    )
