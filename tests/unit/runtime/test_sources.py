import pytest
from internvl_runtime import errors
from internvl_runtime.vision import sources

REFUSED = [
    ("http://example.com/a.png", "scheme 'http'"),
    ("file:///etc/passwd", "scheme 'file'"),
    ("data:image/png,abc", "a data URL looks like"),
    ("data:image/png;base64,%%%", "not valid base64"),
    ("data:image/png;base64,é", "not valid base64"),
    ("data:image/png;base64," + "A" * 200, "larger than 100 bytes"),
]


def test_a_data_url_gives_its_bytes():
    url = "data:image/png;base64,aGVsbG8="
    assert sources.read_url(url, max_bytes=100) == b"hello"


@pytest.mark.parametrize(("url", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_other_urls_are_refused_with_the_reason(url, words):
    with pytest.raises(errors.RequestError, match=words):
        sources.read_url(url, max_bytes=100)
