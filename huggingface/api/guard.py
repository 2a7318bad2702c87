"""Keeps web pages away from a server that is meant for its user's own programs.

A browser sends requests to `localhost` on behalf of any page. Two headers tell: `Host` is a foreign name when a page's
own domain was pointed at this machine (DNS rebinding), and `Origin` is the page's. Both are checked before any route.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from flask import Flask, request
from werkzeug.exceptions import Forbidden


def init_guard(app: Flask, allowed_hosts: Iterable[str]) -> None:
    """Refuse (403) requests to `app` under foreign names or from foreign pages.

    Numeric addresses, `localhost` and this machine's own name are always allowed; `allowed_hosts` are names to add.
    """
    names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in allowed_hosts)}

    def known(host: str | None) -> bool:
        if not host:
            return False
        host = host.lower().rstrip(".")
        if host in names or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def check() -> None:
        authority = request.headers.get("Host", "")
        try:
            host = urlsplit(f"//{authority}").hostname
            origin = urlsplit(request.headers.get("Origin", ""))
            origin_host = origin.hostname
        except ValueError as error:
            raise Forbidden("The Host or Origin header is not valid") from error
        if authority and not known(host):
            raise Forbidden(f"This server does not answer to the name {host!r}; see LOCAL_LLM_ALLOWED_HOSTS")
        if "Origin" in request.headers and origin.netloc != authority and origin_host not in names - {"localhost"}:
            raise Forbidden("Requests from other web pages are refused; see LOCAL_LLM_ALLOWED_HOSTS")

    app.before_request(check)
