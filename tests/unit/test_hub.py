"""A checkpoint by its name: the cache, a hub on loopback, and what is said where neither has it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from bagel_triton.model.config import CheckpointError
from bagel_triton.serving import cli
from bagel_triton.weights import hub as names
from bagel_triton.weights.checkpoint import inspect
from bagel_triton.weights.folder import check_folder
from bagel_triton.weights.hub import checkpoint_name, find_checkpoint, repository_name
from tests.support.hub_server import COMMITS, NAME, Hub
from tests.support.offline_script import OfflineScript

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
WEIGHTS, INDEX = "ema.safetensors", "model.safetensors.index.json"
UNNEEDED = {"README.md": b"# tiny", "pytorch_model.bin": b"\0" * 64, "model.safetensors": b"\0" * 64}
NEEDED = {path.name for path in CHECKPOINT.iterdir()} - {"generation_config.json"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny checkpoint, which this process and those it starts use, with an empty cache."""
    with Hub.of(CHECKPOINT, UNNEEDED) as running:
        use(monkeypatch, tmp_path, running.url)
        yield running


def use(monkeypatch: pytest.MonkeyPatch, home: Path, endpoint: str, offline: bool = False) -> None:
    """Set huggingface_hub's variables, also for this process, which may have read them already."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(names, "_download_apart", names.download)  # tests of its process take it back


def refusal(given: str | Path, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(given, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_downloaded_once_and_only_what_is_needed(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    folder = find_checkpoint(NAME)
    check_folder(folder)
    assert inspect(folder) == inspect(CHECKPOINT)
    assert {path.name for path in folder.iterdir()} == NEEDED
    assert f"downloading {NAME} from {hub.url} to " in capfd.readouterr().err
    hub.requests.clear()
    assert find_checkpoint(NAME) == folder
    assert hub.requests == []
    assert (checkpoint_name(folder), repository_name(folder)) == ("tiny-bagel", NAME)


def test_a_revision_is_another_snapshot(hub: Hub) -> None:
    assert find_checkpoint(NAME, "v1").name == COMMITS["v1"]
    assert find_checkpoint(NAME).name == COMMITS["main"]
    hub.requests.clear()
    assert find_checkpoint(NAME, "v1").name == find_checkpoint(NAME, COMMITS["v1"]).name == COMMITS["v1"]
    repository = find_checkpoint(NAME).parents[1]
    assert find_checkpoint(repository, "v1").name == COMMITS["v1"]
    assert hub.requests == []
    assert refusal(NAME, "v9") == f"checkpoint {NAME} has no revision v9 at {hub.url}"
    assert "revision=v9: " in refusal(repository, "v9")
    assert "is a folder, which has no such revision" in refusal(CHECKPOINT, "v1")
    assert "revision='../../x' is not allowed" in refusal(NAME, "../../x")


def test_shards_are_those_of_the_index(hub: Hub) -> None:
    hub.files["ema-1.safetensors"] = hub.files.pop(WEIGHTS)
    hub.files[INDEX] = json.dumps({"weight_map": {"a": "ema-1.safetensors"}}).encode()
    folder = find_checkpoint(NAME)
    assert {path.name for path in folder.iterdir()} == NEEDED - {WEIGHTS} | {"ema-1.safetensors"}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("ema-2.safetensors", f"repository {NAME}: {INDEX} names ema-2.safetensors, which is not there"),
        ("../../x.safetensors", f"{INDEX} names the file '../../x.safetensors'; allowed: a .safetensors file beside"),
    ],
)
def test_an_index_that_names_what_is_not_there(hub: Hub, file: str, said: str) -> None:
    del hub.files[WEIGHTS]
    hub.files[INDEX] = json.dumps({"weight_map": {"a": file}}).encode()
    assert said in refusal(NAME)


def test_a_repository_of_another_model_is_refused_before_anything_is_downloaded(hub: Hub) -> None:
    del hub.files["llm_config.json"], hub.files["ae.safetensors"]
    message = f"repository {NAME} is no checkpoint of BAGEL; missing: llm_config.json, ae.safetensors"
    assert refusal(NAME) == message
    assert hub.downloaded() == []


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ((404, "RepoNotFound", b""), r"checkpoint {name} is neither a folder here nor a repository at {url}; .*"),
        ((401, "", b""), r"checkpoint {name} is neither a folder here nor a repository at {url}; .* needs HF_TOKEN"),
        ((403, "GatedRepo", b""), r"checkpoint {name} is gated: accept its terms at {url}/{name}, and set HF_TOKEN"),
        ((503, "", b""), r"checkpoint {name} is not in the .* cache .*, and {url} answered with an error: .*503.*"),
        ((200, "", b"<html>"), r"checkpoint {name} is not in the .* cache .*, and {url} cannot be reached: .*"),
    ],
)
def test_a_hub_that_refuses_is_one_line(hub: Hub, failure: tuple[int, str, bytes], said: str) -> None:
    hub.failure = failure
    assert re.fullmatch(said.format(name=NAME, url=re.escape(hub.url)), refusal(NAME))


def test_without_a_network_the_error_names_what_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path, "http://127.0.0.1:9")
    message = refusal(NAME)
    assert message.startswith(f"checkpoint {NAME} is not in the Hugging Face cache {tmp_path / 'hub'}, and http://")
    assert message.endswith("; without a network give a folder")


def test_without_a_network_an_incomplete_cache_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (find_checkpoint(NAME) / WEIGHTS).unlink()
    use(monkeypatch, tmp_path, "http://127.0.0.1:9")
    lacks = f"is not complete in the Hugging Face cache {tmp_path / 'hub'}, which misses {WEIGHTS}"
    assert refusal(NAME).startswith(f"checkpoint {NAME} {lacks}")


def test_the_progress_bar_counts_bytes(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # shown where there is no terminal too
    find_checkpoint(NAME)
    *_, last = capfd.readouterr().err.strip().split("\r")
    assert re.fullmatch(r"downloading: 100%\|.*\| +7\.\d+MB / +7\.\d+MB.*", last.strip())


def test_offline_only_the_cache_is_looked_at(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path, hub.url, offline=True)
    absent = f"checkpoint {NAME} is not in the Hugging Face cache {tmp_path / 'hub'}, and HF_HUB_OFFLINE is set"
    assert refusal(NAME).startswith(absent)
    assert hub.requests == []
    use(monkeypatch, tmp_path, hub.url)
    folder = find_checkpoint(NAME)
    use(monkeypatch, tmp_path, hub.url, offline=True)
    assert find_checkpoint(NAME) == folder
    (folder / WEIGHTS).unlink()
    assert f"which misses {WEIGHTS}" in refusal(NAME)


def test_a_full_disk_is_noticed_before_the_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=1_000_000))
    message = f"checkpoint {NAME}: no space in the Hugging Face cache {tmp_path / 'hub'}: it needs "
    said = refusal(NAME)
    assert said.startswith(message)
    assert said.endswith("7.5 MB, and 1.0 MB are free; free some, or set HF_HUB_CACHE")
    assert WEIGHTS not in hub.downloaded()


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").write_text("a file")
    assert f"the Hugging Face cache {tmp_path / 'hub'} cannot be written: " in refusal(NAME)


def test_a_connection_that_breaks_is_taken_up_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what has not filled a chunk, 10 MB, is lost
    hub.broken[WEIGHTS] = 1
    folder = find_checkpoint(NAME)
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(WEIGHTS)]
    assert len(ranges) == 2
    assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) > len(hub.files[WEIGHTS]) // 2 - 1024


def test_an_interrupted_download_ends_at_once_and_keeps_what_is_complete(hub: Hub, tmp_path: Path) -> None:
    hub.stalled.add(WEIGHTS)
    command = [sys.executable, "-m", "bagel_triton", "memory", NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert hub.reached_half.wait(60)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)  # the stalled file never ends
    assert process.returncode == 128 + signal.SIGINT
    assert not [*tmp_path.rglob("*.incomplete")]
    hub.stalled.clear()
    complete = {path.name for path in tmp_path.glob("hub/models--*/snapshots/*/*")}
    hub.requests.clear()
    check_folder(find_checkpoint(NAME))
    assert WEIGHTS in hub.downloaded()
    assert not complete & set(hub.downloaded())


def test_every_command_takes_a_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failure = (404, "RepoNotFound", b"")
    said = f"checkpoint {NAME} is neither a folder here nor a repository at {hub.url}"
    for command in ("serve", "demo", "memory"):
        assert cli.main([command, NAME, "--revision", "v1"]) == 1
        assert said in capsys.readouterr().err
    script = OfflineScript(tmp_path, monkeypatch)
    assert script("--prompts", "x", "--revision", "v1", model=NAME) == 1
    assert said in capsys.readouterr().err
