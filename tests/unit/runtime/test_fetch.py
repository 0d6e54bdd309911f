import asyncio
import contextlib
import ipaddress
import socket

import pytest
from internvl_runtime import errors
from internvl_runtime.vision import fetch

BODY = b"picture"
LOCAL = ("localhost", "127.0.0.1")


@contextlib.asynccontextmanager
async def web(respond):
    """A server on loopback; `respond` maps a path to raw bytes, or to a coroutine on the writer."""
    asked, handling = [], set()

    async def handle(reader, writer):
        handling.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            asked.append(head)
            answer = respond(head.split()[1])
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked
    await asyncio.gather(*handling, return_exceptions=True)


def ok(body=BODY, headers=""):
    return (
        f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    ).encode() + body


def to(location):
    return (
        f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n"
        "Connection: close\r\n\r\n"
    ).encode()


async def get(url, *, max_bytes=1000, budget=10_000, **policy):
    fetcher = fetch.Fetcher(fetch.FetchPolicy(**{"private_hosts": LOCAL, "seconds": 2.0, **policy}))
    try:
        return await fetcher.fetch(url, max_bytes=max_bytes, budget=fetch.Budget(budget))
    finally:
        await fetcher.close()


async def test_a_public_answer_is_returned():
    async with web(lambda path: ok(path.encode())) as (port, asked):
        body = await get(f"http://localhost:{port}/a%20b/ü?q=1&r=ä")
    assert body == b"/a%20b/%C3%BC?q=1&r=%C3%A4"
    assert f"Host: localhost:{port}" in asked[0]


async def test_redirects_are_followed_and_checked_again():
    async with web(lambda path: to("/b") if path == "/a" else ok()) as (port, _):
        assert await get(f"http://localhost:{port}/a") == BODY
    async with web(lambda _: to("http://169.254.169.254/latest/meta-data")) as (port, _):
        with pytest.raises(errors.RequestError, match="metadata"):
            await get(f"http://localhost:{port}/a")
    async with web(lambda _: to("file:///etc/passwd")) as (port, _):
        with pytest.raises(errors.RequestError, match="no http or https"):
            await get(f"http://localhost:{port}/a")


async def test_endless_redirects_end():
    async with web(lambda _: to("/again")) as (port, asked):
        with pytest.raises(errors.RequestError, match="more than 3 redirects"):
            await get(f"http://localhost:{port}/a")
    assert len(asked) == 4


@pytest.mark.parametrize(
    "answer",
    [ok(b"x" * 1001), b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 2000],
    ids=["announced", "streamed"],
)
async def test_too_many_bytes_are_refused(answer):
    async with web(lambda _: answer) as (port, _):
        with pytest.raises(errors.RequestError, match="more than 1000 bytes"):
            await get(f"http://localhost:{port}/")


async def test_the_files_of_a_request_share_a_budget():
    async with web(lambda _: ok(b"x" * 600)) as (port, _):
        fetcher = fetch.Fetcher(fetch.FetchPolicy(private_hosts=LOCAL))
        budget = fetch.Budget(1000)
        await fetcher.fetch(f"http://localhost:{port}/a", max_bytes=1000, budget=budget)
        with pytest.raises(errors.RequestError, match="1000 bytes together"):
            await fetcher.fetch(f"http://localhost:{port}/b", max_bytes=1000, budget=budget)
        await fetcher.close()


