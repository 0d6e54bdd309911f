"""From a spec to what will be built: pure, and the same for the same spec."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from internvl_operator import catalog, errors, keys, settings
from internvl_operator.api import v1alpha1

SOURCES_FOLDER = "/sources"
_TENSOR_PARALLEL_SIZE = 1
_QUANTIZATION = "None"
_DEFAULT_BATCH_SIZE = 16
"""The engine of this version answers one request at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """The images of one resource's pods."""

    tools: str
    builder: str
    runtime: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is decided before the weights are known."""

    backend: str
    device: str
    architecture: str
    dtype: str
    release: catalog.Release
    build_flags: Mapping[str, int]
    claim_name: str
    source: Mapping[str, Any]
    """The source as the runtime's commands take it."""
    source_claim: str | None
    """Claim that the source lies in."""
    request: str
    """Hash of all that a resolve Job depends on."""
    served_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineKeys:
    """The content addresses of one resource's builds."""

    weights: str
    checkpoint: str
    engine: str


def make_plan(resource: v1alpha1.Resource, *, defaults: settings.Settings) -> Plan:
    """Plan a resource; raises SpecError naming the field, the value and what to change."""
    spec = resource.spec
    backend = spec.engine.backend or defaults.backend
    device = spec.engine.device or defaults.device
    _check_model_name(spec.model.name)
    _check_engine(backend, device)
    source, source_claim = _plan_source(spec.model.source)
    flags = _plan_flags(spec)
    claim_name = spec.cache.claim_name or defaults.cache_claim_name
    return Plan(
        backend=backend,
        device=device,
        architecture=f"cpu-{defaults.cpu_architecture}",
        dtype=spec.engine.dtype,
        release=_choose_release(resource, backend),
        build_flags=flags,
        claim_name=claim_name,
        source=source,
        source_claim=source_claim,
        request=keys.short_hash(
            {"source": source, "engine": [backend, device, spec.engine.dtype], "flags": flags}
        ),
        served_names=_served_names(resource),
    )


def plan_keys(plan: Plan, *, weights: str) -> EngineKeys:
    """Return the keys of a plan on known weights."""
    checkpoint = keys.checkpoint_key(
        weights=weights,
        dtype=plan.dtype,
        quantization=_QUANTIZATION,
        tensor_parallel_size=_TENSOR_PARALLEL_SIZE,
        converter_format=plan.release.converter_format,
    )
    engine = keys.engine_key(
        checkpoint=checkpoint,
        backend=plan.backend,
        architecture=plan.architecture,
        versions=plan.release.versions,
        engine_format=plan.release.engine_format,
        build=plan.build_flags,
    )
    return EngineKeys(weights=weights, checkpoint=checkpoint, engine=engine)


def check_dimensions(name: str | None, dimensions: Mapping[str, Any]) -> None:
    """Check that weights are of the named model; raises SpecError when they are not."""
    if name is None:
        return
    for field, expected in dataclasses.asdict(catalog.MODELS[name]).items():
        if dimensions.get(field) != expected:
            raise errors.SpecError(
                f"spec.model.name is {name}, whose {field} is {expected}, but the source has "
                f"{dimensions.get(field)}: correct the name, or leave it out",
                reason=errors.Reason.UNSUPPORTED_MODEL,
            )


def choose_images(resource: v1alpha1.Resource, *, defaults: settings.Settings) -> Images:
    """Return the images of a resource: those recorded, until its spec or annotation changes.

    So that an upgrade of the operator rolls no model by itself.
    """
    recorded = _recorded_choice(resource)
    if recorded.get("images"):
        return Images(**recorded["images"])
    return Images(
        tools=defaults.tools_image,
        builder=defaults.builder_image,
        runtime=defaults.runtime_image,
    )


def image_revision(resource: v1alpha1.Resource) -> str:
    """Return what the choice of images was made for."""
    upgrade = resource.metadata.annotations.get(v1alpha1.UPGRADE_ANNOTATION, "")
    return f"{resource.metadata.generation}/{upgrade}"


def _choose_release(resource: v1alpha1.Resource, backend: str) -> catalog.Release:
    """Return the release of the images that `choose_images` returns."""
    recorded = _recorded_choice(resource)
    if recorded.get("release") and recorded.get("backend") == backend:
        return catalog.Release.from_status(recorded["release"])
    return catalog.RELEASES[backend]


