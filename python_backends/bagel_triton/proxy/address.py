"""Which network addresses are anyone's, and which are this machine's or network's own."""

from __future__ import annotations

import ipaddress


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
