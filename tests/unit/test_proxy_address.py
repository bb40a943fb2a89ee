from __future__ import annotations

import pytest

from bagel_triton.openai.image_fetch import is_public

OWN = (
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1", "192.168.1.1"),
    *("192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:224.0.0.1", "::127.0.0.1"),
    *("2002:7f00:1::", "2002:c0a8:101::1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1"),
)


@pytest.mark.parametrize("address", OWN)
def test_no_address_of_this_machine_or_network_is_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "2002:808:808::1"]
)
def test_other_addresses_are_public(address: str) -> None:
    assert is_public(address)
