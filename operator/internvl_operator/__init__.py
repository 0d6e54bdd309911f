"""Kubernetes operator that builds and serves InternVL2.5 models."""

__version__ = "0.1.0"
