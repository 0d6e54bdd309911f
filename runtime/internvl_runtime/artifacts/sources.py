"""A source as JSON, in the words of the resource, to the place that it names."""

import functools
import json
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internvl_runtime import errors, settings
from internvl_runtime.artifacts import download, downloaded, remote, source, synthesize
from internvl_runtime.model import config

_URLS = {"url", "endpoint"}
_EXAMPLES = (
    '{"huggingFace": {"repository": "OpenGVLab/InternVL2_5-1B", "revision": "main"}}',
    '{"modelScope": {"repository": "OpenGVLab/InternVL2_5-1B", "revision": "master"}}',
    '{"s3": {"uri": "s3://bucket/folder"}}',
    '{"http": {"url": "https://host/folder/"}}',
    '{"folder": {"path": "/models/x"}}',
    '{"bundled": {"name": "tiny-shapes"}}',
    '{"synthetic": {"shape": "tiny", "family": "qwen2"}}',
)


def parse_source(text: str, config_: settings.Settings) -> source.Source:
    """Read one of `_EXAMPLES`, without connecting; raises StageError (InvalidSpec)."""
    try:
        raw = json.loads(text)
    except ValueError as e:
        raise _unknown(f"--source is not JSON: {e}") from e
    if not isinstance(raw, dict) or len(raw) != 1:
        raise _unknown(f"the source {text} does not name exactly one kind")
    ((kind, described),) = raw.items()
    if kind not in _KINDS or not isinstance(described, dict):
        raise _unknown(f"the source {text} is not known")
    fields, make = _KINDS[kind]
    required = {name for name, is_required in fields.items() if is_required}
    if not required <= described.keys() <= fields.keys():
        raise _unknown(
            f"the source {kind} takes {', '.join(fields)}, and needs {', '.join(required)}; it has "
            f"{', '.join(described) or 'nothing'}"
        )
    for name in _URLS & described.keys():
        _check_url(name, described[name])
    return make(described, config_)


def _check_url(field: str, url: object) -> None:
    parts = urllib.parse.urlsplit(str(url))
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"the source's {field} is {url!r}",
            remedy="write it as http://host/path or https://host/path",
        )


def _unknown(message: str) -> errors.StageError:
    return errors.StageError(
        errors.Reason.INVALID_SPEC, message, remedy=f"give one of {', '.join(_EXAMPLES)}"
    )


def _bundled(described: Mapping[str, Any], _: settings.Settings) -> source.Source:
    return source.BundledSource(described["name"])


def _folder(described: Mapping[str, Any], _: settings.Settings) -> source.Source:
    return source.FolderSource(Path(described["path"]))


def _synthetic(described: Mapping[str, Any], config_: settings.Settings) -> source.Source:
    family = described.get("family")
    recipe = synthesize.Recipe(
        described["shape"], config.Family(family) if family else None, described.get("seed", 0)
    )
    return source.SyntheticSource(recipe, config_.tokenizer_model)


def _hugging_face(described: Mapping[str, Any], config_: settings.Settings) -> remote.Remote:
    from internvl_runtime.artifacts import huggingface

    return huggingface.HuggingFace(
        described["repository"],
        described.get("revision", "main"),
        endpoint=described.get("endpoint"),
        token=config_.huggingface_token,
        read_seconds=config_.source_seconds,
    )


def _model_scope(described: Mapping[str, Any], config_: settings.Settings) -> remote.Remote:
    from internvl_runtime.artifacts import modelscope

    return modelscope.ModelScope(
        described["repository"],
        described.get("revision", "master"),
        endpoint=described.get("endpoint"),
        token=config_.modelscope_token,
        read_seconds=config_.source_seconds,
    )


def _s3(described: Mapping[str, Any], config_: settings.Settings) -> remote.Remote:
    from internvl_runtime.artifacts import s3

    return s3.S3(
        described["uri"],
        endpoint=described.get("endpoint"),
        region=described.get("region"),
        read_seconds=config_.source_seconds,
    )


def _http(described: Mapping[str, Any], config_: settings.Settings) -> remote.Remote:
    from internvl_runtime.artifacts import http_folder

    folder = config_.source_headers_folder
    files = sorted(folder.iterdir()) if folder else []
    return http_folder.HttpFolder(
        described["url"],
        # A mounted Secret has names that begin with two dots, for itself.
        headers={f.name: f.read_text("utf-8").strip() for f in files if f.name[:2] != ".."},
        read_seconds=config_.source_seconds,
    )


def _downloaded(
    connect: Callable[[Mapping[str, Any], settings.Settings], remote.Remote],
) -> Callable[[Mapping[str, Any], settings.Settings], source.Source]:
    def make(described: Mapping[str, Any], config_: settings.Settings) -> source.Source:
        patience = download.Patience(failures=config_.source_failures)
        return downloaded.DownloadedSource(functools.partial(connect, described, config_), patience)

    return make


_KINDS = {
    "huggingFace": (
        {"repository": True, "revision": False, "endpoint": False},
        _downloaded(_hugging_face),
    ),
    "modelScope": (
        {"repository": True, "revision": False, "endpoint": False},
        _downloaded(_model_scope),
    ),
    "s3": ({"uri": True, "endpoint": False, "region": False}, _downloaded(_s3)),
    "http": ({"url": True}, _downloaded(_http)),
    "folder": ({"path": True}, _folder),
    "bundled": ({"name": True}, _bundled),
    "synthetic": ({"shape": True, "family": False, "seed": False}, _synthetic),
}
"""For each kind its fields, with whether they are needed, and what makes it a source."""
