"""Servers in a thread of their own, at a free port."""

import asyncio
import threading
from contextlib import contextmanager

import pytest
import uvicorn

from ane_moe.loop.conversations import Conversations
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.session import Session
from ane_moe.loop.tokenizer import load_tokenizer
from ane_moe.redaction.redactor import Redactor
from ane_moe.redaction.viterbi import PRESETS
from ane_moe.serve.app import Server
from ane_moe.serve.guard import Rules
from ane_moe.serve.listening import address_of, bind, host_names
from ane_moe.serve.model import LanguageModel, PrivacyFilter
from tests.letters import letter_shards, slowed
from tests.redaction.scorers import Digits, byte_tokenizer
from tests.serve.browser import CHROMIUM, Browser

RULES = Rules(host_names("127.0.0.1"))


@contextmanager
def served(model, **options):
    """A running Server of `model`; its address is in `url`."""
    bound = bind("127.0.0.1", 0)
    server = Server(model, "tiny", lambda: "<h2>report</h2>", **{"rules": RULES} | options)
    config = uvicorn.Config(server.app, log_level="error", lifespan="on")
    listening = uvicorn.Server(config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(listening.serve(sockets=[bound])), daemon=True
    )
    server.url = address_of(bound)
    thread.start()
    try:
        while not listening.started:
            thread.join(0.01)
        yield server
    finally:
        listening.should_exit = True
        thread.join(60)
        assert not thread.is_alive() and not server.line._thread.is_alive()
        loop.close()


class Text:
    """A language model of letters, and what it says by itself."""

    def __init__(self, folder, conversations=4, slow=0.0, **options) -> None:
        self.shards = slowed(letter_shards(folder, **options), slow)
        self.tokenizer = load_tokenizer(folder, self.shards.manifest)
        kept = Conversations(self.shards, conversations)
        self.model = LanguageModel(kept, self.tokenizer)

    def alone(self, prompt, max_tokens, **options):
        """The result of a new session for a prompt that is already in the template."""
        given = GenerateOptions(max_tokens, **options)
        ids = self.tokenizer.encode(prompt)
        generation = generate(Session(self.shards), ids, given, self.tokenizer.decode)
        generation.pieces = [*generation]
        return generation


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def server(text):
    with served(text.model) as running:
        yield running


@pytest.fixture(scope="module")
def marker():
    """A server that finds runs of digits."""
    tokenizer = byte_tokenizer()
    redactor = Redactor(Digits(tokenizer), tokenizer)
    manifest = letterless_manifest()
    with served(PrivacyFilter(redactor, manifest, PRESETS["default"])) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine to look at the page with")
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def letterless_manifest():
    from tests.runtime.numpy_shards import make_manifest

    return make_manifest((None,))
