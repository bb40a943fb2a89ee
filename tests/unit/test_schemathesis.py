"""The API against its own description: schemathesis, in an environment of its own, before the real planner.

It is installed on the first run, into .cache/clients. What a schema says is valid must be served, unless
:data:`BEYOND_A_SCHEMA` knows why not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from proxy_fake import SETTINGS, live_proxy
from test_client_libraries import CACHE, installed
from test_request_shapes import PlanningClient

from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.weights.checkpoint import inspect

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
# Refusals of bodies that are valid by the schema, by their messages, and why the schema cannot say it.
BEYOND_A_SCHEMA = {
    r"allowed: a text that is not empty": "an image needs words somewhere in the conversation",
    r"data:|base64|cannot be fetched|not an image|damaged|remote image": "what a URL leads to must be an image",
    r"its (height|width) is ": "a size is a text, and both its sides are multiples of 16",
    r"(height|width)=.* allowed: a multiple of 16": "the longest side is the checkpoint's",
    r"allowed: .* in a message of role": "which parts a message may hold depends on its role",
    r"are both given|contradict each other": "a field and its other name",
    r"do_sample=.* beside ((text_)?temperature|top_p)=": "a temperature that means the contrary",
    r"aspect_ratio=.* allowed: (that of|one whose) ": "sides that have another ratio",
    r"with stream=true$": "a stream carries its images",
    r"cfg_interval=.* allowed: \[low, high\]": "the first of two numbers is the smaller one",
    r"tools\[0\]\.action=": "an edit needs an image, and a generation has none",
    r"token ids from 0 to": "the vocabulary is the checkpoint's",
    r"at most \d+ images": "images are counted over all messages",
}
HOOKS = """
import json, os, re, schemathesis
KNOWN = json.loads(os.environ["KNOWN"])

@schemathesis.check
def valid_data_is_served(ctx, response, case):
    if response.status_code == 400 and case.meta is not None and not case.meta.generation.mode.is_negative:
        message = response.json()["error"]["message"]
        assert any(re.search(known, message) for known in KNOWN), message
"""


def test_what_the_description_says_is_so(checkpoint_dir: Path, tmp_path: Path) -> None:
    folder = (CACHE / "schemathesis").resolve()
    pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "-q", "schemathesis"]
    installed([sys.executable, "-m", "venv", "venv"], pip, into=folder)
    (tmp_path / "hooks.py").write_text(HOOKS)
    environment = {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path), "KNOWN": json.dumps([*BEYOND_A_SCHEMA])}
    client = PlanningClient(RequestPlanner(inspect(checkpoint_dir), Tokenizer(checkpoint_dir)))
    with live_proxy(client, settings=dataclasses.replace(SETTINGS, max_body_bytes=2**26, fetch_remote=False)) as url:
        command = [folder / "venv/bin/schemathesis", "run", f"{url}/openapi.json", "--seed", "1", "-n", "25"]
        command += ["--exclude-checks", "positive_data_acceptance", "--suppress-health-check", "all", "--no-color"]
        command += ["--generation-database", "none"]
        found = subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
        )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
