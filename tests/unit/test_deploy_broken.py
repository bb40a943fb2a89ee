"""Deploy files with errors: a clear line for each, with the file's line and the field, and never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError


def errors(folder: Path, text: str | bytes) -> list[str]:
    path = folder / "deploy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        deploy_yaml.resolve(path, "checkpoint", platform=lambda: "cpu")
    return str(caught.value).replace(f"{folder}/deploy.yaml", "").splitlines()


ONE_LINE = [
    # no YAML
    ("", ": is empty; the shortest is `pipeline: bagel`"),
    ("# a comment\n", ": is empty"),
    ("- pipeline", ":1: is a list, not a mapping of fields such as `pipeline: bagel`"),
    ("bagel", ":1: is 'bagel', not a mapping"),
    ("a: [", ":1: column 5, 'a: [': expected the node content"),
    ("pipeline: [bagel\ndtype: auto\n", ":2: column 6, 'dtype: auto': "),
    ("a: 'x", ':1: column 6, "a: \'x": found unexpected end of stream while scanning a quoted scalar'),
    (
        "stages:\n\t- stage_id: 0\n",
        ":2: column 1, '- stage_id: 0': YAML indents by spaces, and this line begins with a",
    ),
    ("stages:\n- stage_id: 0\n  max_waiting: 1\n kv_tokens: 2", ":4: column 2, 'kv_tokens: 2': expected <block end>"),
    ("a: 1\n---\nb: 2", ":2: column 1, '---': but found another document"),
    ("a: *nothing", ":1: column 4, 'a: *nothing': found undefined alias 'nothing'"),
    ("a: !!python/object:os.system x", ":1: column 4, "),
    ("a: &x [*x]", ":1: an alias stands inside of what it refers to"),
    ("a: &a [1]\nb: {<<: *a}", ":1: column 8, 'a: &a [1]': expected a mapping for merging"),
    ("a: \x07", ":1: the character 0x07 is not allowed in YAML"),
    (b"K\xf6ln: 1", ": is not UTF-8 text: byte 1 is 0xf6"),
    ("[" * 2000, ": is nested too deeply"),
    ("request_timeout_s: 2026-99-99", ":1: '2026-99-99': month must be in 1..12"),
    # a field that is not there, twice there, or of another shape
    ("pipelin: bagel", ":1: pipelin is not a known field; did you mean pipeline? allowed: pipeline, base_config, "),
    ("5: 6", ":1: 5 is not a known field; allowed: pipeline, "),
    ("[1]: 2", ":1: (a list or mapping as a key) is not a known field"),
    ("pipeline: bagel\npipeline: bagel_think", ":2: pipeline is there already, in line 1"),
    ("stages: 5", ":1: stages=5 is not allowed; allowed: a list of stages, each with a stage_id"),
    ("stages: [5]", ":1: stages[0]=5 is not allowed; allowed: a mapping of fields"),
    ("stages: [{}]", ":1: stages[0] has no stage_id; 0 is the thinker, 1 the DiT"),
    ("stages: [{stage_id: '0'}]", ":1: stages[0].stage_id='0' is not allowed; allowed: 0 or 1"),
    ("stages: [{stage_id: [0]}]", ":1: stages[0].stage_id=[0] is not allowed"),
    ("stages: [{stage_id: 2}]", ":1: stages[stage_id=2].stage_id=2 is not allowed in pipeline bagel; allowed: 0 to 1"),
    ("stages:\n- stage_id: 0\n- stage_id: 0", ":3: stages[stage_id=0].stage_id=0 is there already, in line 2"),
    ("connectors: [1]", ":1: connectors=[1] is not allowed; allowed: a mapping of names to {name, extra}"),
    ("connectors: {a: 5}", ":1: connectors.a=5 is not allowed; allowed: a mapping of fields"),
    ("connectors: {a: {}}", ":1: connectors.a.name is missing; allowed: auto, shm"),
    (
        "connectors: {net: {nam: shm}}",
        ":1: connectors.net.nam is not a known field; did you mean name? allowed: name, ",
    ),
    ("platforms: {cpu: 5}", ":1: platforms.cpu=5 is not allowed; allowed: a mapping of fields"),
    (
        "base_config: nowhere.yaml",
        ":1: base_config='nowhere.yaml' is no file here and no preset; allowed: a path, bagel",
    ),
    # a value
    ("pipeline: bagle", ":1: pipeline='bagle' is not allowed; allowed: bagel, bagel_think, bagel_single_stage"),
    ("dtype: float16", ":1: dtype='float16' is not allowed; allowed: auto, float32, bfloat16"),
    ("device: gpu", ":1: device='gpu' is not allowed; allowed: auto, cpu, cuda, cuda:N"),
    ("request_timeout_s: .nan", ":1: request_timeout_s=NaN is not allowed; allowed: seconds > 0"),
    (
        "stages: [{stage_id: 0, max_num_seqs: 0}]",
        ":1: stages[stage_id=0].max_num_seqs=0 is not allowed; allowed: an integer from",
    ),
    (
        "stages: [{stage_id: 0, kv_tokens: 1e3}]",
        ":1: stages[stage_id=0].kv_tokens='1e3' is not allowed; allowed: an integer",
    ),
    ("stages: [{stage_id: 0, kv_tokens: 10000000000}]", ":1: stages[stage_id=0].kv_tokens=10000000000 is not allowed"),
    ("stages: [{stage_id: 0, max_num_seqs: true}]", ":1: stages[stage_id=0].max_num_seqs=true is not allowed"),
    (
        "stages: [{stage_id: 0, gpu_memory_utilization: 90%}]",
        ":1: stages[stage_id=0].gpu_memory_utilization='90%' is not allowed",
    ),
    (
        "stages: [{stage_id: 0, devices: '0,1'}]",
        ":1: stages[stage_id=0].devices='0,1' is not allowed: 2 devices for a stage of 1",
    ),
    (
        "stages: [{stage_id: 0, address: here}]",
        ":1: stages[stage_id=0].address='here' is not allowed; allowed: HOST:PORT",
    ),
    (
        "stages: [{stage_id: 0, kv_tokens: 10}]",
        ":1: stages[stage_id=0].kv_tokens=10 is not allowed with block_tokens=16; allowed: from 113, 8 blocks",
    ),
    # the wrong stage
    (
        "stages: [{stage_id: 1, kv_tokens: 5}]",
        ":1: stages[stage_id=1].kv_tokens belongs to the thinker; that is stage 0",
    ),
    (
        "stages: [{stage_id: 0, vae_use_tiling: true}]",
        ":1: stages[stage_id=0].vae_use_tiling belongs to the DiT; that is stage 1",
    ),
    (
        "pipeline: bagel_single_stage\nstages: [{stage_id: 1}]",
        ":2: stages[stage_id=1].stage_id=1 is not allowed in pipeline bagel_single_stage; allowed: 0",
    ),
    (
        "stages: [{stage_id: 0, dtype: float32}, {stage_id: 1, dtype: bfloat16}]",
        ":1: stages[stage_id=1].dtype='bfloat16' is not that of all stages, 'float32'",
    ),
    # connectors
    (
        "stages: [{stage_id: 0, output_connectors: {x: b}}]",
        ":1: stages[stage_id=0].output_connectors.x='b' means nothing",
    ),
    (
        "stages: [{stage_id: 0, input_connectors: {from_stage_0: a}}]\nconnectors: {a: {name: shm}}",
        ":1: stages[stage_id=0].input_connectors.from_stage_0='a' means nothing: KV goes from stage 0 to stage 1 alone",
    ),
    (
        "stages: [{stage_id: 1, input_connectors: {from_stage_7: a}}]\nconnectors: {a: {name: shm}}",
        ":1: stages[stage_id=1].input_connectors.from_stage_7='a' means nothing: KV goes from stage 0 to stage 1 "
        "alone; allowed: from_stage_0",
    ),
    # what is not supported, and what to do instead
    (
        "stages: [{stage_id: 0, cfg_parallel_size: 2}]",
        ":1: stages[stage_id=0].cfg_parallel_size=2 is not supported: the thinker's ranks share its heads",
    ),
    (
        "stages: [{stage_id: 0, parallel_config: {use_hsdp: true}}]",
        ":1: stages[stage_id=0].parallel_config.use_hsdp=true is not supported: the thinker's ranks share its heads",
    ),
    (
        "stages: [{stage_id: 0, quantization: gptq}]",
        ":1: stages[stage_id=0].quantization='gptq' is not allowed; allowed: auto, int8, int8_w8a8",
    ),
    (
        "stages: [{stage_id: 0, lora_modules: x}]",
        ":1: stages[stage_id=0].lora_modules='x' is not allowed; allowed: NAME=FOLDER",
    ),
    (
        "lora_modules: [{name: a, path: x}, a=y]",
        ":1: lora_modules names the adapter 'a' twice; allowed: once",
    ),
    (
        "lora_path: x\nstages: [{stage_id: 1, lora_path: y}]",
        ":2: stages[stage_id=1].lora_path='y' is not that of all",
    ),
    (
        "stages: [{stage_id: 0, enable_cpu_offload: true}]",
        ":1: stages[stage_id=0].enable_cpu_offload=true is not supported: every stage nee",
    ),
    (
        "stages: [{stage_id: 0, block_size: 16}]",
        ":1: stages[stage_id=0].block_size=16 is not supported: set block_tokens",
    ),
    (
        "stages: [{stage_id: 0, worker_cls: my.Worker}]",
        ":1: stages[stage_id=0].worker_cls='my.Worker' is not allowed; allowed: n",
    ),
    ("async_chunk: true", ":1: async_chunk=true is not supported: a stage gets its input whole; allowed: false"),
    ("window_size: 3", ":1: window_size=3 is not supported: a stage gets its input whole, and max_waiting bounds its"),
    ("edges: [{from: 1, to: 1}]", ":1: edges[0].from=1 is not supported: the only edge is from stage 0 to stage 1"),
    # the older form
    ("stage_args: [{stage_id: 0}]\nstages: []", ":1: stage_args and stages (:2) are the same in two forms; keep one"),
    (
        "stage_args: [{stage_id: 0, engine_args: 5}]",
        ":1: stage_args[stage_id=0].engine_args is not a mapping of fields",
    ),
    (
        "stage_args: [{stage_id: 0, runtime: {foo: 1}}]",
        ":1: stage_args[stage_id=0].runtime.foo is not a known field; allowed: d",
    ),
    ("runtime: {edges: [{from: 1, to: 1}]}", ":1: runtime.edges[0].from=1 is not supported: the only edge is from"),
    # defaults of requests
    (
        "stages: [{stage_id: 0, default_sampling_params: {temperature: 5}}]",
        ":1: stages[stage_id=0].default_sampling_params.temperature=5 is not allowed; allowed: a number from 0 to 2",
    ),
    (
        "stages: [{stage_id: 0, default_sampling_params: {detokenize: false}}]",
        ":1: stages[stage_id=0].default_sampling_params.detokenize=false is not supported: an answer is always text;",
    ),
    (
        "stages: [{stage_id: 1, default_sampling_params: {extra_args: {cfg_intervall: [0, 1]}}}]",
        ":1: stages[stage_id=1].default_sampling_params.extra_args.cfg_intervall is not a known field; did you mean c",
    ),
]


@pytest.mark.parametrize(("text", "beginning"), ONE_LINE, ids=[repr(text)[:60] for text, _ in ONE_LINE])
def test_one_error_is_one_line(tmp_path: Path, text: str | bytes, beginning: str) -> None:
    (line,) = errors(tmp_path, text)
    assert line.startswith(beginning)


def test_all_errors_come_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = """\
pipeline: bagel
stages:
  - stage_id: 0
    kv_tokens: 0
    max_num_seq: 3
    default_sampling_params: {top_p: 2, seeed: 1}
  - stage_id: 1
    parallel_config: {tensor_parallel_size: 0, vae_patch_parallel_size: 0}
    input_connectors: {from_stage_0: net}
