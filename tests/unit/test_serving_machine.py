"""Ports: free ones differ, a busy one is a clear error. And how a GPU is shared."""

import socket

import pytest

from bagel_triton.serving import CommandError, machine


def test_a_busy_port_is_named_with_the_flag_that_chooses_another():
    with socket.create_server((machine.LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=rf"127\.0\.0\.1 port {port}: .*in use; --port chooses another"):
            machine.listen(machine.LOOPBACK, port, "--port")


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_number_that_is_no_port_is_refused(port):
    with pytest.raises(CommandError, match=f"--port={port} is not allowed; allowed: 0"):
        machine.listen(machine.LOOPBACK, port, "--port")


def test_an_address_of_no_machine_is_refused():
    with pytest.raises(CommandError, match="cannot listen on not-an-address"):
        machine.listen("not-an-address", 0, "--port")


def test_chosen_ports_differ_and_are_free_to_bind():
    with machine.listen(machine.LOOPBACK, 0, "--x") as probe:
        wanted = probe.getsockname()[1]
    chosen = machine.choose_ports({"--a": 0, "--b": wanted, "--c": 0})
    assert chosen["--b"] == wanted
    assert len(set(chosen.values())) == 3
    for port in chosen.values():
        machine.listen(machine.LOOPBACK, port, "--x").close()


def test_choosing_one_port_twice_is_an_error():
    with machine.listen(machine.LOOPBACK, 0, "--x") as probe:
        wanted = probe.getsockname()[1]
    with pytest.raises(CommandError, match=f"port {wanted}.*--b"):
        machine.choose_ports({"--a": wanted, "--b": wanted})


def test_a_port_of_another_address():
    with machine.listen("127.0.0.2", 0, "--x") as taken:
        port = taken.getsockname()[1]
        assert machine.choose_ports({"--a": port}) == {"--a": port}
        with pytest.raises(CommandError, match=rf"127\.0\.0\.2 port {port}.*--a"):
            machine.choose_ports({"--a": port}, {"--a": "127.0.0.2"})


def test_processes_share_a_gpu_by_mps_where_its_daemon_runs(tmp_path):
    environ = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert machine.gpu_sharing(environ).startswith("time slices (nvidia-cuda-mps-control")
    (tmp_path / "control").touch()
    assert machine.gpu_sharing(environ) == "MPS"
