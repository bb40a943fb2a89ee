"""``bagel-triton memory`` and the server's own check: what this machine has, and what a person reads."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.ipc.host_memory import host_memory
from bagel_triton.model.device import Placement
from bagel_triton.serving import CommandError, cli, memory
from bagel_triton.serving.memory import _ask_device
from bagel_triton.serving.memory_plan import Available, plan
from bagel_triton.weights.checkpoint import Checkpoint
from bench import gpu_sizes

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
GIB = 2**30
GPU = Placement(torch.device("cuda"), torch.bfloat16)


def test_a_server_refuses_to_start_without_the_memory(monkeypatch: pytest.MonkeyPatch):
    small = {"thinker": ThinkerConfig(kv_tokens=64), "dit": DitConfig(max_num_seqs=1)}
    memory.require(DeployConfig(str(CHECKPOINT), device="cpu", **small))
    monkeypatch.setattr(memory, "available", lambda placement: Available(host=2**20, shared=GIB))
    with pytest.raises(CommandError, match=r"the stages need .* and 1\.00 MiB are free"):
        memory.require(DeployConfig(str(CHECKPOINT), device="cpu"))


def test_a_gpu_has_to_hold_the_largest_images_that_are_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in a step, it would fail the requests of others."""
    config = DeployConfig(str(CHECKPOINT), device="cpu", thinker=ThinkerConfig(kv_tokens=64))
    checkpoint, placement = Checkpoint(CHECKPOINT), Placement(torch.device("cpu"), torch.float32)
    default, largest = (
        plan(checkpoint, config, placement, side, side).total for side in (512, checkpoint.config.latent.max_side)
    )
    for free in (largest - 1, largest):
        monkeypatch.setattr(memory, "available", lambda placement, free=free: Available(GIB, GIB, device=free))
        if free < largest:
            assert free > default
            with pytest.raises(CommandError, match="the stages need"):
                memory.require(config)
        else:
            memory.require(config)


def test_a_gpus_processes_have_contexts_of_their_own() -> None:
    needs = [
        plan(Checkpoint(CHECKPOINT), DeployConfig(str(CHECKPOINT), pipeline=pipeline), GPU, 64, 64)
        for pipeline in ("bagel_single_stage", "bagel")
    ]
    assert 0 < needs[0].contexts < needs[1].contexts
    assert needs[1].total == needs[1].weights + needs[1].kv + needs[1].activations + needs[1].contexts


# --- what the machine has ---


def test_a_gpu_decodes_whole_where_the_plan_has_room_and_else_in_strips() -> None:
    checkpoint, place = Checkpoint(CHECKPOINT), Placement(torch.device("cuda:0"), torch.bfloat16)

    def planned(use_tiling: bool | None, free: int) -> bool | None:
        config = DeployConfig(str(CHECKPOINT), vae_decode=VaeDecodeConfig(use_tiling=use_tiling))
        found, _, problem = memory._planned(checkpoint, config, place, (1024, 1024), Available(1, 1, free))
        assert problem is None
        return found.vae_decode.use_tiling

    whole = DeployConfig(str(CHECKPOINT), vae_decode=VaeDecodeConfig(use_tiling=False))
    needed = plan(checkpoint, whole, place, 1024, 1024).total
    assert (planned(None, needed), planned(None, needed - 1)) == (False, True)
    assert planned(True, needed) is True  # as it is told


def pool(free: int, host: int = 2**40, default_pool: bool = True, **changes: Any) -> tuple[int, int]:
    """Tokens of a GPU's pool with so many bytes free, and the bytes of the plan."""
    config = msgspec.structs.replace(DeployConfig(str(CHECKPOINT)), **changes)
    available = Available(host, GIB, free, None, free)
    found, need, problem = memory._planned(Checkpoint(CHECKPOINT), config, GPU, (512, 512), available, default_pool)
    assert problem is None
    return found.thinker.kv_tokens, need.total


