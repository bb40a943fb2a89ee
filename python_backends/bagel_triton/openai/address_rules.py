"""The addresses that images may be fetched from."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable


class AllowedSources:
    """Hosts and networks that images may come from although their addresses are not public.

    Args:
        sources: host names, addresses, and networks such as ``10.0.0.0/8``.

    Raises:
        ValueError: one is none of these.
    """

    def __init__(self, sources: Iterable[str] = ()) -> None:
        self._hosts: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for source in sources:
            try:
                self._networks.append(ipaddress.ip_network(source.strip("[]")))
            except ValueError:
                if not re.fullmatch(r"(?=.*[a-z])[a-z0-9]([a-z0-9.-]*[a-z0-9])?", source.lower()):
                    raise ValueError(f"{source!r} is not a host name, an address or a network") from None
                self._hosts.add(source.lower())

    def permits(self, host: str, address: str) -> bool:
        """Whether images may come from ``address``, which ``host`` resolved to."""
        number = ipaddress.ip_address(address)
        return host.lower() in self._hosts or any(number in network for network in self._networks)


def is_public(address: str) -> bool:
    """Whether the numeric ``address`` is one of the public internet.

    An IPv6 address that carries an IPv4 one (mapped, or 6to4) is as public as that.
    """
    number = ipaddress.ip_address(address)
    if isinstance(number, ipaddress.IPv6Address):
        inner = number.ipv4_mapped or number.sixtofour
        if inner is not None:
            number = inner
        elif number.is_site_local:
            return False
    return number.is_global and not (number.is_multicast or number.is_reserved)
