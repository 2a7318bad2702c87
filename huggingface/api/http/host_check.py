"""Decides which web pages may use the server, and sends browsers the CORS headers.

A browser sends requests on behalf of any page. `Host` is a foreign name when a page's own domain resolves to this
machine (DNS rebinding), `Origin` is the page's origin, and `Sec-Fetch-Site` reveals a foreign page where a browser
sends no origin. All three are checked before any route; allowed pages get CORS headers, on errors and streams too.
Plain data after the start, for any thread. Must not know routes, except those that are pages for people.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from flask import Flask, Response, request
from werkzeug.exceptions import Forbidden

from ..documented.requests import CLIENTS_ID, OUR_ID
from .fields import HEADER as IGNORED
from .origins import LOCAL_ORIGINS, AllowedOrigins, allowed_origins, read_authority, read_origin

logger = logging.getLogger(__name__)

EXTENSION = "local-llm-guard"

_PAGES = frozenset({"/", "/docs", "/openapi.json"})  # pages that another site may link to
_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_EXPOSED = ", ".join((CLIENTS_ID, OUR_ID, IGNORED, "Retry-After"))
# Headers that clients send at least. Further names are echoed: an allowed page may send any header, and SDKs have many
# (`x-stainless-*`), for which no wildcard works in all browsers.
_HEADERS = (
    "accept",
    "anthropic-beta",
    "anthropic-version",
    "authorization",
    "content-type",
    "x-api-key",
    "x-request-id",
)
_TOKEN = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,128}")
_MAX_HEADERS = 64
# Containers' names for the machine that they run on. Public DNS has no names below `internal`, so no page can use one.
_CONTAINERS = ("host.docker.internal", "gateway.docker.internal", "host.containers.internal")
_MAX_AGE = "3600"  # seconds; Chromium takes two hours at most
_MAX_LOGGED = 100


@dataclass(frozen=True, slots=True)
class Guard:
    """The names that the server answers to, and the origins whose pages may use it."""

    names: frozenset[str]
    origins: AllowedOrigins

    def knows(self, authority: str) -> bool:
        """Whether a `Host` header is a numeric address or a name of this server."""
        read = read_authority(authority)
        if read is None or not read[0]:
            return False
        host = read[0]
        return host in self.names or host.endswith(".localhost") or _is_address(host)

    def admits(self, origin: str, authority: str) -> bool:
        """Whether a page of `origin` may use the server under the name in `authority`: an allowed page, or its own."""
        read = read_origin(origin)
        own = read is not None and read.scheme in ("http", "https")
        same = own and read is not None and read.authority == read_authority(authority, read.scheme)
        return (not authority or self.knows(authority)) and (same or self.origins.allows(origin))

    def refusal(self) -> str | None:
        """The reason to refuse the present request; None where it is accepted."""
        headers = request.headers
        authority, origin = headers.get("Host", ""), headers.get("Origin")
        if authority and not self.knows(authority):
            return f"This server does not answer to the name {authority[:200]!r}; LOCAL_LLM_ALLOWED_HOSTS can add names"
        if origin is not None:
            if self.admits(origin, authority):
                return None
            return (
                f"Requests from web pages of the origin {origin[:200]!r} are refused; "
                "LOCAL_LLM_ALLOWED_ORIGINS can allow further origins"
            )
        if self.origins.every or not _is_of_a_foreign_page(authority):
            return None
        return (
            "Requests from other sites' web pages are refused where the browser does not tell the page's origin; "
            "fetch with CORS, from an origin that LOCAL_LLM_ALLOWED_ORIGINS allows"
        )

    def answer_headers(self, origin: str | None, authority: str) -> Iterator[tuple[str, str]]:
        """The headers of every answer to a page of `origin`."""
        yield "Vary", "Origin"
        if origin is not None and self.admits(origin, authority):
            yield "Access-Control-Allow-Origin", origin
            yield "Access-Control-Expose-Headers", _EXPOSED


def init_guard(app: Flask, allowed_hosts: Iterable[str], origins: Iterable[str]) -> None:
    """Refuses (403) requests to `app` under foreign names or from foreign pages, and sends CORS headers to the others.

    Numeric addresses, `localhost`, this machine's own name and containers' names for it are always allowed;
    `allowed_hosts` are further names, `origins` are patterns of origins besides those of this machine.
    """
    names = {"localhost", *_CONTAINERS, socket.gethostname().lower(), *(name.lower() for name in allowed_hosts)}
    guard = app.extensions[EXTENSION] = Guard(frozenset(names), allowed_origins([*LOCAL_ORIGINS, *origins]))
    logged: set[str] = set()

    def check() -> Response | None:
        reason = guard.refusal()
        if reason is not None:
            if reason not in logged and len(logged) < _MAX_LOGGED:
                logged.add(reason)
                logger.warning("%s", reason)  # the browser hides the answer from a refused page
            raise Forbidden(reason)
        asked = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        return _preflight() if asked and "Origin" in request.headers else None

    def tell(response: Response) -> Response:
        headers = dict(guard.answer_headers(request.headers.get("Origin"), request.headers.get("Host", "")))
        response.vary.add(headers.pop("Vary"))
        response.headers.update(headers)
        return response

    app.before_request(check)
    app.after_request(tell)


def _preflight() -> Response:
    """The answer to a browser's preflight request, for unknown routes too."""
    asked = [name.strip() for name in request.headers.get("Access-Control-Request-Headers", "").lower().split(",")]
    further = [name for name in asked if _TOKEN.fullmatch(name)][:_MAX_HEADERS]
    response = Response(status=204)
    del response.headers["Content-Type"]
    response.vary.update(("Access-Control-Request-Method", "Access-Control-Request-Headers"))
    response.headers["Access-Control-Allow-Methods"] = _METHODS
    response.headers["Access-Control-Allow-Headers"] = ", ".join(dict.fromkeys([*_HEADERS, *further]))
    response.headers["Access-Control-Max-Age"] = _MAX_AGE
    if request.headers.get("Access-Control-Request-Private-Network") == "true":
        response.headers["Access-Control-Allow-Private-Network"] = "true"
    return response


def _is_of_a_foreign_page(authority: str) -> bool:
    """Whether the present request, which has no origin, comes from another site's page.

    A form, an image or a script can cause such a request; its page cannot read the answer, but the request would have
    its effect. A link to a page for people may be followed, but not a frame around it, where a user could click unseen.
    """
    headers = request.headers
    site = headers.get("Sec-Fetch-Site")
    if site == "same-site":
        read = read_authority(authority)
        if read is not None and read[0] in ("localhost", "127.0.0.1", "[::1]"):
            return False  # a page of the same host, so of this machine
    elif site != "cross-site":
        return False
    followed = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    return not (followed and request.method in ("GET", "HEAD") and request.path in _PAGES)


def _is_address(host: str) -> bool:
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