def _recorded_choice(resource: v1alpha1.Resource) -> Mapping[str, Any]:
    """Return what status has recorded for the spec and annotation as they are now."""
    recorded: Mapping[str, Any] = resource.status.get("resolved", {})
    return recorded if recorded.get("imageRevision") == image_revision(resource) else {}


def _check_model_name(name: str | None) -> None:
    if name is not None and name not in catalog.MODELS:
        raise errors.SpecError(
            f"spec.model.name is {name!r}, which is no published model: use one of "
            f"{', '.join(catalog.MODELS)}, or leave it out for weights of your own",
            reason=errors.Reason.MODEL_NOT_FOUND,
        )


def _check_engine(backend: str, device: str) -> None:
    if backend not in catalog.RELEASES or device != "CPU":
        raise errors.SpecError(
            f"engine {backend} on {device} is not offered by this version: set "
            "spec.engine.backend to PyTorch and spec.engine.device to CPU"
        )


def _plan_source(source: v1alpha1.Source) -> tuple[dict[str, Any], str | None]:
    if source.bundled is not None:
        _check_bundled(source.bundled)
        return {"bundled": {"name": source.bundled.name}}, None
    if source.synthetic is not None:
        return {"synthetic": _plan_synthetic(source.synthetic)}, None
    if source.persistent_volume_claim is not None:
        claim = source.persistent_volume_claim
        path = "/".join([SOURCES_FOLDER, claim.claim_name, claim.path.strip("/")])
        return {"folder": {"path": path.rstrip("/")}}, claim.claim_name
    raise errors.SpecError(
        "spec.model.source is empty: set bundled, synthetic or persistentVolumeClaim; downloads by "
        "name are not offered by this version"
    )


def _check_bundled(source: v1alpha1.BundledSource) -> None:
    if source.name not in catalog.BUNDLED_MODELS:
        raise errors.SpecError(
            f"spec.model.source.bundled.name is {source.name!r}: use one of "
            f"{', '.join(catalog.BUNDLED_MODELS)}",
            reason=errors.Reason.MODEL_NOT_FOUND,
        )


def _plan_synthetic(source: v1alpha1.SyntheticSource) -> dict[str, Any]:
    if source.shape not in catalog.SYNTHETIC_SHAPES:
        raise errors.SpecError(
            f"spec.model.source.synthetic.shape is {source.shape!r}: use one of "
            f"{', '.join(catalog.SYNTHETIC_SHAPES)}",
            reason=errors.Reason.MODEL_NOT_FOUND,
        )
    if source.family is None:
        raise errors.SpecError(
            f"spec.model.source.synthetic.family is needed for {source.shape}: qwen2 or internlm2"
        )
    planned = {"shape": source.shape, "family": source.family, "seed": source.seed}
    return {name: value for name, value in planned.items() if value is not None}


def _plan_flags(spec: v1alpha1.Spec) -> dict[str, int]:
    engine, multimodal = spec.engine, spec.multimodal
    longest_input = engine.max_sequence_tokens - 1
    max_input_tokens = engine.max_input_tokens or longest_input
    if max_input_tokens > longest_input:
        raise errors.SpecError(
            f"spec.engine.maxInputTokens is {max_input_tokens}, but maxSequenceTokens "
            f"{engine.max_sequence_tokens} leaves {longest_input}: lower it, or raise the other"
        )
    if multimodal.max_tiles_per_request <= multimodal.max_tiles_per_image:
        raise errors.SpecError(
            f"spec.multimodal.maxTilesPerRequest is {multimodal.max_tiles_per_request}: it must "
            f"hold one picture of {multimodal.max_tiles_per_image} tiles and its thumbnail"
        )
    return {
        "maxBatchSize": engine.max_batch_size or _DEFAULT_BATCH_SIZE,
        "maxSequenceTokens": engine.max_sequence_tokens,
        "maxInputTokens": max_input_tokens,
        "maxBatchedTokens": engine.max_batched_tokens,
        "maxTilesPerImage": multimodal.max_tiles_per_image,
        "maxTilesPerRequest": multimodal.max_tiles_per_request,
    }


def _served_names(resource: v1alpha1.Resource) -> tuple[str, ...]:
    names = [*resource.spec.serving.served_model_names, resource.metadata.name]
    if resource.spec.model.name:
        names.append(resource.spec.model.name)
    return tuple(dict.fromkeys(names))
