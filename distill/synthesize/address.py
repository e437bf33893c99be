"""The address of an endpoint, checked once: what no retry can mend is found before the first prompt."""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from urllib.parse import quote, urlsplit, urlunsplit

_HOST = re.compile(r"[a-z0-9._-]+")
_PATH = "/%:@!$&'()*+,;=~"  # allowed in a path as they stand (RFC 3986); % because it may be encoded already


def address(url: str) -> str:
    """`url` in ASCII: the host IDNA-encoded, the path percent-encoded. Raises ValueError with what is wrong."""
    if any(letter.isspace() or not letter.isprintable() for letter in url):
        raise ValueError("a space or an unprintable character in it")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("http(s)://host[:port]/path is needed")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("http(s)://host[:port]/path is needed, without a key in it: name its key_variable")
    if (port := parts.port) == 0:
        raise ValueError("port 0 is none")
    if "[" in parts.netloc:
        host = f"[{IPv6Address(parts.hostname)}]"
    else:
        try:
            host = parts.hostname.encode("idna").decode()
        except UnicodeError:
            host = ""
        if not _HOST.fullmatch(host):
            raise ValueError(f"{parts.hostname!r} can not be the name of a host")
    place = host if port is None else f"{host}:{port}"
    return urlunsplit((parts.scheme, place, quote(parts.path, safe=_PATH), "", ""))
