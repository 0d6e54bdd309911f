"""`InternVLDeployment`, version v1alpha1, as the operator reads it.

The schema in crds/ validates; these models only give names and types to what
it has let through, and a contract test holds the two equal.
"""

from typing import Annotated, Any

import pydantic
from pydantic.alias_generators import to_camel

GROUP = "serving.internvl.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InternVLDeployment"
PLURAL = "internvldeployments"
UPGRADE_ANNOTATION = f"{GROUP}/upgrade"
"""A new value takes over the operator's current default images."""


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        alias_generator=to_camel, extra="ignore", frozen=True, populate_by_name=True
    )


class BundledSource(_Model):
    """A model that ships in the runtime image."""

    name: str


class SyntheticSource(_Model):
    """Seeded random weights."""

    shape: str
    family: str | None = None
    seed: int = 0


class ClaimSource(_Model):
    """A folder of a claim that holds a published-style checkpoint."""

    claim_name: str
    path: str = ""


class Source(_Model):
    """Where weights come from; the schema lets exactly one through."""

    bundled: BundledSource | None = None
    synthetic: SyntheticSource | None = None
    persistent_volume_claim: ClaimSource | None = None


class ModelSpec(_Model):
    """What is served."""

    name: str | None = None
    source: Source = Source()


class EngineSpec(_Model):
    """How it is run."""

    backend: str | None = None
    device: str | None = None
    dtype: str = "bfloat16"
    max_batch_size: int | None = None
    max_sequence_tokens: int = 32768
    max_input_tokens: int | None = None
    max_batched_tokens: int = 8192


class MultimodalSpec(_Model):
    """Limits of pictures."""

    max_tiles_per_image: int = 12
    max_tiles_per_request: int = 52


class CacheSpec(_Model):
    """Where weights and engines are kept."""

    claim_name: str | None = None
    size: str | None = None
    storage_class_name: str | None = None
    access_mode: str = "ReadWriteOnce"


class ServingSpec(_Model):
    """How it is served."""

    replicas: int | None = None
    served_model_names: tuple[str, ...] = ()
    resources: dict[str, Any] | None = None


class Spec(_Model):
    """The spec."""

    model: ModelSpec
    engine: EngineSpec = EngineSpec()
    multimodal: MultimodalSpec = MultimodalSpec()
    cache: CacheSpec = CacheSpec()
    serving: ServingSpec = ServingSpec()


class Metadata(_Model):
    """The metadata that the operator reads."""

    name: str
    namespace: str
    uid: str
    generation: int = 0
    annotations: dict[str, str] = {}
    deletion_timestamp: str | None = None


class Resource(_Model):
    """One InternVLDeployment; its status stays a plain object."""

    metadata: Metadata
    spec: Spec
    status: Annotated[dict[str, Any], pydantic.Field(default_factory=dict)]
