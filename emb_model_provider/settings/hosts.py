"""Names and addresses of hosts: those that the service listens on, and those in Host headers."""

from __future__ import annotations

import ipaddress
import re

ANY = "*"
"""All addresses of the machine, IPv4 and IPv6."""

_HOST = re.compile(
    r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?)(?::[0-9]{0,5})?", re.ASCII
)


def parse_host(text: str) -> str | None:
    """Return the host of `host` or `host:port`, or None if the text has another form.

    The result is in lower case, without the port, the brackets of an IPv6 address, or the dot at the end of a name.
    """
    match = _HOST.fullmatch(text.lower())
    if match is None:
        return None
    if match["ipv6"] is None:
        return match["name"]
    try:
        return str(ipaddress.IPv6Address(match["ipv6"]))
    except ValueError:
        return None


def is_loopback_address(address: str) -> bool:
    """Return whether an address, which can have a zone (`fe80::1%eth0`), is one of this machine's loopback addresses."""
    parsed = _address(address)
    return parsed is not None and parsed.is_loopback


def is_loopback_host(host: str) -> bool:
    """Return whether a host is a spelling of this machine: a loopback or unspecified address, or `localhost`.

    No page can have such a name by DNS rebinding, because browsers do not look these names up.
    """
    parsed = _address(host)
    if parsed is not None:
        return parsed.is_loopback or parsed.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed
