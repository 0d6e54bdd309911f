"""Fetches pictures from the web without becoming a way into the cluster.

A host is resolved here, its addresses are checked, and the connection is made
to the very address that was checked: a name that answers differently the
second time (DNS rebinding) gains nothing. Redirects pass the same checks.
"""

import asyncio
import dataclasses
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

import httpcore

import internvl_runtime
from internvl_runtime import errors
from internvl_runtime.vision import sources

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        # AWS, GCP, Azure and others; AWS over IPv6; ECS and EKS; Alibaba; Azure's wire server;
        # Oracle.
        ("169.254.169.254", "fd00:ec2::254", "169.254.170.2", "169.254.170.23",
         "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    )
)  # fmt: skip
"""Addresses that hand out credentials: never fetched, whatever is allowed."""

_SEND_DATA = "send the file as a data URL"
_SEND_DATA_OR_ALLOW = f"{_SEND_DATA}, or have the host allowed by the server's settings"

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        # Local NAT64, old site-local, old IPv4-compatible: `is_global` of Python 3.11 lets them by.
        ("64:ff9b:1::/48", "fec0::/10", "::/96"),
    )
)
_METADATA_HOSTS = ("metadata.google.internal", "metadata.goog", "metadata", "instance-data")
_MOST_CONNECTIONS = 256
_CONNECTION_ERRORS = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_OK = 200
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """What may be fetched."""

    allowed_hosts: tuple[str, ...] = ()
    """Names, or `.suffix` for every name below one; empty: every public host."""
    private_hosts: tuple[str, ...] = ()
    """Names, or `.suffix`, whose addresses may be private, loopback or link-local."""
    proxy: str | None = None
    """URL of an HTTP proxy that resolves and connects instead; names are still checked."""
    seconds: float = 10.0
    """Time for one URL, redirects included."""
    max_redirects: int = 3


class Budget:
    """Bytes that the URLs of one request may bring together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._left = max_bytes

    def take(self, count: int) -> None:
        """Use up some; raises RequestError when too many are asked for."""
        self._left -= count
        if self._left < 0:
            raise sources.refused(
                f"the files of the request have more than {self._max_bytes} bytes together; "
                "send fewer or smaller ones"
            )


class Fetcher:
    """Fetches URLs under a policy; one for a process."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        tls = ssl.create_default_context()
        if policy.proxy:
            self._pool: httpcore.AsyncConnectionPool = httpcore.AsyncHTTPProxy(
                proxy_url=policy.proxy, ssl_context=tls, max_connections=_MOST_CONNECTIONS
            )
        else:
            self._pool = httpcore.AsyncConnectionPool(
                ssl_context=tls,
                network_backend=_CheckedBackend(policy),
                max_connections=_MOST_CONNECTIONS,
            )

    async def fetch(self, url: str, *, max_bytes: int, budget: Budget) -> bytes:
        """Return the body behind a URL.

        Raises RequestError when the policy forbids it, when it is too large,
        too slow, or does not answer with 200.
        """
        try:
            async with asyncio.timeout(self._policy.seconds):
                return await self._follow(url, max_bytes=max_bytes, budget=budget)
        except TimeoutError as e:
            raise _failed(f"no answer within {self._policy.seconds:g} s") from e
        except (*_CONNECTION_ERRORS, httpcore.ProxyError) as e:
            raise _failed("the connection failed") from e
        except OSError as e:
            raise _failed("the host can not be reached") from e

    async def close(self) -> None:
        """Close connections that are kept."""
        await self._pool.aclose()

    async def _follow(self, url: str, *, max_bytes: int, budget: Budget) -> bytes:
        for _ in range(self._policy.max_redirects + 1):
            target = check_url(url, self._policy)
            headers = [("Host", target.netloc), ("User-Agent", _user_agent()), ("Accept", "*/*")]
            async with self._pool.stream("GET", target.httpcore_url(), headers=headers) as response:
                if response.status not in _REDIRECTS:
                    return await _read(response, max_bytes=max_bytes, budget=budget)
                location = _header(response, b"location")
            if not location:
                raise _failed("a redirect leads nowhere")
            url = _join(url, location)
        raise _failed(f"there are more than {self._policy.max_redirects} redirects")


