"""A real privacy filter behind the server: what it refuses, and the figures that it shows."""

import httpx
import pytest
import typer
from typer.testing import CliRunner

from ane_moe.commands.serve import serve
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.demo import privacy_checkpoint
from ane_moe.errors import UserError
from ane_moe.manifest import read_manifest
from ane_moe.redaction.redactor import open_redactor
from ane_moe.redaction.viterbi import read_biases
from ane_moe.serve.model import PrivacyFilter
from tests.serve.conftest import served

TEXT = "Contact Jane Doe at jane.doe@example.org or call 415-555-0132."


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filter") / "out"
    convert(privacy_checkpoint(), folder, ConvertOptions())
    return folder


@pytest.mark.parametrize(
    "given",
    [
        ("--adapter", "poet"),
        ("--precision", "fp16"),
        ("--expert-cache-mb", "8"),
        ("--memory-mb", "100"),
        ("--predictor", "layer"),
    ],
    ids=lambda given: given[0],
)
def test_what_is_of_generation_is_refused_by_name(out, given):
    app = typer.Typer()
    app.command()(serve)
    refused = CliRunner().invoke(app, [str(out), "--port", "0", *given]).exception
    assert isinstance(refused, UserError)
    assert f"not served with that; found: {given[0]}" in str(refused)


@pytest.fixture(scope="module")
def redactor(out):
    return open_redactor(out, runtime="reference")


@pytest.fixture(scope="module")
def server(out, redactor):
    with served(PrivacyFilter(redactor, read_manifest(out), read_biases(out))) as running:
        yield running


def figures(server):
    return httpx.get(f"{server.url}/figures").json()["figures"]


def test_the_figures_are_of_what_was_labelled(server, redactor):
    assert figures(server) == {}
    told = httpx.post(f"{server.url}/v1/redact", json={"input": TEXT}, timeout=60).json()
    first = figures(server)
    assert first["labelled"]["tokens"] == len(redactor.tokenizer.encode(TEXT))
    assert first["labelled"]["calls"] > 0 and "reference runtime" in first["conditions"]
    alone = redactor.find(TEXT).spans
    assert [(one["start"], one["end"], one["label"]) for one in told["spans"]] == [
        (one.start, one.end, one.label) for one in alone
    ]


def test_the_page_shows_them(server, browser, redactor):
    httpx.post(f"{server.url}/v1/redact", json={"input": TEXT}, timeout=60)
    browser.show(1200, "light", f"{server.url}/")
    browser.wait('document.querySelectorAll("#figures .card").length === 5')
    told = browser.run('document.getElementById("figures").innerText')
    assert f"{figures(server)['labelled']['tokens']}\ntokens" in told
    assert "reference" in browser.run('document.getElementById("conditions").textContent')
