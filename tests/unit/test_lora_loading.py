"""Adapters that are loaded and unloaded while a server runs: by its stages, and by its orchestrators."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.build import Models, StageResources
from bagel_triton.engine.sleep import SleepingEngine
from bagel_triton.ipc.adapters import AdapterTable
from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.ipc.sleep_gate import SleepGate
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.adapters import AdapterCall, AdapterNames
from bagel_triton.protocol.errors import Asleep, BagelError, Cancelled, InvalidRequest, ModelNotFound, StageUnavailable
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.triton.adapters import ServerAdapters
from tests.support.lora import write_layers
from tests.support.runs import generate
from tests.support.waiting import soon
from tests.unit.test_lora import write_adapter

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
IMAGE = GenerationRequest(prompt="A cute cat", height=32, width=32, seed=1, num_inference_steps=3)


def chosen(name: str) -> GenerationRequest:
    return msgspec.structs.replace(IMAGE, lora=name)


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters: ``first``, ``second``, ``other`` of modules that only merging changes, ``wide``."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        write_layers(folder / name, seed, rank=4)
    write_adapter(folder / "other")
    wide, wrong = folder / "wide", torch.zeros(4, 7)
    shutil.copytree(folder / "first", wide)
    _rewrite(wide, lambda tensors: tensors | {next(name for name in tensors if "lora_A" in name): wrong})
    (folder / "empty").mkdir()
    (folder / "out").symlink_to("/")
    return folder


def _rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.fixture
def prefix() -> Iterator[str]:
    prefix = f"bagel_triton_test_{secrets.token_hex(4)}"
    yield prefix
    for path in SHM_DIRECTORY.glob(f"{prefix}*"):
        path.unlink()


class Server:
    """The engines of one process, and an orchestrator's view of their adapters."""

    def __init__(self, prefix: str, folder: Path, **modules: str) -> None:
        given: dict[str, Any] = {"shm_prefix": prefix, "lora_dir": str(folder), "lora_modules": modules}
        config = DeployConfig(str(CHECKPOINT), device="cpu", dtype="float32", **given)
        self.stages: SleepingEngine[LocalStages] = SleepingEngine(
            lambda: StageResources.open(config),
            lambda resources: LocalStages(config, None, Models.load(resources), resources),
        )
        table = AdapterTable(prefix, "bagel", modules)
        self.adapters = ServerAdapters(table, SleepGate(prefix), lambda reachable: {"bagel": self.stages})

    def load(self, name: str, path: str) -> AdapterNames:
        return self.adapters.answer(AdapterCall("load", name, path), never)

    def unload(self, name: str) -> AdapterNames:
        return self.adapters.answer(AdapterCall("unload", name), never)

    def draw(self, name: str = "") -> torch.Tensor:
        with self.adapters.request(name):
            return generate(self.stages.engine, chosen(name) if name else IMAGE).pixels[0]


@pytest.fixture
def server(prefix: str, folder: Path) -> Iterator[Server]:
    server = Server(prefix, folder, start=str(folder / "first"))
    yield server
    server.stages.close()


def test_a_loaded_adapter_draws_as_one_of_the_start_and_its_name_may_become_anothers(server: Server) -> None:
    plain, first = server.draw(), server.draw("start")
    assert server.load("new", "first") == AdapterNames(("start", "new"))
    assert torch.equal(server.draw("new"), first)
    assert not torch.equal(first, plain)
    assert server.unload("new") == AdapterNames(("start",))
    with pytest.raises(ModelNotFound):
        server.draw("new")
    server.load("new", "second")  # the prefixes of the first are not taken for its own
    second = server.draw("new")
    assert not torch.equal(second, first)
    server.stages.change(2)
    server.stages.wait()
    with pytest.raises(Asleep):
        server.stages.adapt("late", "first")
    server.stages.change(0)
    server.stages.wait()
    assert server.stages.failure == ""
    assert torch.equal(server.draw("new"), second)
    assert torch.equal(server.draw(), plain)


def test_one_whose_files_have_changed_is_not_loaded_again(prefix: str, folder: Path, tmp_path: Path) -> None:
    """A stage that was started again would have another adapter than the others."""
    for name in ("new", "other"):
        shutil.copytree(folder / "first", tmp_path / name)
    server = Server(prefix, tmp_path)
    try:
        server.load("new", "new")
        server.load("other", "other")
        first = server.draw("new")
        server.stages.change(2)
        server.stages.wait()
        shutil.copyfile(folder / "second/adapter_model.safetensors", tmp_path / "new/adapter_model.safetensors")
        server.stages.change(0)
        server.stages.wait()
        assert server.stages.failure == ""
        with pytest.raises(ModelNotFound):
            server.draw("new")
        assert torch.equal(server.draw("other"), first)
        server.unload("new")
        server.load("new", "new")
        assert not torch.equal(server.draw("new"), first)
    finally:
        server.stages.close()