def test_a_gpus_default_pool_has_room_for_as_many_texts_as_are_let_in() -> None:
    texts = 134 * 16  # tokens of one
    assert pool(2**40)[0] == 64 * texts
    assert pool(2**40, thinker=ThinkerConfig(max_num_seqs=32))[0] == 32 * texts
    assert pool(2**40, text_defaults={"max_tokens": 64})[0] == 32768  # never less
    assert pool(2**40, default_pool=False)[0] == 32768


def test_a_gpus_default_pool_takes_what_is_left_beside_the_rest() -> None:
    """Never so much that the rest changes, or that less than a tenth of the memory is left."""
    least = pool(2**40, default_pool=False)[1]
    whole = memory._planned(Checkpoint(CHECKPOINT), DeployConfig(str(CHECKPOINT)), GPU, (512, 512), None, True)[1].total
    assert pool(least) == (32768, least)
    free = (least + whole) // 2 * 10 // 9
    tokens, total = pool(free)
    assert 32768 < tokens < 64 * 134 * 16
    assert 0.9 * free - 16 * 384 < total <= 0.9 * free  # to a block


def test_the_docs_say_how_many_texts_the_published_models_default_pool_holds(tmp_path: Path) -> None:
    gpu_sizes.write_published(tmp_path / "published")
    checkpoint, free = Checkpoint(tmp_path / "published"), int(80 * (1 - gpu_sizes.DRIVER) * GIB)
    said = []
    for pipeline in ("bagel_single_stage", "bagel"):
        config = DeployConfig(str(checkpoint.directory), pipeline=pipeline)
        side = checkpoint.config.latent.max_side
        found = memory._planned(checkpoint, config, GPU, (side, side), Available(2**40, GIB, free, None, free), True)[0]
        said.append(memory.pool_summary(found).split()[2])
    docs = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    assert "{} texts on 80 GB with `bagel_single_stage`, and {} with `bagel`".format(*said) in docs


