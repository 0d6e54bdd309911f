"""Every setting of the operator, read from the environment in this place alone.

The chart's `defaults` values become these variables.
"""

from typing import Any

import pydantic_settings


class Settings(pydantic_settings.BaseSettings):
    """Settings with the prefix `INTERNVL_OPERATOR_`."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix="INTERNVL_OPERATOR_", extra="forbid", frozen=True
    )

    namespaces: tuple[str, ...] = ()
    """Namespaces to watch; empty means all, which needs cluster-wide RBAC."""

    tools_image: str
    """Image of resolve and checkpoint Jobs: the slim PyTorch variant of the runtime."""

    builder_image: str
    """Image of engine Jobs: the serving image with the toolchain."""

    runtime_image: str
    """Image that serves."""

    image_pull_policy: str = "IfNotPresent"
    """Pull policy of every pod; `IfNotPresent` is right for digests."""

    backend: str = "TensorRT"
    """Engine of resources that name none: `TensorRT` or `PyTorch`."""

    device: str = "CUDA"
    """Device of resources that name none: `CUDA` or `CPU`."""

    cpu_architecture: str = "x86_64"
    """Machine of CPU engines: `x86_64` or `arm64`."""

    cache_claim_name: str = "internvl-cache"
    """Claim that holds weights and engines, one a namespace, made if absent."""

    cache_size: str = "20Gi"
    """Size of that claim for resources that name none."""

    cache_storage_class: str = ""
    """Storage class of that claim; empty leaves the choice to the cluster."""

    job_resources: dict[str, Any] = {"requests": {"cpu": "250m", "memory": "512Mi"}}
    """Resources of build Jobs' containers."""

    runtime_resources: dict[str, Any] = {"requests": {"cpu": "250m", "memory": "512Mi"}}
    """Resources of serving containers of resources that name none."""

    workers: int = 4
    """Reconciliations that run at the same time; more help only with many resources."""

    metrics_port: int = 9401
    """Port of `/metrics`; 0 turns it off."""

    liveness_port: int = 8080
    """Port of `/healthz`."""
