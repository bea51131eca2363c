"""`ane-moe serve` as a process of its own, over a real conversion."""

import re
import signal
import subprocess
import sys

import httpx
import openai
import pytest
import typer
from typer.testing import CliRunner

from ane_moe.absent_modules import absent_modules
from ane_moe.commands.serve import serve
from ane_moe.demo import demo_checkpoint
from ane_moe.errors import UserError
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.opened import open_model
from ane_moe.loop.session import Session
from tests.verification.tiny import tiny_conversion

PROMPT = "import os\nimport"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "out"
    return tiny_conversion(demo_checkpoint(), folder, context=128, prefill=32)


def run(*arguments):
    app = typer.Typer()
    app.command()(serve)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_until_it_is_told_to_end_and_ends_what_it_began(out, stop):
    command = [sys.executable, "-m", "ane_moe", "serve", str(out), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = [process.stderr.readline() for _ in range(2)]
        assert "no chat template" in said[0]
        url = re.search(r"http://127\.0\.0\.1:\d+", said[1])[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list().data] == ["out"]
        assert "<html" in httpx.get(f"{url}/report", timeout=120).text
        given = {"model": "out", "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
        stream = iter(client.completions.create(stream=True, **given))
        text = next(stream).choices[0].text
        process.send_signal(stop)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert process.stderr.read() == "ane-moe: ended\n"
    model = open_model(out, "reference")
    ids = model.tokenizer.encode(PROMPT)
    alone = generate(Session(model.shards), ids, GenerateOptions(40), model.tokenizer.decode)
    assert text == "".join(piece.text for piece in alone)


def test_another_address_needs_a_key(out):
    result = run(out, "--host", "0.0.0.0")
    assert isinstance(result.exception, UserError) and "--api-key" in str(result.exception)


def test_lacking_packages_are_named(out):
    with absent_modules("uvicorn"):
        result = run(out)
    assert "pip install 'ane-moe[serve]'" in str(result.exception)
