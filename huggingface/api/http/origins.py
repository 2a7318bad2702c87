"""Parses origins of web pages, and matches them with the patterns of a setting.

Pure functions and frozen data, safe from any thread. An origin must match whole, as browsers write it (RFC 6454): a
text that only begins or ends like an allowed origin, or has a path or a user's name, is refused. Must not know HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address

# Pages of this machine: its own servers on any port, and desktop programs that are built like a browser.
LOCAL_ORIGINS = (
    *(f"{scheme}://{host}:*" for scheme in ("http", "https") for host in ("localhost", "*.localhost")),
    *(f"{scheme}://{host}:*" for scheme in ("http", "https") for host in ("127.0.0.1", "[::1]")),
    "app://*",
    "tauri://*",
    "vscode-file://*",
    "vscode-webview://*",
)

_HOST = r"\[[0-9a-f:.]+\]|[a-z0-9_~.-]*"
_AUTHORITY = re.compile(rf"(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?")
_ORIGIN = re.compile(rf"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>{_AUTHORITY.pattern})")
_PATTERN = re.compile(
    rf"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\*|\*\.[a-z0-9_~.-]+|{_HOST})(?::(?P<port>\*|[0-9]{{1,5}}))?"
)
_PORTS = {"http": 80, "https": 443}  # default ports, which an origin leaves out
_EXAMPLES = "https://chat.example, https://*.chat.example, http://10.0.0.5:*, chrome-extension://*, null or *"


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a page. `port` is None where its scheme has none."""

    scheme: str
    host: str
    port: int | None

    @property
    def authority(self) -> tuple[str, int | None]:
        """Host and port, as `read_authority` gives them."""
        return self.host, self.port


def read_authority(text: str, scheme: str = "http") -> tuple[str, int | None] | None:
    """Parses `host:port`; returns the host in lower case without a final dot, and the port, or None where invalid."""
    found = _AUTHORITY.fullmatch(text.lower()) if text.isascii() else None
    if found is None:
        return None
    host = found["host"]
    if host.startswith("["):
        try:
            host = f"[{IPv6Address(host[1:-1]).compressed}]"
        except AddressValueError:
            return None
    else:
        host = host.removesuffix(".")
    port = int(found["port"]) if found["port"] else _PORTS.get(scheme)
    if port is not None and port > 65535:
        return None
    return host, port


def read_origin(text: str) -> Origin | None:
    """Parses an `Origin` header; None where it holds no origin, `null` included."""
    found = _ORIGIN.fullmatch(text.lower()) if text.isascii() else None
    authority = read_authority(found["authority"], found["scheme"]) if found else None
    if found is None or authority is None or (found["scheme"] in _PORTS and not authority[0]):
        return None
    return Origin(found["scheme"], *authority)


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Origins of one scheme. The host may be `*`, or `*.name` for all hosts below a name; the port `*` is any port."""

    scheme: str
    host: str
    port: int | str | None

    def fits(self, origin: Origin) -> bool:
        """Whether the pattern matches an origin."""
        if self.host.startswith("*."):
            below = self.host[1:]
            host = origin.host.endswith(below) and origin.host != below
        else:
            host = self.host in ("*", origin.host)
        return host and origin.scheme == self.scheme and self.port in ("*", origin.port)


@dataclass(frozen=True, slots=True)
class AllowedOrigins:
    """The origins whose pages may use the server."""

    patterns: tuple[_Pattern, ...]
    null: bool  # the origin of files, and of frames that hide theirs
    every: bool

    def allows(self, origin: str) -> bool:
        """Whether the origin in a header is allowed."""
        if self.every:
            return True
        if origin == "null":
            return self.null
        read = read_origin(origin)
        return read is not None and any(pattern.fits(read) for pattern in self.patterns)


def allowed_origins(patterns: Iterable[str]) -> AllowedOrigins:
    """Parses patterns of origins.

    Raises:
        ValueError: a pattern is invalid; the message says which, and why.
    """
    names = set(patterns)
    return AllowedOrigins(
        tuple(_pattern(name) for name in sorted(names - {"*", "null"})), null="null" in names, every="*" in names
    )


def _pattern(text: str) -> _Pattern:
    found = _PATTERN.fullmatch(text.lower()) if text.isascii() else None
    if text.lower().startswith("file:"):
        raise ValueError(f"{text!r} fits no page: pages from files have the origin null")
    if found is None or (not found["host"] and found["scheme"] in _PORTS):
        raise ValueError(f"{text!r} is not an origin: write it without a path, as {_EXAMPLES}")
    scheme, host, port = found["scheme"], found["host"], found["port"]
    if host == "*" and port is None:
        return _Pattern(scheme, host, "*")
    number = None if port == "*" else port
    wildcard = host.startswith("*")
    authority = read_authority(f"{'any' if wildcard else host}{f':{number}' if number else ''}", scheme)
    if authority is None:
        raise ValueError(f"{text!r} is not an origin: its address or port does not exist")
    return _Pattern(scheme, host if wildcard else authority[0], "*" if port == "*" else authority[1])