async def drip(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(50):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def test_a_slow_server_is_given_up():
    async with web(lambda _: drip) as (port, _):
        with pytest.raises(errors.RequestError, match=r"within 0\.3 s"):
            await get(f"http://localhost:{port}/", seconds=0.3)


BROKEN = [
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
    (b"nonsense\r\n\r\n", "connection failed"),
    (b"", "connection failed"),
    (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "leads nowhere"),
    (to("http://[bad"), "what is no URL"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nshort", "connection failed"),
]


@pytest.mark.parametrize(("answer", "words"), BROKEN, ids=[words for _, words in BROKEN])
async def test_what_is_no_answer_is_told(answer, words):
    async with web(lambda _: answer) as (port, _):
        with pytest.raises(errors.RequestError, match=words):
            await get(f"http://localhost:{port}/")


FORBIDDEN = [
    "http://127.0.0.1/", "http://localhost/", "http://10.0.0.1/", "http://192.168.1.1/",
    "http://172.16.0.1/", "http://100.64.0.1/", "http://0.0.0.0/", "http://[::1]/",
    "http://[fe80::1]/", "http://[fd00::1]/", "http://[::ffff:10.0.0.1]/",
    "http://[64:ff9b::a00:1]/", "http://[2002:a00:1::]/", "http://224.0.0.1/",
    "http://255.255.255.255/", "http://[64:ff9b:1::a9fe:a9fe]/", "http://[fec0::1]/",
    "http://[::7f00:1]/",
]  # fmt: skip


@pytest.mark.parametrize("url", FORBIDDEN)
async def test_addresses_that_are_not_public_are_refused(url):
    with pytest.raises(errors.RequestError, match="not public"):
        await get(url, private_hosts=())


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "[::ffff:169.254.169.254]", "100.100.100.200", "[fd00:ec2::254]",
     "192.0.0.192", "metadata.google.internal"],
)  # fmt: skip
async def test_metadata_addresses_are_refused_even_when_allowed(host):
    with pytest.raises(errors.RequestError, match="metadata"):
        await get(f"http://{host}/", private_hosts=(host.strip("[]"), host))


@pytest.mark.parametrize("url", ["http://2130706433/", "http://0x7f.1/", "http://017700000001/"])
async def test_other_ways_to_write_an_address_are_resolved_and_refused(url):
    with pytest.raises(errors.RequestError):
        await get(url, private_hosts=())


@pytest.mark.parametrize(
    "url", ["ftp://host/", "http://", "http:///a", "http://a:b:c/", "http://[::1/", "https://\x00/"]
)
async def test_what_is_no_url_is_refused(url):
    with pytest.raises(errors.RequestError):
        await get(url)


async def test_only_allowed_hosts_are_asked():
    allowed = {"allowed_hosts": (".example.com", "localhost")}
    async with web(lambda _: ok()) as (port, _):
        assert await get(f"http://localhost:{port}/", **allowed) == BODY
    for host in ("example.org", "badexample.com", "localhost.example.org"):
        with pytest.raises(errors.RequestError, match="not one of the allowed"):
            await get(f"http://{host}/", **allowed)


async def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    answers = iter(["127.0.0.1", "169.254.169.254"])

    async def rebinding(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    async with web(lambda _: ok()) as (port, _):
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", rebinding)
        body = await get(f"http://rebind.test:{port}/", private_hosts=("rebind.test",))
        monkeypatch.undo()
    assert body == BODY
    assert next(answers) == "169.254.169.254"


async def test_a_proxy_gets_the_request_but_not_for_forbidden_names():
    async with web(lambda _: ok()) as (port, asked):
        proxy = f"http://127.0.0.1:{port}"
        assert await get("http://example.com/a.png", proxy=proxy) == BODY
        with pytest.raises(errors.RequestError, match="not public"):
            await get("http://10.0.0.1/", proxy=proxy)
    assert asked[0].startswith("GET http://example.com:80/a.png ")


async def test_a_proxy_that_refuses_is_told():
    async with web(lambda _: b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as (port, _):
        with pytest.raises(errors.RequestError, match="connection failed"):
            await get("https://example.com/a.png", proxy=f"http://127.0.0.1:{port}")


def test_an_address_inside_an_address_is_seen():
    policy = fetch.FetchPolicy()
    with pytest.raises(errors.RequestError):
        fetch.check_address(ipaddress.ip_address("::ffff:127.0.0.1"), host="x", policy=policy)
    fetch.check_address(ipaddress.ip_address("1.1.1.1"), host="x", policy=policy)
