import pytest
from internvl_operator.resources.differ import differs

EQUAL = [
    ({"a": 1}, {"a": 1, "added": 2}),
    ({"cpu": "1000m"}, {"cpu": "1"}),
    ({"memory": "1Gi"}, {"memory": "1073741824"}),
    ([{"name": "x"}], [{"name": "x", "protocol": "TCP"}]),
    ({"emptyDir": {}}, {"emptyDir": None}),
    ("0:1", "0:1"),
    ("1e3", "1k"),
    ("2E", "2000P"),
    ("5u", "5000n"),
]
OTHER = [
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {}),
    ({"a": {"b": 1}}, {"a": None}),
    ([1], [1, 2]),
    ([1], "1"),
    ("1Gi", "1Mi"),
    ("1.2.3", "1.2.4"),
]


@pytest.mark.parametrize(("desired", "live"), EQUAL, ids=str)
def test_what_the_server_added_is_no_difference(desired, live):
    assert not differs(desired, live)


@pytest.mark.parametrize(("desired", "live"), OTHER, ids=str)
def test_what_is_missing_or_other_is_a_difference(desired, live):
    assert differs(desired, live)
