"""Builds and serves InternVL2.5 engines over the OpenAI API."""

__version__ = "0.1.0"
