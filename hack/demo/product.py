"""The product's images, built and pushed, and its chart, installed."""

import dataclasses
import json

from local_cluster import images, layout, steps

from demo import target as targets

RELEASE = "internvl-operator"
NAMESPACE = "internvl-system"


@dataclasses.dataclass(frozen=True)
class _Build:
    """One image."""

    name: str
    dockerfile: str
    stage: str
    arguments: tuple[str, ...] = ()


_BUILDS = (
    _Build("internvl-operator", "Dockerfile.operator", "operator"),
    _Build("internvl-runtime", "Dockerfile.runtime", "runtime", ("VARIANT=pytorch",)),
    _Build("internvl-runtime-builder", "Dockerfile.runtime", "builder", ("VARIANT=pytorch",)),
)


def build_images(target: targets.Target) -> dict[str, str]:
    """Build and push what has changed; returns references with digests, by image name."""
    where = layout.default_layout()
    where.store.mkdir(parents=True, exist_ok=True)
    if target.is_local:
        images.ensure_base(where)
    references = {build.name: _build(target, where, build) for build in _BUILDS}
    if target.is_local:
        images.prune_node(where, references.values())
    return references


def install(target: targets.Target, references: dict[str, str]) -> None:
    """Install or upgrade the chart with these images."""
    with steps.step("install the operator with Helm"):
        repository, _, digest = references["internvl-operator"].partition("@")
        runtime = references["internvl-runtime"]
        values = {
            "image": {"repository": repository, "digest": digest},
            "defaults": {
                "backend": "PyTorch",
                "device": "CPU",
                "images": {
                    "runtime": runtime,
                    "tools": runtime,
                    "builder": references["internvl-runtime-builder"],
                },
            },
        }
        chart = targets.ROOT / "charts" / "internvl-operator"
        ensure_namespace(target, NAMESPACE)
        steps.run(
            [*target.helm, "upgrade", "--install", RELEASE, chart, f"--namespace={NAMESPACE}",
             "--values=-", "--wait", "--timeout=5m"],
            input_text=json.dumps(values),
        )  # fmt: skip


def ensure_namespace(target: targets.Target, name: str) -> None:
    """Make a namespace that enforces the restricted Pod Security profile."""
    manifest = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": name,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        },
    }
    target.run_kubectl("apply", "--server-side", "-f", "-", input_text=json.dumps(manifest))


def _build(target: targets.Target, where: layout.Layout, build: _Build) -> str:
    tag = f"localhost/{build.name}:latest"
    with steps.step(f"build image {build.name}"):
        image = images.build(
            where,
            dockerfile=targets.ROOT / build.dockerfile,
            context=targets.ROOT,
            target=build.stage,
            tag=tag,
            arguments=[f"BASE_IMAGE={target.base_image}", *build.arguments],
        )
    repository = f"{target.registry}/{build.name}"
    pushed = where.store / "pushed.json"
    known: dict[str, str] = json.loads(pushed.read_text()) if pushed.exists() else {}
    entry = f"{repository} {image}"
    digest = known.get(entry, "")
    if not digest or (target.is_local and not images.is_in_registry(build.name, digest)):
        with steps.step(f"push image {build.name}"):
            digest = images.push(where, tag=tag, reference=f"{repository}:latest")
        pushed.write_text(json.dumps({**known, entry: digest}, indent=2))
    return f"{repository}@{digest}"
