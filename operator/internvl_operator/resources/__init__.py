"""Pure builders: a plan to the manifests of its children."""

from typing import Any

Manifest = dict[str, Any]
