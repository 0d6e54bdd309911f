"""Settings, and the words for one that nobody reads."""

import pytest
from internvl_runtime import settings


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
