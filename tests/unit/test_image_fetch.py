"""Fetching from a real HTTP server, which stands behind invented public addresses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bagel_triton.openai.image_fetch import FetchError, RemoteImages, is_public, without_login
from bagel_triton.openai.settings import AllowedSources
from tests.support.image_host import BODY, DEAD, PUBLIC, Host, serving_images


@pytest.fixture
def host() -> Iterator[Host]:
    with serving_images() as serving:
        yield serving


def fetch(host: Host, url: str, **limits: Any) -> bytes:
    return asyncio.run(host.remote(**limits).fetch(url))


def refusal(host: Host, url: str, **limits: Any) -> str:
    with pytest.raises(FetchError) as caught:
        fetch(host, url, **limits)
    return str(caught.value)


def test_an_image_is_fetched_by_its_hosts_name_from_the_address_that_was_checked(host: Host) -> None:
    assert fetch(host, "http://images.example:8080/cat.png?v=2#top") == BODY
    assert host.seen == [("images.example:8080", "/cat.png?v=2")]
    assert host.reached == [PUBLIC]


@pytest.mark.parametrize("path", ["absolute", "relative", "3"])
def test_redirects_are_followed(host: Host, path: str) -> None:
    assert fetch(host, f"http://images.example/{path}") == BODY


def test_a_host_may_say_that_nothing_is_encoded(host: Host) -> None:
    assert fetch(host, "http://images.example/identity") == BODY


def test_a_login_in_the_url_is_sent_to_its_host_alone(host: Host) -> None:
    assert fetch(host, "http://ann:p%40ss@images.example/away") == BODY
    first, second = host.headers
    assert first["Authorization"] == "Basic " + base64.b64encode(b"ann:p@ss").decode()
    assert "Authorization" not in second
    assert host.seen[0] == ("images.example", "/away")


def test_the_host_gets_a_user_agent_and_its_refusal_is_passed_on(host: Host) -> None:
    message = refusal(host, "http://images.example/forbidden")
    assert message == "the host answered 403 Forbidden: Please set a User-Agent & wait"
    assert re.match(r"bagel-triton/\S+ \(.+\)", host.headers[0]["User-Agent"])


@pytest.mark.parametrize(
    ("url", "name", "path"),
    [
        ("http://images.example/a b.png", "images.example", "/a%20b.png"),
        ("http://images.example/ä.png", "images.example", "/%C3%A4.png"),
        ("http://bücher.example/cat.png", "xn--bcher-kva.example", "/cat.png"),
    ],
)
def test_urls_may_hold_blanks_and_any_letters(host: Host, url: str, name: str, path: str) -> None:
    host.names["xn--bcher-kva.example"] = [PUBLIC]
    with contextlib.suppress(FetchError):  # not every path leads to something
        fetch(host, url)
    assert host.seen == [(name, path)]


@pytest.mark.parametrize("source", ["inside.example", "INSIDE.example", "10.0.0.8", "10.0.0.0/8"])
def test_a_private_host_is_allowed_by_name_address_or_network(host: Host, source: str) -> None:
    allowed = AllowedSources([source])
    assert fetch(host, "http://inside.example/cat.png", allowed=allowed) == BODY
    assert fetch(host, "http://images.example/inside", allowed=allowed) == BODY
    assert "has the address 127.0.0.1" in refusal(host, "http://half-inside.example/cat.png", allowed=allowed)


@pytest.mark.parametrize("source", ["", "http://host", "10.0.0.0/33", "host:80", "10.0.0.1/8"])
def test_what_names_no_host_cannot_be_allowed(source: str) -> None:
    with pytest.raises(ValueError, match="is not a host name, an address or a network"):
        AllowedSources([source])


def test_an_error_shows_no_login() -> None:
    assert without_login("https://ann:secret@host/a@b?c") == "https://***@host/a@b?c"
    assert without_login("https://host/a@b") == "https://host/a@b"


def test_an_address_that_does_not_answer_is_passed_over(host: Host) -> None:
    assert fetch(host, "http://half-dead.example/cat.png") == BODY
    assert host.reached == [DEAD, PUBLIC]


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1/cat.png", "127.0.0.1 has the address 127.0.0.1; allowed: public addresses"),
        ("http://user@127.0.0.1/cat.png", "has the address 127.0.0.1"),
        ("http://[::ffff:127.0.0.1]/cat.png", "has the address ::ffff:127.0.0.1"),
        ("http://inside.example/cat.png", "inside.example has the address 10.0.0.8"),
        ("http://half-inside.example/cat.png", "half-inside.example has the address 127.0.0.1"),
        ("http:///cat.png", "the URL names no host"),
        ("http://images.example:99999/", "port 99999 does not exist"),
        ("http://images.example:0/", "port 0 does not exist"),
        ("http://images.example:http/", "the URL is malformed"),
    ],
)
def test_hosts_that_are_not_allowed_are_never_connected_to(host: Host, url: str, cause: str) -> None:
    assert cause in refusal(host, url)
    assert host.reached == []


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("loopback", "127.0.0.1 has the address 127.0.0.1"),
        ("inside", "inside.example has the address 10.0.0.8"),
        ("file", "it leads to a file URL; allowed: http, https"),
    ],
)
def test_a_redirect_leads_no_further_than_a_url(host: Host, path: str, cause: str) -> None:
    assert cause in refusal(host, f"http://images.example/{path}")
    assert host.seen == [("images.example", f"/{path}")]


def test_a_name_that_changes_its_address_is_checked_anew(host: Host) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        host.resolved.append(name)
        return [PUBLIC] if len(host.resolved) == 1 else ["127.0.0.1"]

    host.resolve = resolve  # type: ignore[method-assign]
    assert "has the address 127.0.0.1" in refusal(host, "http://images.example/absolute")
    assert host.reached == [PUBLIC]
    assert host.resolved == ["images.example"] * 2


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("4", "it is redirected more than 3 times"),
        ("missing.png", "the host answered 404 Not Found"),
        ("gzip", "the host sent it with Content-Encoding gzip"),
        ("broken", "the connection failed: "),
    ],
)
def test_what_goes_wrong_is_named(host: Host, path: str, cause: str) -> None:
    assert cause in refusal(host, f"http://images.example/{path}")


def test_too_many_bytes_are_not_read(host: Host) -> None:
    assert fetch(host, "http://images.example/cat.png", max_bytes=len(BODY)) == BODY
    assert "allowed: at most 10239" in refusal(host, "http://images.example/cat.png", max_bytes=len(BODY) - 1)
    assert "too many bytes" in refusal(host, "http://images.example/endless", max_bytes=100_000)


def test_a_slow_host_is_given_up(host: Host) -> None:
    started = time.monotonic()
    assert refusal(host, "http://images.example/slow", timeout_s=0.3) == "it took longer than 0.3 s"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://localhost/", "localhost has the address "),
        ("http://2130706433/", "has the address 127.0.0.1"),
        ("https://[::1]/", "::1 has the address ::1"),
        ("http://a..b/", "the name a..b cannot be resolved"),
    ],
)
def test_the_systems_own_names_are_checked(url: str, cause: str) -> None:
    with pytest.raises(FetchError) as caught:
        asyncio.run(RemoteImages().fetch(url))
    assert cause in str(caught.value)


OWN = (
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1", "192.168.1.1"),
    *("192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:224.0.0.1", "::127.0.0.1"),
    *("2002:7f00:1::", "2002:c0a8:101::1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1"),
    *("192.0.0.8", "192.0.0.192", "192.88.99.1", "3fff::1", "5f00::1"),
)


@pytest.mark.parametrize("address", OWN)
def test_no_address_of_this_machine_or_network_is_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "2002:808:808::1", "64:ff9b::808:808"],
)
def test_other_addresses_are_public(address: str) -> None:
    assert is_public(address)
