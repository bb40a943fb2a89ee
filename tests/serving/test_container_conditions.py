"""What the containers ask of the server and of Prometheus, without an engine to run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from bagel_triton.serving.flags import TOY
from bagel_triton.serving.machine import free_port, source_file
from tests.support.serving import Server

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
# As in docker-compose.yml: a read-only root with tmpfs on /tmp and /dev/shm, any user id, no capabilities. An
# interpreter in another user's home folder is bound to its place again, where that user alone can reach it.
CONTAINED = """
set -eu
mount --make-rprivate /
case $1 in /root/*)
    mount --bind "$1" /mnt
    mount -t tmpfs -o mode=755 tmpfs /root
    mkdir -p "$1"
    mount --bind /mnt "$1"
esac
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
shift
exec setpriv --reuid 12345 --regid 12345 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""
BODY = {"messages": [{"role": "user", "content": "a red circle"}], "modalities": ["image"], "num_inference_steps": 3}


def contained() -> list[str]:
    """A command that runs another as in the container."""
    command = ["unshare", "--mount", "sh", "-c", CONTAINED, "sh", sys.base_prefix]
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("unshare and setpriv (util-linux) are not here")
    tried = subprocess.run([*command, sys.executable, "-c", ""], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"mounts cannot be made here: {tried.stderr.strip()}")
    return command


def test_it_serves_as_any_user_on_a_read_only_root() -> None:
    command = contained()
    denied = subprocess.run(
        [*command, sys.executable, "-c", f"open({str(ROOT / 'written')!r}, 'w')"], capture_output=True, text=True
    )
    assert "Read-only file system" in denied.stderr  # else this would prove nothing
    places = {"HOME": "/tmp", "TMPDIR": "/tmp"}
    with Server(source_file(TOY), environment=places, prefix=command) as server:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        assert "Uid:\t12345\t12345" in status
        assert "CapEff:\t0000000000000000" in status
        (pixels,) = server.images(BODY)
        assert pixels.std() > 0
        assert server.stop() == 0


def test_prometheus_reads_the_metrics(server: Server, tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not on PATH (Debian's package of that name)")
    config = yaml.safe_load((ROOT / "build" / "containers" / "prometheus.yml").read_text())
    # The API's page and Triton's own, as of stage 0 and of stage 1.
    pages = (server.url, server.metrics.removesuffix("/metrics"))
    for job, page in zip(config["scrape_configs"], pages, strict=True):
        job["static_configs"] = [{"targets": [page.removeprefix("http://")]}]
    config["global"] = {**config.get("global", {}), "scrape_interval": "1s", "scrape_timeout": "1s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port('127.0.0.1', 0)}"
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    assert server.chat({**BODY, "modalities": ["text"], "max_tokens": 2}).status_code == 200
    with subprocess.Popen(["prometheus", *options, f"--web.listen-address={address}"], env=os.environ) as prometheus:
        try:
            found: list[object] = []
            for _ in range(60):
                time.sleep(0.5)
                try:
                    url = f"http://{address}/api/v1/query"
                    query = {"query": 'sum(bagel_requests_total{status="200"}) and on() (sum(up) == 2)'}
                    found = httpx.get(url, params=query, trust_env=False).json()["data"]["result"]
                except httpx.TransportError:  # it is starting
                    continue
                if found:
                    break
            assert found, "Prometheus found no such series, or not both pages"
        finally:
            prometheus.terminate()
