"""Every command, flag, script, field and variable of vLLM-Omni's BAGEL guides: it works here, or says why not."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError, DeployConfig
from bagel_triton.deploy.yaml import Platform
from bagel_triton.serving import flags, rendezvous, serve
from tests.unit.test_serving_flags import Parser, Refused

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "tests" / "data" / "seeds"
ROWS: list[dict[str, Any]] = yaml.safe_load((SEEDS / "rows.yaml").read_text())


def rows(kind: str) -> Any:
    found = [row for row in ROWS if kind in row]
    return pytest.mark.parametrize("row", found, ids=[row["say"] for row in found])


def values(config: DeployConfig) -> dict[str, Any]:
    """The configuration's values by their paths."""
    flat: dict[str, Any] = {}
    for name, value in msgspec.to_builtins(config, str_keys=True).items():
        sections = value.items() if isinstance(value, dict) else ()
        flat |= {name: value} | {f"{name}.{key}": entry for key, entry in sections}
    return flat


def check(row: dict[str, Any], path: Path | None, given: deploy_yaml.Flags = deploy_yaml.NO_FLAGS) -> None:
    """Compare what the file and the flags mean with the row."""
    for platform in ("cpu", "cuda"):
        expected = row.get("on_cuda", row.get("means")) if platform == "cuda" else row.get("means")
        if platform == "cuda" and "on_cuda" not in row:
            continue
        found = values(resolved(path, given, platform))  # type: ignore[arg-type]
        assert {name: found[name] for name in expected} == expected
        if not expected:
            assert found == values(DeployConfig(""))


def resolved(path: Path | None, given: deploy_yaml.Flags, platform: Platform) -> DeployConfig:
    return deploy_yaml.resolve(path, "", given, lambda: platform).config


@rows("serve")
def test_a_command_that_serves(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in row.get("variables", {}).items():
        monkeypatch.setenv(name, value)
    parser = Parser(allow_abbrev=False)
    serve.add_arguments(parser)
    words = shlex.split(row["serve"].replace("FILES", str(SEEDS / "deploy")))
    if "refused" in row:
        with pytest.raises(Refused) as caught:
            parser.parse_args(words)
        assert row["refused"] in str(caught.value)
        return
    args = parser.parse_args(words)
    options = serve.options(args)
    assert rendezvous.master_of(args.omni_master_address, args.omni_master_port, args.stage_id) == (
        ("127.0.0.1", 8091) if options.omni_master_address else None
    )
    check(row, flags.deploy_file(args.deploy_config), flags.flags_of(args))


@rows("config")
def test_a_deploy_file(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(row["config"])
    if "refused" not in row:
        check(row, path)
        return
    with pytest.raises(ConfigError) as caught:
        resolved(path, deploy_yaml.NO_FLAGS, "cpu")
    assert any(row["refused"] in line for line in str(caught.value).splitlines())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of the scripts, whose ``bagel-triton`` notes its arguments, and ends when all have."""
    for folder in ("build", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for script in (ROOT / "build").glob("run_server*.sh"):
        shutil.copy(script, tmp_path / "build")
    (tmp_path / "build" / "setup_env.sh").write_text("#!/bin/sh\n")
    ran = tmp_path / "ran"
    wait = f"while [ $(wc -l < {ran}) -lt $SERVERS ]; do sleep 0.05; done"
    (tmp_path / ".venv/bin/bagel-triton").write_text(f'#!/bin/sh\necho "$*" >> {ran}\n{wait}\n')
    for file in ("build/setup_env.sh", ".venv/bin/bagel-triton"):
        (tmp_path / file).chmod(0o755)
    return tmp_path


@rows("script")
def test_a_script(row: dict[str, Any], tree: Path) -> None:
    names = ("MODEL", "PORT", "DEPLOY_CONFIG", "MASTER_ADDRESS", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"SERVERS": str(len(row["runs"])), **row.get("variables", {})}
    words = shlex.split(row["script"])
    subprocess.run(["bash", tree / "build" / words[0], *words[1:]], env=environment, check=True, timeout=60)
    ran = (tree / "ran").read_text().splitlines()
    assert sorted(ran) == sorted(row["runs"])
    for line in ran:
        parser = Parser(allow_abbrev=False)
        serve.add_arguments(parser)
        resolved(None, flags.flags_of(parser.parse_args(shlex.split(line)[1:])), "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stage 2", "--stage=2 is not allowed; allowed: 0, 1, all"),
        ("--stage", "--stage needs a value"),
        ("--stages 1", "--stages is not a known option"),
    ],
)
def test_the_stages_script_says_what_is_wrong(tree: Path, options: str, message: str) -> None:
    command = ["bash", tree / "build" / "run_server_stage_cli.sh", *options.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"run_server_stage_cli.sh: error: {message} (see --help)\n"
    assert not (tree / "ran").exists()


def client_module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "client"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@rows("end2end")
def test_a_command_of_the_offline_script(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = client_module("end2end", monkeypatch)
    words = shlex.split(row["end2end"].replace("FILES", str(SEEDS / "deploy")))
    if "refused" in row:
        with pytest.raises(SystemExit):
            script.arguments(words)
        assert row["refused"] in capsys.readouterr().err
        return
    args = script.arguments(words)
    resolved(flags.deploy_file(args.deploy_config), flags.flags_of(args), "cpu")


@rows("client")
def test_a_command_of_the_client(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    client_module("openai_chat_client", monkeypatch).arguments(shlex.split(row["client"]))


def test_every_command_is_understood_as_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = {
        "end2end.py": client_module("end2end", monkeypatch).arguments,
        "openai_chat_client.py": client_module("openai_chat_client", monkeypatch).arguments,
    }
    tried = [row.get("script", "") for row in ROWS]
    for line in (SEEDS / "commands.txt").read_text().splitlines()[1:]:
        words = shlex.split(line.replace("<ORCHESTRATOR_IP>", "127.0.0.1"))
        words = words[next(at for at, word in enumerate(words) if "=" not in word) :]
        program, rest = words[0], words[1:]
        if program == "bash":
            assert " ".join(rest) in tried, line
        elif program.startswith("python"):
            scripts[Path(rest[0]).name](rest[1:])
        elif program == "vllm":
            parser = Parser(allow_abbrev=False)
            serve.add_arguments(parser)
            serve.options(parser.parse_args(rest[1:]))
        else:
            assert program == "mooncake_master", line  # Mooncake's own program


def test_the_documentation_has_every_row() -> None:
    text = (ROOT / "docs" / "vllm-omni.md").read_text()
    assert [row["say"] for row in ROWS if row["say"] not in text] == []
