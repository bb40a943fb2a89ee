"""Client libraries other than OpenAI's, each in an environment of its own, before a Triton that plays a script.

They are installed on the first run, into .cache/clients; a library that cannot be installed is skipped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from proxy_fake import ONE_ANSWER, SCRIPT, FakeClient, live_proxy

from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.triton.client import StageResponse

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
CACHE = Path(".cache/clients")
PYTHON_PACKAGES = ("litellm", "langchain-openai")
NODE_PACKAGES = ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible")


class EitherClient(FakeClient):
    """Answers a request for a text with a text, and one for an image with an image."""

    async def generate(
        self, request: GenerationRequest, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        self.script = ONE_ANSWER if request.modality == "text" else SCRIPT
        async for response in super().generate(request, request_id, headers):
            yield response


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_proxy(EitherClient()) as address:
        yield f"{address}/v1"


def installed(*commands: list[str], into: Path) -> None:
    done = into / "installed"
    if done.exists():
        return
    into.mkdir(parents=True, exist_ok=True)
    for command in commands:
        found = subprocess.run(command, cwd=into, capture_output=True, text=True, timeout=800, check=False)
        if found.returncode != 0:
            pytest.skip(f"{' '.join(command[:4])}: {found.stderr[-300:]}")
    done.touch()


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has the libraries."""
    folder = (CACHE / "python").resolve()
    pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "-q", *PYTHON_PACKAGES]
    installed([sys.executable, "-m", "venv", "venv"], pip, into=folder)
    return str(folder / "venv/bin/python")


@pytest.fixture(scope="module")
def node() -> Path:
    """A folder whose scripts find the libraries."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = (CACHE / "node").resolve()
    installed(["npm", "install", "--no-audit", "--no-fund", *NODE_PACKAGES], into=folder)
    return folder


def run(command: list[str], **options: Any) -> Any:
    """The JSON that a script prints last."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LITELLM = """
import json, sys, litellm
to = {"model": "openai/bagel", "api_base": sys.argv[1], "api_key": "x"}
ask = {"messages": [{"role": "user", "content": "A cat"}], **to}
found = {"text": litellm.completion(**ask).choices[0].message.content}
chunks = litellm.completion(**ask, stream=True)
found["streamed"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
drawn = litellm.completion(**ask, modalities=["image"])
found["images"] = [i["image_url"]["url"][:22] for i in drawn.choices[0].message.images]
chunks = litellm.completion(**ask, modalities=["image"], stream=True)
images = [i for c in chunks if c.choices for i in getattr(c.choices[0].delta, "images", None) or []]
found["streamed_images"] = [i["image_url"]["url"][:22] for i in images]
found["generated"] = litellm.image_generation(prompt="A cat", size="48x32", **to).data[0].b64_json[:6]
found["edited"] = litellm.image_edit(image=[open(sys.argv[2], "rb")], prompt="Snow", **to).data[0].b64_json[:6]
found["response"] = litellm.responses(input="Hi", **to).output[-1].content[0].text
print(json.dumps(found))
"""


def test_litellm(url: str, python: str, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"an image")
    assert run([python, "-c", LITELLM, url, str(picture)]) == {
        "text": "Paris",
        "streamed": "Paris",
        "images": ["data:image/png;base64,"],
        "streamed_images": ["data:image/png;base64,"],
        "generated": "iVBORw",
        "edited": "iVBORw",
        "response": "Paris",
    }


LANGCHAIN = """
import json, sys
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model="bagel", base_url=sys.argv[1], api_key="x", max_tokens=8)
found = {"text": chat.invoke("Hi").content, "streamed": "".join(c.content for c in chat.stream("Hi"))}
url = "data:image/png;base64,YW4gaW1hZ2U="
parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]
found["vision"] = chat.invoke([HumanMessage(parts, name="me")]).content
drawn = chat.bind(modalities=["image"]).invoke("A cat").content
found["image"] = drawn[0]["image_url"]["url"][:22]
streaming = chat.bind(modalities=["image"], extra_body={"image_reply": "list"}).stream("A cat")
parts = [part for chunk in streaming if isinstance(chunk.content, list) for part in chunk.content]
found["streamed_image"] = parts[0]["image_url"]["url"][:22]
responses = ChatOpenAI(model="bagel", base_url=sys.argv[1], api_key="x", use_responses_api=True)
found["response"] = responses.invoke("Hi").text
found["response_streamed"] = "".join(c.text for c in responses.stream("Hi"))
print(json.dumps(found))
"""


def test_langchain(url: str, python: str) -> None:
    assert run([python, "-c", LANGCHAIN, url]) == {
        "text": "Paris",
        "streamed": "Paris",
        "vision": "Paris",
        "image": "data:image/png;base64,",
        "streamed_image": "data:image/png;base64,",
        "response": "Paris",
        "response_streamed": "Paris",
    }


VERCEL = """
import {generateText, streamText, experimental_generateImage as generateImage} from "ai";
import {createOpenAI} from "@ai-sdk/openai";
import {createOpenAICompatible} from "@ai-sdk/openai-compatible";
const options = {baseURL: process.argv[2], apiKey: "x", name: "bagel"};
const compatible = createOpenAICompatible(options), openai = createOpenAI(options);
const found = {};
found.text = (await generateText({model: compatible("bagel"), prompt: "Hi"})).text;
found.streamed = await streamText({model: compatible("bagel"), prompt: "Hi"}).text;
found.response = (await generateText({model: openai("bagel"), prompt: "Hi"})).text;
found.response_streamed = await streamText({model: openai("bagel"), prompt: "Hi"}).text;
const image = {bagel: {modalities: ["image"]}};
found.drawn = (await generateText({model: compatible("bagel"), prompt: "A cat", providerOptions: image})).text;
const draw = {prompt: "A cat", size: "48x32", maxRetries: 0};
found.image = (await generateImage({model: compatible.imageModel("bagel"), ...draw})).image.base64.slice(0, 6);
console.log(JSON.stringify(found));
"""


def test_the_vercel_ai_sdk(url: str, node: Path) -> None:
    script = node / "client.mjs"
    script.write_text(VERCEL)
    assert run(["node", str(script), url], cwd=node) == {
        "text": "Paris",
        "streamed": "Paris",
        "response": "Paris",
        "response_streamed": "Paris",
        "drawn": "",
        "image": "iVBORw",
    }
