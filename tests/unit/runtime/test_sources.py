import os

import pytest
from internvl_runtime import errors
from internvl_runtime.vision import sources

REFUSED = [
    ("ftp://example.com/a.png", "scheme 'ftp'"),
    ("file:///etc/passwd", "files are not read"),
    ("data:image/png,abc", "a data URL looks like"),
    ("data:image/png;base64,%%%", "not valid base64"),
    ("data:image/png;base64,é", "not valid base64"),
    ("data:image/png;base64," + "A" * 200, "more than 100 bytes"),
]


def test_a_data_url_gives_its_bytes():
    url = "data:image/png;base64,aGVsbG8="
    assert sources.read_url(url, max_bytes=100, folder=None) == b"hello"


@pytest.mark.parametrize(("url", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_other_urls_are_refused_with_the_reason(url, words):
    with pytest.raises(errors.RequestError, match=words):
        sources.read_url(url, max_bytes=100, folder=None)


@pytest.fixture
def folder(tmp_path):
    allowed = tmp_path / "media"
    allowed.mkdir()
    (allowed / "a b.png").write_bytes(b"hello")
    (tmp_path / "secret").write_bytes(b"secret")
    (allowed / "link").symlink_to(tmp_path / "secret")
    (allowed / "large").write_bytes(b"x" * 101)
    (allowed / "inner").mkdir()
    os.mkfifo(allowed / "pipe")
    return allowed


def test_a_file_below_the_folder_is_read(folder):
    for url in (f"file://{folder}/a%20b.png", f"file://localhost{folder}/inner/../a%20b.png"):
        assert sources.read_url(url, max_bytes=100, folder=folder) == b"hello"


@pytest.mark.parametrize(
    "path", ["../secret", "link", "nothing", "inner", "pipe", "large", "%2e%2e/secret", "a%00b"]
)
def test_everything_else_is_refused_without_waiting(folder, path):
    with pytest.raises(errors.RequestError):
        sources.read_url(f"file://{folder}/{path}", max_bytes=100, folder=folder)


def test_a_file_of_another_host_is_refused(folder):
    with pytest.raises(errors.RequestError):
        sources.read_url(f"file://server{folder}/a%20b.png", max_bytes=100, folder=folder)
