"""Settings, and the words for one that nobody reads."""

import json

import pytest
from internvl_runtime import __main__, settings


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("INTERNVL_RUNTIME_KV_CACHE_BYTE", "INTERNVL_RUNTIME_KV_CACHE_BYTES"),
        ("INTERNVL_RUNTIME_MAX_QUEUE_REQUESTS", "INTERNVL_RUNTIME_MAX_QUEUED_REQUESTS"),
    ],
)
def test_a_misspelt_variable_is_told_with_the_one_that_is_meant(name, meant):
    assert settings.misspelt([name, meant]) == {name: meant}


@pytest.mark.parametrize(
    "name",
    [
        "INTERNVL_RUNTIME_SERVICE_HOST",
        "INTERNVL_RUNTIME_SERVICE_PORT",
        "INTERNVL_RUNTIME_SERVICE_PORT_HTTP",
        "INTERNVL_RUNTIME_PORT_8000_TCP_ADDR",
        "HF_TOKEN",
        "INTERNVL_TEST_DATA",
    ],
)
def test_other_variables_are_left_alone(name):
    assert settings.misspelt([name]) == {}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "http", "INTERNVL_RUNTIME_PORT='http': Input should be a valid integer"),
        ("PORT", "99999", "less than or equal to 65535"),
        ("DRAIN_SECONDS", "-5", "INTERNVL_RUNTIME_DRAIN_SECONDS='-5'"),
        ("SERVED_MODEL_NAMES", "shapes", 'field "served_model_names"'),
    ],
)
def test_a_setting_that_can_not_be_is_told_where_a_pod_ends(
    monkeypatch, tmp_path, capsys, name, value, words
):
    told = tmp_path / "told"
    told.touch()
    monkeypatch.setenv("INTERNVL_RUNTIME_TERMINATION_LOG", str(told))
    monkeypatch.setenv(f"INTERNVL_RUNTIME_{name}", value)
    assert __main__.main(["cache", "list"]) == __main__.EXIT_FAILED
    said = json.loads(told.read_text())
    assert (said["stage"], said["reason"]) == ("cache", "InvalidSpec")
    assert words in said["message"]
    assert said["message"] in capsys.readouterr().err
