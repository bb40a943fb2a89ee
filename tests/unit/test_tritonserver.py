"""Finding tritonserver: what is missing is named, and what is there is laid out to run."""

import importlib.metadata
import os
import subprocess
from pathlib import Path

import pytest

from bagel_triton.serving import CommandError, tritonserver


def hide_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_the_embedded_server_runs(tmp_path: Path):
    server = tritonserver.find(tmp_path)
    shown = subprocess.run(
        [server.program, "--help"], env=server.environment(tmp_path / "deploy.yaml"), capture_output=True, text=True
    )
    assert "--model-repository" in shown.stdout + shown.stderr


def test_the_stub_finds_its_libraries(tmp_path: Path):
    server = tritonserver.find(tmp_path)
    assert server.backends is not None
    stub = server.backends / "python" / "triton_python_backend_stub"
    needs = subprocess.run(
        ["ldd", stub], env=server.environment(tmp_path / "deploy.yaml"), capture_output=True, text=True, check=True
    )
    assert os.access(stub, os.X_OK)
    assert "not found" not in needs.stdout
    assert f"{tmp_path}/lib/{tritonserver.NAME}" in needs.stdout


def test_a_missing_libpython_names_the_library_and_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tritonserver, "_directories", lambda: iter([tmp_path]))
    version = tritonserver.VERSION
    with pytest.raises(CommandError, match=rf"libpython{version}\.so\.1\.0 is not .*package libpython{version}"):
        tritonserver.find(tmp_path)


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.4.0")
    with pytest.raises(CommandError, match=r"numpy 2\.4\.0 .* install numpy<2"):
        tritonserver.find(tmp_path)


def test_no_server_at_all_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hide_package(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match="install the package nvidia-pytriton, or put tritonserver on PATH"):
        tritonserver.find(tmp_path)


def test_the_containers_server_keeps_its_own_backends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hide_package(monkeypatch)
    program = tmp_path / "tritonserver"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/own")
    server = tritonserver.find(tmp_path)
    command = server.command(
        tmp_path, ["bagel"], http_port=1, grpc_port=2, metrics_port=3, shm_prefix="p", verbose=False
    )
    assert command[0] == str(program)
    assert not any(argument.startswith("--backend-directory") for argument in command)
    assert server.environment(tmp_path)["LD_LIBRARY_PATH"] == "/opt/own"


def test_what_torch_leaves_is_in_the_servers_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    environment = tritonserver.find(tmp_path).environment(tmp_path / "deploy.yaml")
    assert Path(environment["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path


def test_every_address_is_the_loopback_one(tmp_path: Path):
    command = tritonserver.TritonServer(tmp_path).command(
        tmp_path, ["bagel", "dit"], http_port=1, grpc_port=2, metrics_port=3, shm_prefix="p", verbose=False
    )
    addresses = [argument for argument in command if "-address=" in argument]
    assert sorted(addresses) == [f"--{name}-address=127.0.0.1" for name in ("grpc", "http", "metrics")]


def options_of(server: tritonserver.TritonServer, folder: Path) -> dict[str, str]:
    """The command line's options; ``--help`` of a server that is here says which it knows."""
    command = server.command(folder, ("dit",), http_port=1, grpc_port=2, metrics_port=3, shm_prefix="p", verbose=True)
    return {name: value for name, _, value in (option.partition("=") for option in command[1:])}


@pytest.mark.parametrize(
    ("variable", "release", "newer"),
    [(None, (24, 10), False), ("25.05", (25, 5), False), ("25.06", (25, 6), True), ("26.09-py3", (26, 9), True)],
)
def test_a_newer_server_takes_bodies_as_large_as_an_older_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None, release: tuple[int, int], newer: bool
) -> None:
    hide_package(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "tritonserver").touch(mode=0o755)
    monkeypatch.delenv(tritonserver.RELEASE_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(tritonserver.RELEASE_VARIABLE, variable)
    server = tritonserver.find(tmp_path)
    assert server.release == release
    assert ("--http-max-input-size" in options_of(server, tmp_path)) == newer


def test_the_embedded_server_knows_every_option_that_it_gets(tmp_path: Path) -> None:
    server = tritonserver.find(tmp_path)
    shown = subprocess.run(
        [server.program, "--help"], env=server.environment(tmp_path / "deploy.yaml"), capture_output=True, text=True
    )
    assert [name for name in options_of(server, tmp_path) if name not in shown.stdout + shown.stderr] == []