@pytest.mark.parametrize(
    ("name", "path", "kind", "message"),
    [
        ("start", "second", InvalidRequest, "lora_name='start' is not allowed"),
        ("new", "nowhere", ModelNotFound, "lora_path='nowhere' is not allowed"),
        ("new", "first\0", ModelNotFound, "lora_path="),
        ("new", "..", InvalidRequest, "lora_path='..' is not allowed; allowed: a folder below that of --lora-dir"),
        ("new", "/etc", InvalidRequest, "lora_path='/etc' is not allowed; allowed: a folder below"),
        ("new", "out/etc", InvalidRequest, "lora_path='out/etc' is not allowed; allowed: a folder below"),
        ("new", "empty", InvalidRequest, "lora_path='empty' is not allowed: .*adapter_model.safetensors does not"),
        ("new", "other", InvalidRequest, "lora_path='other' is not allowed: .* adapts connector.fc2"),
        ("new", "wide", InvalidRequest, "lora_path='wide' is not allowed: .* of shape"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(
    prefix: str, folder: Path, name: str, path: str, kind: type[BagelError], message: str
) -> None:
    adapters = refusing(prefix, str(folder))
    with pytest.raises(kind, match=f"^{message}") as refused:
        adapters.answer(AdapterCall("load", name, path), never)
    assert type(refused.value) is kind
    assert adapters.answer(AdapterCall("list"), never) == AdapterNames(("start",))


class _Idle:
    """No engine at all."""

    is_lost = False

    def close(self) -> None:
        pass


def refusing(prefix: str, folder: str, max_rank: int | None = None) -> ServerAdapters:
    """Those of a server without weights, whose one adapter is there by name."""
    rules: dict[str, Any] = {"lora_dir": folder, "max_lora_rank": max_rank}
    config = DeployConfig(str(CHECKPOINT), device="cpu", dtype="float32", shm_prefix=prefix, **rules)
    stages: SleepingEngine[Any] = SleepingEngine(lambda: StageResources.open(config), lambda _: _Idle())
    table = AdapterTable(prefix, "bagel", {"start": "first"})
    return ServerAdapters(table, SleepGate(prefix), lambda reachable: {"bagel": stages})


def test_without_a_folder_nothing_is_loaded(prefix: str) -> None:
    with pytest.raises(InvalidRequest, match="lora_dir"):
        refusing(prefix, "").answer(AdapterCall("load", "new", "first"), never)


def test_one_of_a_higher_rank_or_without_memory_for_it_is_refused(
    prefix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = AdapterCall("load", "new", "first")
    with pytest.raises(InvalidRequest, match=r"first has rank 4; allowed: up to 3 \(max_lora_rank\)"):
        refusing(prefix, str(folder), max_rank=3).answer(load, never)
    monkeypatch.setattr("bagel_triton.engine.build.host_memory", lambda: 1000)
    with pytest.raises(StageUnavailable, match=r"^there is no memory for the adapter in 'first': it needs \S+ MiB"):
        refusing(prefix, str(folder), max_rank=4).answer(load, never)


def test_on_a_gpu_the_memory_that_was_kept_for_adapters_is_not_exceeded(
    prefix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free beside it is for activations. No GPU is needed for the sums."""
    monkeypatch.setattr("bagel_triton.engine.build.on_gpu", lambda device: True)
    adapters = refusing(prefix, str(folder), max_rank=4)  # room for one, of which ``first`` takes all
    assert adapters.answer(AdapterCall("load", "new", "first"), never) == AdapterNames(("start", "new"))
    said = r"^there is no memory for the adapter in 'second': it needs 0\.1 MiB, and 0\.0 MiB are left of the 0\.1 MiB"
    with pytest.raises(StageUnavailable, match=said):
        adapters.answer(AdapterCall("load", "more", "second"), never)
    adapters.answer(AdapterCall("unload", "new"), never)
    assert adapters.answer(AdapterCall("load", "more", "second"), never) == AdapterNames(("start", "more"))


class FakeStage:
    """A stage that takes what it is given, or fails."""

    def __init__(self, failure: str = "") -> None:
        self.names: list[str] = []
        self.failure, self.given = "", failure
        self.dead = False

    def adapt(self, name: str, path: str) -> None:
        if self.dead:
            raise StageUnavailable("connection refused")
        self.failure = self.given if path else ""
        if not self.failure:
            self.names = [*self.names, name] if path else [known for known in self.names if known != name]

    def adapters(self) -> tuple[list[str], bool, str]:
        return self.names, False, self.failure


def orchestrator(prefix: str, *stages: FakeStage, default: str = "") -> ServerAdapters:
    named = {f"stage {number}": stage for number, stage in enumerate(stages)}
    return ServerAdapters(AdapterTable(prefix, "bagel", {}), SleepGate(prefix), lambda reachable: named, {default})


def test_an_adapter_that_one_stage_refuses_is_on_none(prefix: str) -> None:
    good, bad = FakeStage(), FakeStage("INVALID_ARGUMENT: InvalidRequest(lora_path): no")
    adapters = orchestrator(prefix, good, bad)
    with pytest.raises(InvalidRequest, match=r"^no$"):
        adapters.answer(AdapterCall("load", "new", "x"), never)
    assert (good.names, adapters.answer(AdapterCall("list"), never)) == ([], AdapterNames(()))


def test_requests_of_every_orchestrator_end_before_their_adapter_is_unloaded(prefix: str) -> None:
    stage = FakeStage()
    one, other = orchestrator(prefix, stage), orchestrator(prefix, stage)
    one.answer(AdapterCall("load", "new", "x"), never)
    unloading = threading.Thread(target=lambda: one.answer(AdapterCall("unload", "new"), never))
    with other.request("new"), other.request(""):
        with pytest.raises(Cancelled):
            one.answer(AdapterCall("unload", "new"), lambda: True)
        assert one.answer(AdapterCall("list"), never) == AdapterNames(("new",))
        unloading.start()
        assert soon(lambda: not other.answer(AdapterCall("list"), never).names)
        with pytest.raises(ModelNotFound), other.request("new"):
            pass
        assert stage.names == ["new"]
    unloading.join()
    assert stage.names == []
    with pytest.raises(ModelNotFound, match="lora_name='new'"):
        one.answer(AdapterCall("unload", "new"), never)


def test_other_adapters_come_and_go_while_one_waits_for_its_requests(prefix: str) -> None:
    stage = FakeStage()
    adapters = orchestrator(prefix, stage)
    adapters.answer(AdapterCall("load", "slow", "x"), never)
    again = threading.Thread(target=lambda: adapters.answer(AdapterCall("load", "slow", "y"), never))
    unloading = threading.Thread(target=lambda: adapters.answer(AdapterCall("unload", "slow"), never))
    with adapters.request("slow"):
        unloading.start()
        assert soon(lambda: not adapters.answer(AdapterCall("list"), never).names)
        adapters.answer(AdapterCall("load", "new", "x"), never)
        again.start()  # of the same name; it comes after the unloading
        assert adapters.answer(AdapterCall("unload", "new"), never) == AdapterNames(())
        assert stage.names == ["slow"]
    unloading.join()
    again.join()
    assert adapters.answer(AdapterCall("list"), never) == AdapterNames(("slow",))


def test_a_dead_stage_is_named_and_the_call_can_be_made_again(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagel_triton.triton.adapters.SILENT_S", 0.1)
    good, dead = FakeStage(), FakeStage()
    adapters = orchestrator(prefix, good, dead)
    adapters.answer(AdapterCall("load", "old", "x"), never)
    dead.dead = True
    for call in (AdapterCall("load", "new", "x"), AdapterCall("unload", "old"), AdapterCall("unload", "old")):
        with pytest.raises(StageUnavailable, match=rf"^stage 1 does not answer, .* '{call.name}': connection refused"):
            adapters.answer(call, never)
        with pytest.raises(ModelNotFound), adapters.request("new"):
            pass
    dead.dead = False
    assert adapters.answer(AdapterCall("unload", "old"), never) == AdapterNames(())
    assert adapters.answer(AdapterCall("load", "new", "x"), never) == AdapterNames(("new",))
    assert good.names == dead.names == ["new"]
    with pytest.raises(ModelNotFound, match="lora_name='old'"):
        adapters.answer(AdapterCall("unload", "old"), never)


def test_requests_that_get_an_adapter_by_default_end_before_it_is_unloaded(prefix: str) -> None:
    stage = FakeStage()
    adapters = orchestrator(prefix, stage, default="usual")
    adapters.answer(AdapterCall("load", "usual", "x"), never)
    for name, unloaded in ((None, False), ("", True)):
        with adapters.request(name):
            if unloaded:
                assert adapters.answer(AdapterCall("unload", "usual"), never) == AdapterNames(())
            else:
                with pytest.raises(Cancelled):
                    adapters.answer(AdapterCall("unload", "usual"), lambda: True)


def test_a_name_of_no_adapter_leaves_no_file(prefix: str) -> None:
    with pytest.raises(ModelNotFound), orchestrator(prefix, FakeStage()).request("nothing"):
        pass
    assert not list(SHM_DIRECTORY.glob(f"{prefix}_adapter_*"))


def test_a_server_that_sleeps_changes_no_adapter(prefix: str) -> None:
    SleepGate(prefix).close(1)
    with pytest.raises(StageUnavailable, match="asleep"):
        orchestrator(prefix, FakeStage()).answer(AdapterCall("load", "new", "x"), never)