connectors:
  kv: {name: Carrier}
dtype: float8
window: 3
"""
    found = errors(tmp_path, text)
    named = [
        (4, "stages[stage_id=0].kv_tokens"),
        (5, "stages[stage_id=0].max_num_seq"),
        (6, "stages[stage_id=0].default_sampling_params.top_p"),
        (6, "stages[stage_id=0].default_sampling_params.seeed"),
        (8, "stages[stage_id=1].parallel_config.tensor_parallel_size"),
        (8, "stages[stage_id=1].parallel_config.vae_patch_parallel_size"),
        (9, "stages[stage_id=1].input_connectors.from_stage_0"),
        (11, "connectors.kv.name"),
        (12, "dtype"),
        (13, "window"),
    ]
    assert len(found) == len(named)
    for (line, field), message in zip(named, found, strict=True):
        assert message.startswith(f":{line}: {field}")


def test_a_file_of_aliases_does_not_grow_without_bound(tmp_path: Path) -> None:
    tens = "\n".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]" for n in range(1, 9))
    (line,) = errors(tmp_path, f"b0: &b0 [{', '.join('x' * 10)}]\n{tens}")
    assert "more than 100000 values" in line


@pytest.mark.parametrize(("make", "message"), [(None, "No such file"), (Path.mkdir, "Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "absent.yaml"
    if callable(make):
        make(path)
    with pytest.raises(ConfigError, match=message):
        deploy_yaml.resolve(path, "checkpoint")