def test_a_default_pool_stays_small_where_the_host_cannot_lend_a_larger_one() -> None:
    assert [pool(2**40, host, connector="mooncake")[0] for host in (16 << 20, 64 << 20)] == [32768, 64 * 134 * 16]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """8 GiB available, and no cgroup."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable: {8 * 2**20} kB\nHugePages_Total: 0\n")
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    return tmp_path


def host(machine: Path) -> int:
    return host_memory(machine / "proc", machine / "cgroup")


def test_without_a_limit_the_machines_memory_counts(machine: Path):
    assert host(machine) == 8 * GIB
    write(machine / "cgroup/memory.max", "max\n")
    assert host(machine) == 8 * GIB


@pytest.mark.parametrize("limited", ["cgroup", "cgroup/a", "cgroup/a/b"])
def test_a_limit_of_any_enclosing_group_counts(machine: Path, limited: str):
    write(machine / "proc/self/cgroup", "0::/a/b\n")
    write(machine / limited / "memory.max", f"{4 * GIB}\n")
    write(machine / limited / "memory.current", f"{3 * GIB}\n")
    write(machine / limited / "memory.stat", f"anon 5\ninactive_file {GIB}\n")
    assert host(machine) == 2 * GIB


def test_a_limit_of_the_old_hierarchy_counts(machine: Path):
    write(machine / "proc/self/cgroup", "9:cpu:/elsewhere\n4:memory:/not/seen/in/a/container\n0::/\n")
    write(machine / "cgroup/memory/memory.limit_in_bytes", f"{4 * GIB}\n")
    write(machine / "cgroup/memory/memory.usage_in_bytes", f"{3 * GIB}\n")
    write(machine / "cgroup/memory/memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB}\n")
    assert host(machine) == 2 * GIB


def test_this_machine_can_be_read():
    free = memory.available(Placement(torch.device("cpu"), torch.float32))
    assert free.host > 0
    assert free.shared > 0
    assert free.device is None


# --- the command ---


def test_the_command_prints_a_row_a_stage(capsys: pytest.CaptureFixture[str]):
    arguments = [
        "--kv-tokens",
        "1024",
        "--max-requests",
        "2",
        "--height",
        "128",
        "--width",
        "64",
        "--device",
        "cpu",
    ]
    assert cli.main(["memory", str(CHECKPOINT), *arguments]) == 0
    out = capsys.readouterr().out
    assert "pipeline bagel on cpu in float32" in out
    assert "KV cache pool of 1024 tokens; images of 64x128 pixels denoised together: 2" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "768 B" in rows["thinker"]
    assert "768.00 KiB" in rows["thinker"]  # 1024 tokens
    assert {"dit", "vae_decode", "together"} <= set(rows)


def test_the_command_says_for_which_adapters_there_is_room(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    flags = ["--lora-dir", str(tmp_path), "--max-loras", "2", "--max-lora-rank", "8", "--device", "cpu"]
    assert cli.main(["memory", str(CHECKPOINT), *flags]) == 0
    said = "Adapters: 0 of the start, and room for 2 more of rank 8 (max_loras, max_lora_rank); their bytes count"
    assert said in capsys.readouterr().out


def test_the_command_reads_a_deploy_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "deploy.yaml").write_text("pipeline: bagel_single_stage\ndtype: bfloat16\ndevice: cpu\n")
    assert cli.main(["memory", str(CHECKPOINT), "--deploy-config", str(tmp_path / "deploy.yaml")]) == 0
    assert "pipeline bagel_single_stage on cpu in bfloat16" in capsys.readouterr().out


def test_a_device_can_be_planned_for_that_is_not_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["memory", str(CHECKPOINT), "--device", "cuda", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "on cuda in bfloat16" in out
    assert "This machine" not in out
    assert cli.main(["memory", str(CHECKPOINT), "--device", "cuda"]) == 1
    assert "dtype must be one of float32, bfloat16" in capsys.readouterr().err


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, private_weights: str | None) -> None:
    """Make this a machine with 1 TiB of everything on a GPU, too."""
    placement = Placement(torch.device("cuda:0"), torch.bfloat16)
    available = Available(2**40, 2**40, 2**40, private_weights)
    monkeypatch.setattr(memory, "_placement", lambda config: (placement, True))
    monkeypatch.setattr(memory, "available", lambda placement: available)


def test_a_gpu_on_which_weights_cannot_be_shared_is_said_to_be_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    together: list[float] = []
    for reason in (None, "cuda:0 has no such thing"):
        on_a_gpu(monkeypatch, reason)
        assert cli.main(["memory", str(CHECKPOINT)]) == 0
        out = capsys.readouterr().out
        together += [float(line.split()[1]) for line in out.splitlines() if line.startswith("together")]
        assert ("Together, weights that stages share count once." in out) is (reason is None)
        assert ("They cannot on cuda:0: cuda:0 has no such thing." in out) is (reason is not None)
    once, twice = together
    assert twice == pytest.approx(2 * once, abs=0.01)


def _fail(device: torch.device) -> tuple[int, str | None, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", _out_of_memory)
        return _ask_device(device)


def _out_of_memory(device: torch.device) -> tuple[int, int]:
    raise RuntimeError("CUDA error: out of memory\nCompile with more switches")


def _die(device: torch.device) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("ask", "reason"), [(_fail, "CUDA error: out of memory"), (_die, "the process that asked it died")]
)
def test_a_gpu_that_does_not_answer_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ask: object, reason: str
):
    monkeypatch.setattr(memory, "_ask_device", ask)
    placement = Placement(torch.device("cuda:0"), torch.bfloat16)
    monkeypatch.setattr(memory, "_placement", lambda config: (placement, True))
    assert cli.main(["memory", str(CHECKPOINT)]) == 1
    assert capsys.readouterr().err == f"bagel-triton: error: device='cuda:0' does not answer: {reason}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-requests", "-1"], "max_num_seqs=-1"),
        (["--height", "17"], "height=17"),
        (["--height", "64", "--width", "4096"], "width=4096"),
        (["--dtype", "float8"], "dtype='float8'"),
        (["--deploy-config", "absent.yaml"], "absent.yaml"),
        (["--tensor-parallel-size", "3"], "tensor_parallel_size=3 does not divide"),
    ],
)
def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str):
    assert cli.main(["memory", str(CHECKPOINT), *arguments]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_a_missing_checkpoint_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert cli.main(["memory", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err