@dataclasses.dataclass(frozen=True)
class Target:
    """A URL that passed the checks of names."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        """Host, with the port where it is not the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def httpcore_url(self) -> httpcore.URL:
        """Return what httpcore connects to."""
        return httpcore.URL(
            scheme=self.scheme.encode(),
            host=self.host.encode(),
            port=self.port,
            target=self.path.encode(),
        )


def check_url(url: str, policy: FetchPolicy) -> Target:
    """Read a URL and check its scheme and host; raises RequestError for what is not allowed."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").rstrip(".").encode("idna").decode()
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError) as e:
        raise _failed("it is no http or https URL") from e
    if not host:
        raise _failed("it names no host")
    if host.lower() in _METADATA_HOSTS:
        raise _forbidden("metadata addresses are never fetched", remedy=_SEND_DATA)
    if policy.allowed_hosts and not _matches(host, policy.allowed_hosts):
        raise _forbidden(f"the host {host} is not one of the allowed ones")
    address = _literal(host)
    if address is not None:
        check_address(address, host=host, policy=policy)
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return Target(parts.scheme, host, port, f"{path}?{query}" if query else path)


def check_address(address: _Address, *, host: str, policy: FetchPolicy) -> None:
    """Raise RequestError unless a host's address may be connected to."""
    for reached in _reached_through(address):
        if reached in _METADATA:
            raise _forbidden("metadata addresses are never fetched", remedy=_SEND_DATA)
        is_public = reached.is_global and not reached.is_multicast
        is_public = is_public and not any(reached in network for network in _NOT_PUBLIC)
        if not is_public and not _matches(host, policy.private_hosts):
            raise _forbidden(f"the address of {host} is not public, and the host is not allowed")


def _reached_through(address: _Address) -> Iterable[_Address]:
    """Yield an address and the IPv4 address that is written into it."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        yield from (part for part in inner if part is not None)


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a host, checks the addresses, and connects to one that passed."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a host by a checked address."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            literal = ipaddress.ip_address(address.partition("%")[0])
            check_address(literal, host=host, policy=self._policy)
        failure: Exception = OSError("the name has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except httpcore.ConnectError as e:
                failure = e
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Refuse: nothing here is fetched over a Unix socket."""
        del timeout, socket_options
        raise OSError(f"no Unix sockets: {path}")

    async def sleep(self, seconds: float) -> None:
        """Wait between tries."""
        await asyncio.sleep(seconds)


async def _read(response: httpcore.Response, *, max_bytes: int, budget: Budget) -> bytes:
    if response.status != _OK:
        raise _failed(f"the answer has status {response.status}, expected 200")
    announced = _header(response, b"content-length")
    if announced.isdigit() and int(announced) > max_bytes:
        raise sources.too_large(max_bytes)
    content = bytearray()
    async for chunk in response.aiter_stream():
        content += chunk
        if len(content) > max_bytes:
            raise sources.too_large(max_bytes)
        budget.take(len(chunk))
    return bytes(content)


def _join(url: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(url, location)
    except ValueError as e:
        raise _failed("a redirect leads to what is no URL") from e


def _header(response: httpcore.Response, name: bytes) -> str:
    headers: Mapping[bytes, bytes] = {key.lower(): value for key, value in response.headers}
    return headers.get(name, b"").decode("latin-1")


def _literal(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _matches(host: str, patterns: Iterable[str]) -> bool:
    host = host.lower()
    return any(
        host.endswith(pattern.lower()) if pattern.startswith(".") else host == pattern.lower()
        for pattern in patterns
    )


def _user_agent() -> str:
    return f"internvl-runtime/{internvl_runtime.__version__}"


def _failed(message: str) -> errors.RequestError:
    return sources.refused(f"{message}; {_SEND_DATA}", code="fetch_failed")


def _forbidden(message: str, *, remedy: str = _SEND_DATA_OR_ALLOW) -> errors.RequestError:
    return sources.refused(f"{message}; {remedy}", code="fetch_forbidden")
