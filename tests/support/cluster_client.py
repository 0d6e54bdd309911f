"""What cluster tests ask of the cluster, in one namespace."""

import json
import time
from typing import Any

import httpx
from demo import pods
from local_cluster import steps

READY_SECONDS = 240
TINY = {"shape": "tiny", "family": "qwen2", "seed": 5}


def shapes_spec() -> dict[str, Any]:
    """Return the spec of the trained model on a CPU, in bfloat16."""
    return {
        "model": {"source": {"bundled": {"name": "tiny-shapes"}}},
        "engine": {"dtype": "bfloat16"},
        "cache": {"size": "1Gi"},
    }


def tiny_spec(**source) -> dict[str, Any]:
    """Return the spec of a tiny model with random weights on a CPU, in float32."""
    return {
        "model": {"source": {"synthetic": {**TINY, **source}}},
        "engine": {"dtype": "float32"},
        "cache": {"size": "1Gi"},
    }


class Client:
    """kubectl in one namespace."""

    def __init__(self, target, namespace: str, images: dict[str, str]) -> None:
        self.namespace = namespace
        self.images = images
        self._target = target

    def kubectl(self, *arguments: str, input_text: str | None = None) -> str:
        """Run kubectl in the namespace."""
        return self._target.run_kubectl(
            f"--namespace={self.namespace}", *arguments, input_text=input_text
        )

    def apply(self, manifest: dict[str, Any]) -> None:
        """Apply a manifest."""
        self.kubectl("apply", "--server-side", "-f", "-", input_text=json.dumps(manifest))

    def apply_model(self, name: str, spec: dict[str, Any]) -> None:
        """Apply an InternVLDeployment."""
        self.apply(
            {
                "apiVersion": "serving.internvl.dev/v1alpha1",
                "kind": "InternVLDeployment",
                "metadata": {"name": name},
                "spec": spec,
            }
        )

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """Return an object."""
        return json.loads(self.kubectl("get", kind, name, "-o", "json"))

    def list_objects(self, kind: str, *options: str) -> list[dict[str, Any]]:
        """Return the objects of a kind."""
        return json.loads(self.kubectl("get", kind, "-o", "json", *options))["items"]

    def conditions(self, name: str) -> dict[str, dict[str, Any]]:
        """Return a resource's conditions by type."""
        status = self.get("ivl", name).get("status", {})
        return {condition["type"]: condition for condition in status.get("conditions", [])}

    def wait_until(self, words: str, check, *, seconds: float = READY_SECONDS) -> None:
        """Wait until a check returns true; an error of kubectl counts as not yet."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if check():
                    return
            except steps.ClusterError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"not within {seconds} s: {words}")

    def wait_for_condition(self, name: str, kind: str, status: str, reason: str = "") -> str:
        """Wait for a condition; returns its message."""

        def holds():
            found = self.conditions(name).get(kind, {})
            return found.get("status") == status and found.get("reason", "").startswith(reason)

        self.wait_until(f"{name}: {kind}={status} {reason}", holds)
        return self.conditions(name)[kind]["message"]

    def wait_until_ready(self, name: str) -> None:
        """Wait until a resource is Ready for its current generation."""

        def is_ready():
            resource = self.get("ivl", name)
            status = resource.get("status", {})
            is_current = status.get("observedGeneration") == resource["metadata"]["generation"]
            return is_current and status.get("phase") == "Ready"

        self.wait_until(f"{name} is Ready", is_ready)

    def base_url(self, name: str) -> str:
        """Return the URL of a resource's Service, by its cluster address."""
        return f"http://{self.get('service', name)['spec']['clusterIP']}:8000"

    def ask(self, name: str, content: Any, **more: Any) -> dict[str, Any]:
        """Send one chat request; returns the response."""
        messages = [{"role": "user", "content": content}]
        return self._post(name, {"messages": messages, "max_tokens": 8, **more})

    def ask_messages(self, name: str, messages: list[dict[str, Any]]) -> str:
        """Send a conversation; returns the text of the answer."""
        answer = self._post(name, {"messages": messages, "max_tokens": 16})
        return answer["choices"][0]["message"]["content"]

    def post(self, name: str, body: dict[str, Any]) -> httpx.Response:
        """Send one chat request as it is."""
        url = f"{self.base_url(name)}/v1/chat/completions"
        with httpx.Client(trust_env=False, timeout=120) as http:
            return http.post(url, json={"model": name, "temperature": 0, **body})

    def _post(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.post(name, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def run_pod(
        self, name: str, command: list[str], *, claim: str, path: str = "/data"
    ) -> tuple[str, str]:
        """Run a restricted pod with a claim to its end; returns phase and log."""
        self.apply(
            pods.restricted_pod(
                name,
                namespace=self.namespace,
                image=self.images["internvl-runtime"],
                command=command,
                path=path,
                volume={"persistentVolumeClaim": {"claimName": claim}},
            )
        )
        phases = {"Succeeded", "Failed"}
        self.wait_until(f"{name} ends", lambda: self.get("pod", name)["status"]["phase"] in phases)
        phase = self.get("pod", name)["status"]["phase"]
        return phase, self.kubectl("logs", name)

    def apply_claim(
        self, name: str, *, size: str = "1Gi", storage_class: str | None = None
    ) -> None:
        """Apply a claim."""
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": size}},
                    **({"storageClassName": storage_class} if storage_class else {}),
                },
            }
        )

    def tell_story(self) -> str:
        """Return resources, events and logs, for a test that has failed."""
        views = (
            ["get", "all,pvc", "-o", "wide"],
            ["describe", "ivl"],
            ["get", "events", "--sort-by=.metadata.creationTimestamp"],
        )
        parts = [self._try(*arguments) for arguments in views]
        names = self._try("get", "pods", "-o", "name").split()
        parts += [
            f"--- log of {pod}\n" + self._try("logs", pod, "--all-containers") for pod in names
        ]
        operator = ["--namespace=internvl-system", "logs", "deploy/internvl-operator", "--tail=40"]
        parts.append("--- log of the operator\n" + self._try(*operator))
        return "\n".join(parts)

    def _try(self, *arguments: str) -> str:
        try:
            return self.kubectl(*arguments)
        except steps.ClusterError as e:
            return str(e)
