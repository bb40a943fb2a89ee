"""The command line: what is wrong is one line on stderr and a non-zero exit status."""

import argparse
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import bagel_triton
from bagel_triton.kv.connectors import mooncake
from bagel_triton.serving import cli, tritonserver
from tests.support.connectors import require_mooncake

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one error line of a command that must fail with status 1."""
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("bagel-triton: error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve"], "CHECKPOINT"),
        (["serve", "x", "--port", "many"], "--port='many' is not allowed; allowed: an integer"),
        (["serve", "--nonsense"], "--nonsense is not an option"),
        (["serve", "x", "--prot=9"], "--prot is not an option; did you mean --port?"),
        (["completion", "bsh"], "shell='bsh' is not allowed; did you mean bash? allowed: bash, zsh, tcsh"),
        (["serve", "x", "--nonsense"], "see bagel-triton serve --help"),
        (["serve", "x", "--mod", "y"], "--mod"),
        (["serve", "x", "--ring-degree", "2"], "it is not built; several ranks share"),
        (["serve", "x", "--quantization", "gptq"], "allowed: auto, int8"),
        (["sevre"], "COMMAND='sevre' is not allowed; did you mean serve? allowed: serve, proxy"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("bagel-triton: error: ")
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: bagel-triton {command}" in capsys.readouterr().out


def test_a_reader_that_has_enough_ends_it_without_a_word():
    """As `head` does."""
    closed, output = os.pipe()
    os.close(closed)
    command = [sys.executable, "-m", "bagel_triton.serving.cli", "memory", str(CHECKPOINT)]
    run = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    os.close(output)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")


def test_output_that_cannot_be_written_is_an_error_of_one_line():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "bagel_triton", "memory", str(CHECKPOINT), "--device", "cpu"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    error = "bagel-triton: error: the output cannot be written: No space left on device\n"
    assert (run.returncode, run.stderr) == (1, error)


def test_a_closed_output_is_no_error():
    command = [sys.executable, "-m", "bagel_triton", "version"]
    run = subprocess.run(["bash", "-c", '"$@" >&-', "bash", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_files_are_utf8_and_any_text_is_printed_in_any_locale(tmp_path: Path):
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text('stages: [{stage_id: 1, default_sampling_params: {negative_prompt: "K\u00f6ln"}}]\n', "utf-8")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "bagel_triton", "config", str(deploy)]
    run = subprocess.run(command, env=ascii_only, capture_output=True, text=True, check=True)
    assert '"K\\xf6ln"' in run.stdout


@pytest.mark.parametrize("command", [["-V"], ["--version"], ["version"]])
def test_the_version(command: list[str]):
    run = subprocess.run([sys.executable, "-m", "bagel_triton", *command], capture_output=True, text=True, check=True)
    assert run.stdout == f"bagel-triton {bagel_triton.__version__}\n"


def test_a_shell_completes_commands_and_their_options():
    script = subprocess.run(
        [sys.executable, "-m", "bagel_triton", "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout

    def completed(*words: str) -> list[str]:
        typed = f"COMP_WORDS=(bagel-triton {' '.join(words)}); COMP_CWORD={len(words)}"
        bash = f"{script}\n{typed}\n_shtab_bagel_triton; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        return subprocess.run(["bash", "-c", bash], capture_output=True, text=True, check=True).stdout.split()

    assert completed("tiny") == ["tiny-checkpoint"]
    assert completed("serve", "--dep") == ["--deploy-config"]
    assert str(CHECKPOINT) in completed("serve", str(CHECKPOINT)[:-2])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--height", "60"], "--height=60 is not allowed; allowed: a multiple of 16"),
        (["--steps", "0"], "--steps=0 is not allowed"),
        (["--output", "cat.jpg"], "--output=cat.jpg is not allowed; the sheet is a PNG file"),
        (["--output", "/nowhere/cat.png"], "/nowhere is not a folder"),
    ],
)
def test_the_demo_refuses_an_image_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], named: str
):
    monkeypatch.setattr("bagel_triton.serving.demo.running", lambda *args, **options: pytest.fail("a server starts"))
    assert named in error_of(capsys, "demo", str(CHECKPOINT), *options)


def test_a_preset_is_named_without_its_path(capsys: pytest.CaptureFixture[str]):
    arguments = ["memory", str(CHECKPOINT), "--device", "cpu", "--deploy-config", "bagel_single_stage"]
    assert cli.main(arguments) == 0
    assert "pipeline bagel_single_stage on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--stage-id 0 -oma 127.0.0.1 --headless", "stage 0 serves the OpenAI API; remove --headless"),
        ("--stage-id 5 -oma 127.0.0.1 --max-num-seqs 3", "--stage-id=5 "),
        ("-oma 127.0.0.1", "--omni-master-address=127.0.0.1 needs --stage-id"),
        (
            "--stage-id 0 -oma 127.0.0.1 --deploy-config bagel_two_hosts",
            "registers at --omni-master-address: remove one",
        ),
        ("--stage-id 0 -oma 127.0.0.1 --deploy-config bagel_single_stage", "none, it is one process"),
        (
            '--default-sampling-params {"height":99999}',
            "default_sampling_params.height=99999 is not allowed; allowed: a m",
        ),
        ("--deploy-config bagle", "bagle is no file and no preset; did you mean bagel? presets: bagel, bagel_think"),
        ("--stage-id 2", "--stage-id=2 is not allowed in pipeline bagel; allowed: 0, the thinker, and 1, the DiT"),
        ("--deploy-config absent.yaml", "absent.yaml is no file and no preset; presets: bagel, bagel_think"),
    ],
)
def test_stages_that_cannot_be_served_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], options: str, named: str
):
    assert named in error_of(capsys, "serve", str(CHECKPOINT), "--port", "0", *options.split())


def test_each_error_of_a_deploy_file_is_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "deploy.yaml").write_text("stages:\n- stage_id: 0\n  kv_tokens: 0\nfoo: 1\n")
    for command in (
        ["serve", str(CHECKPOINT), "--deploy-config"],
        ["memory", str(CHECKPOINT), "--deploy-config"],
        ["config"],
    ):
        assert cli.main([*command, str(tmp_path / "deploy.yaml")]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition("deploy.yaml:")[2][:1] for line in lines] == ["3", "4"]
        assert all(line.startswith("bagel-triton: error: ") for line in lines)


def test_the_configuration_is_shown_with_the_origin_of_each_value(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text("base_config: bagel_think\nstages: [{stage_id: 1, max_num_seqs: 3}]")
    assert cli.main(["config", str(deploy), "--kv-tokens", "200", "--device", "cpu"]) == 0
    found = dict(
        line.split(" # ") for line in capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines() if "#" in line
    )
    origins = {name.strip(): origin for name, origin in found.items()}
    assert origins["max_num_seqs: 3"] == "deploy.yaml:2"
    assert origins["kv_tokens: 200"] == "--kv-tokens"
    assert origins['device: "cpu"'] == "--device"
    assert origins['pipeline: "bagel_think"'].endswith("build/deploy/bagel_think.yaml:3")
    assert origins["encoder_cache_mb: 256"] == "default"


def test_the_configuration_of_a_stage_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    for options in (("--stage-id", "2"), ("bagel_single_stage", "--stage-id", "0", "--kv-tokens", "200")):
        assert "is not allowed in pipeline bagel" in error_of(capsys, "config", *options)


def test_a_missing_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert str(tmp_path / "absent") in error_of(capsys, "serve", str(tmp_path / "absent"), "--port", "0")


@pytest.mark.parametrize(
    ("connector", "reason"),
    [
        ("{name: cuda_ipc}", "connector='cuda_ipc' needs stages on CUDA; they are on cpu"),
        ("{name: mooncake_store}", "connector='mooncake_store' needs extra.master, the HOST:PORT of a mooncake_master"),
        ("{name: mooncake_store, extra: {master: '127.0.0.1:9'}}", "no mooncake_master answers at 127.0.0.1:9"),
        ("{name: mooncake, extra: {protocol: rdma}}", "protocol='rdma' needs an RDMA device"),
    ],
)
def test_a_connector_that_cannot_be_used_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, connector: str, reason: str
):
    require_mooncake()
    monkeypatch.setattr(mooncake, "RDMA_DEVICES", tmp_path / "infiniband")
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text(f"connectors: {{one: {connector}}}")
    options = ("--port", "0", "--device", "cpu", "--deploy-config", str(deploy))
    assert reason in error_of(capsys, "serve", str(CHECKPOINT), *options)


def test_a_malformed_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    (checkpoint / "ae.safetensors").write_bytes(b"not tensors")
    assert "ae.safetensors" in error_of(capsys, "serve", str(checkpoint), "--port", "0")


@pytest.mark.parametrize(
    ("file", "contents", "named"),
    [
        ("tokenizer.json", '{"version": "1.0", "added_', "cannot be loaded: "),
        ("vocab.json", '{"!": 0, "', "cannot be loaded: "),
        ("tokenizer_config.json", '{"tokenizer_class": "Qwen2Tokenizer"}', "the tokenizer has no special token <|im_"),
    ],
)
def test_a_broken_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str, contents: str, named: str):
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    (checkpoint / file).write_text(contents)
    assert named in error_of(capsys, "serve", str(checkpoint), "--port", "0")


def test_a_busy_port(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in error_of(capsys, "serve", str(CHECKPOINT), "--port", port)


def test_a_busy_port_of_triton(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = error_of(capsys, "serve", str(CHECKPOINT), "--port", "0", "--triton-grpc-port", port)
    assert f"port {port}" in error
    assert "--triton-grpc-port" in error


def test_a_missing_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tritonserver, "_directories", lambda: iter([tmp_path]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert tritonserver.NAME in error_of(capsys, "serve", str(CHECKPOINT), "--port", "0")
    assert list(tmp_path.glob("bagel_triton_*")) == []


@pytest.mark.parametrize("kind", ["absent", "a file"])
def test_a_folder_for_temporary_files_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
):
    folder = tmp_path / kind
    if kind == "a file":
        folder.touch()
    monkeypatch.setenv("TMPDIR", str(folder))
    assert f"TMPDIR={folder} cannot be used" in error_of(capsys, "serve", str(CHECKPOINT), "--port", "0")


def test_a_folder_for_temporary_files_without_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * 1024, hard))  # as on a disk with no more left
    try:
        error = error_of(capsys, "serve", str(CHECKPOINT), "--port", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"TMPDIR={tmp_path} cannot be used" in error
    assert "4 MiB" in error
    assert list(tmp_path.glob("bagel_triton_*")) == []


def test_an_unknown_device(capsys: pytest.CaptureFixture[str]):
    assert "device='abacus'" in error_of(capsys, "serve", str(CHECKPOINT), "--port", "0", "--device", "abacus")


def test_an_unknown_dtype(capsys: pytest.CaptureFixture[str]):
    assert "dtype='float8'" in error_of(capsys, "serve", str(CHECKPOINT), "--port", "0", "--dtype", "float8")


def test_a_missing_model_repository(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    absent = str(tmp_path / "absent")
    assert absent in error_of(capsys, "serve", str(CHECKPOINT), "--port", "0", "--model-repository", absent)


def test_model_names_begin_with_the_folders_and_have_no_duplicates():
    from bagel_triton.serving.serve import ALIASES, add_arguments, options

    def names(checkpoint: str, *given: str) -> tuple[str, ...]:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        named = ["--served-model-name", *given] if given else []
        return options(parser.parse_args([checkpoint, *named])).model_names(Path(checkpoint))

    assert names("/models/mine") == ("mine", *ALIASES)
    assert names("/models/mine", "other") == ("other", *ALIASES)
    assert names("/models/mine", "first", "second", "first") == ("first", "second", *ALIASES)
    cached = "/cache/models--ByteDance-Seed--BAGEL-7B-MoT/snapshots/c1a2b3"
    assert names(cached) == names("/models/BAGEL-7B-MoT")
    assert names("/models/BAGEL-7B-MoT") == ("BAGEL-7B-MoT", "bagel", "ByteDance-Seed/BAGEL-7B-MoT")
    assert names("/cache/models--me--mine/snapshots/c1a2b3") == ("mine", *ALIASES, "me/mine")
