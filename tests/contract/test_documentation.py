"""What the documents tell people to run exists."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from internvl_operator.api import v1alpha1

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCUMENTS}


def commands(text):
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for command in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            first, *_ = command.splitlines()
            text = command if "'{" in first else first
            yield shlex.split(text, comments=True)


@pytest.mark.parametrize("name", TEXTS)
def test_every_make_target_in_a_document_exists(name):
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command[1] for command in commands(TEXTS[name]) if command[0] == "make"}
    named |= set(re.findall(r"`make ([a-z0-9.-]+)", TEXTS[name]))
    assert named <= targets


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_to_a_file_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXTS[name]):
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_in_a_command_exists(name):
    for command in commands(TEXTS[name]):
        for word in command:
            if word.startswith(("examples/", "charts/", "crds/")):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_resources(path):
    manifest = yaml.safe_load(path.read_text())
    metadata = {**manifest["metadata"], "namespace": "ns", "uid": "u"}
    v1alpha1.Resource.model_validate({**manifest, "metadata": metadata})


def settings_table():
    """The rows of docs/settings.md, as the code has them."""
    from internvl_runtime import settings

    for variable, field in settings.variables().items():
        value = json.dumps(field.default, default=str).strip('"')
        default = "" if field.default is None else f"`{value}`"
        meaning = " ".join(field.description.split()).replace("|", r"\|")
        yield f"| `{variable}` | {default} | {meaning} |"


def test_every_setting_is_documented():
    rows = [row for row in TEXTS["docs/settings.md"].splitlines() if row.startswith("| `")]
    assert rows == list(settings_table())


def test_every_reason_is_documented():
    from internvl_operator import errors

    reference = TEXTS["docs/reference.md"]
    missing = [reason.value for reason in errors.Reason if f"`{reason.value}`" not in reference]
    assert missing == []
