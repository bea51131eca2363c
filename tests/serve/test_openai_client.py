"""The endpoints by the client that they are made for."""

import asyncio
import json
import threading

import httpx
import numpy as np
import openai
import pytest

from ane_moe.serve.app import Limits
from ane_moe.serve.line import Line
from tests.letters import LETTERS
from tests.serve.conftest import Text, served

CLIENTS = 50


def client_of(server, **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def user(content):
    return {"role": "user", "content": content}


def ask(client, content, **options):
    given = {"model": "tiny", "temperature": 0, "max_tokens": 6} | options
    messages = content if isinstance(content, list) else [user(content)]
    return client.chat.completions.create(messages=messages, **given)


def streamed(chunks):
    """Text, finish reason and usage of a stream."""
    chunks = [*chunks]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    said = "".join(choice.delta.content or "" for choice in choices)
    return said, choices[-1].finish_reason, chunks[-1].usage


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.context) == ("tiny", "model", 64)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("another")


def test_an_answer_is_what_the_shards_say_alone(client, text):
    answer = ask(client, "012")
    alone = text.alone("<012>!", 6).result()
    (choice,) = answer.choices
    assert choice.message.content == alone.text and choice.finish_reason == "length"
    assert choice.message.role == "assistant" and choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 6)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_a_stream_says_the_same(client):
    whole = ask(client, "34")
    said, reason, usage = streamed(
        ask(client, "34", stream=True, stream_options={"include_usage": True})
    )
    assert (said, reason) == (whole.choices[0].message.content, "length")
    assert usage.total_tokens == whole.usage.total_tokens
    assert streamed(ask(client, "34", stream=True))[2] is None


def test_the_next_turn_takes_in_what_is_new_alone(client, text):
    first = ask(client, "5566")
    turns = [user("5566"), {"role": "assistant", "content": first.choices[0].message.content}]
    second = ask(client, [*turns, user("77")])
    assert second.usage.prompt_tokens_details.cached_tokens == len("<5566>")
    prompt = f"<5566><{first.choices[0].message.content}><77>!"
    assert second.choices[0].message.content == text.alone(prompt, 6).result().text


def test_instructions_parts_and_full_contexts(client, text):
    parts = [{"type": "text", "text": "0"}, {"type": "text", "text": "12"}]
    messages = [{"role": "developer", "content": "9"}, user(parts)]
    answer = ask(client, messages, max_tokens=None, max_completion_tokens=3)
    assert answer.choices[0].message.content == text.alone("<9><012>!", 3).result().text
    full = ask(client, "0" * 50, max_tokens=None)
    assert full.choices[0].finish_reason == "length"
    assert full.usage.total_tokens == 64 + 1  # the last one need not be taken in
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "0" * 70)
    assert error.value.code == "context_length_exceeded"


def test_a_seed_repeats_a_completion(client):
    def draw(seed):
        given = {"temperature": 1.5, "top_p": 0.9, "seed": seed, "max_tokens": 20}
        return client.completions.create(model="tiny", prompt="0123", **given).choices[0].text

    assert draw(1) == draw(1) != draw(-5) == draw(-5)


def test_a_stop_string_ends_a_completion_before_itself(client, text):
    whole = text.alone("01234", 20).result().text
    stop = whole[4:6]
    expected = whole[: whole.index(stop)]
    for prompt in ("01234", [*text.tokenizer.encode("01234")]):
        given = {"prompt": prompt, "temperature": 0, "stop": ["??", stop], "max_tokens": 20}
        (choice,) = client.completions.create(model="tiny", **given).choices
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        chunks = [*client.completions.create(model="tiny", stream=True, **given)]
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_logprobs_are_those_of_the_logits(client, text):
    pieces = text.alone("<012>!", 6, top_logprobs=3).pieces
    answer = ask(client, "012", logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [one.token for one in content] == [LETTERS[piece.id] for piece in pieces]
    for one, piece in zip(content, pieces, strict=True):
        assert one.bytes == [ord(one.token)] and one.logprob == pytest.approx(piece.scores.logprob)
        assert [top.token for top in one.top_logprobs] == [LETTERS[i] for i, _ in piece.scores.top]
        np.testing.assert_allclose(
            [top.logprob for top in one.top_logprobs], [value for _, value in piece.scores.top]
        )
    chunks = [*ask(client, "012", logprobs=True, top_logprobs=3, stream=True)]
    told = [c.choices[0].logprobs for c in chunks]
    assert [one for logprobs in told if logprobs for one in logprobs.content] == content
    assert ask(client, "012", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_of_a_completion(client, text):
    answer = client.completions.create(
        model="tiny", prompt="01234", temperature=0, max_tokens=5, logprobs=2
    )
    told, pieces = answer.choices[0].logprobs, text.alone("01234", 5, top_logprobs=2).pieces
    assert "".join(told.tokens) == answer.choices[0].text
    assert told.text_offset == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(told.token_logprobs, [piece.scores.logprob for piece in pieces])
    assert [[*top] for top in told.top_logprobs] == [
        [LETTERS[i] for i, _ in piece.scores.top] for piece in pieces
    ]


def test_fifty_clients_get_their_own_answers(server, text):
    async def one(client, number):
        prompt = "".join(LETTERS[number % 41] for number in (number, number * 7, number * 3, 5))
        expected = text.alone(f"<{prompt}>!", 8).result().text
        for turn in range(2):
            stream = (number + turn) % 2 == 0
            given = {"messages": [user(prompt)], "temperature": 0, "max_tokens": 8}
            answer = await client.chat.completions.create(model="tiny", stream=stream, **given)
            if stream:
                said = "".join([c.choices[0].delta.content or "" async for c in answer])
            else:
                said = answer.choices[0].message.content
            assert said == expected

    async def all_of_them():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            await asyncio.gather(*(one(client, number) for number in range(CLIENTS)))

    asyncio.run(all_of_them())
    assert server.line.waiting == server.line.running == 0


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A server whose tokens take 20 ms and whose queue has two places."""
    text = Text(tmp_path_factory.mktemp("slow"), slow=0.02)
    with served(text.model, limits=Limits(waiting=2, body_bytes=5000)) as running:
        yield running


def metric(server, name):
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def settled(server, seconds=10.0):
    """Wait until nobody is in the line."""
    for _ in range(int(seconds / 0.02)):
        if not server.line.waiting and not server.line.running:
            return True
        threading.Event().wait(0.02)
    return False


def test_the_queue_is_bounded(slow):
    client, streams = client_of(slow), []
    threads = [
        threading.Thread(target=lambda: streams.append(ask(client, "0", max_tokens=30)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    while slow.line.waiting + slow.line.running < 3:
        threading.Event().wait(0.005)
    with pytest.raises(openai.RateLimitError) as error:
        ask(client, "0")
    assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
    for thread in threads:
        thread.join()
    assert len({answer.choices[0].message.content for answer in streams}) == 1
    assert metric(slow, 'ane_moe_requests_total{path="/v1/chat/completions",status="429"}') == 1


def test_clients_that_vanish_end_their_answers(slow):
    client, threads = client_of(slow), threading.active_count()
    before = metric(slow, "ane_moe_clients_left_total")
    for _ in range(3):
        stream = ask(client, "0", stream=True, max_tokens=50)
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.2), "0", max_tokens=50)
    running = ask(client, "1", stream=True, max_tokens=40)
    next(iter(running))
    with pytest.raises(openai.APITimeoutError):  # one that waits
        ask(client.with_options(timeout=0.1), "0", max_tokens=50)
    assert len([*running]) >= 39  # the one before it comes to its end
    assert settled(slow, 2.0)
    assert metric(slow, "ane_moe_clients_left_total") - before == 5
    assert ask(client, "012").usage.completion_tokens == 6
    assert threading.active_count() <= threads + 1


def test_slow_readers_hold_up_nobody(slow):
    body = {"model": "tiny", "messages": [user("0")], "max_tokens": 10, "stream": True}
    with httpx.stream("POST", f"{slow.url}/v1/chat/completions", json=body) as reader:
        assert reader.status_code == 200  # and nothing of it is read
        assert ask(client_of(slow), "12").usage.completion_tokens == 6
        assert settled(slow)
        events = [line for line in reader.iter_lines() if line]
    assert events[-1] == "data: [DONE]" and len(events) >= 12


def test_a_failure_of_the_model_is_told_and_the_next_is_served(tmp_path):
    text = Text(tmp_path)
    with served(text.model) as server:
        client, head = client_of(server), text.shards.head[0].functions["decode"]
        call, fails = head.call, iter([False, False, True])

        def failing(inputs, state):
            return 1 / 0 if next(fails, False) else call(inputs, state)

        head.call = failing
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            ask(client, "012")
        fails = iter([False, False, True])
        with pytest.raises(openai.APIError, match="the model failed"):
            streamed(ask(client, "012", stream=True))
        assert (
            ask(client, "012").choices[0].message.content == text.alone("<012>!", 6).result().text
        )


def test_a_plain_transcript_ends_where_the_user_would_speak(tmp_path):
    text = Text(tmp_path, template=None)
    assert text.model.form.is_plain
    with served(text.model) as server:
        (model,) = client_of(server).models.list().data
        assert model.chat_template == "plain transcript"
        assert ask(client_of(server), "012").usage.completion_tokens == 6


def test_a_line_that_is_closed_lets_everybody_go():
    from ane_moe.serve.line import Closed

    async def told(job):
        return [value async for value in job]

    async def run():
        line, begun, go_on = Line(3), threading.Event(), threading.Event()

        def work(halted):
            begun.set()
            go_on.wait()
            yield 1

        jobs = [line.enter(work) for _ in range(2)]
        await asyncio.to_thread(begun.wait)
        closing = asyncio.to_thread(line.close)
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        await closing
        ends = await asyncio.gather(*map(told, jobs), return_exceptions=True)
        assert all(isinstance(end, Closed) for end in ends)
        with pytest.raises(Closed):
            line.enter(work)

    asyncio.run(run())


def test_events_are_one_line_of_json_each(server):
    body = {"model": "tiny", "prompt": "01", "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(json.loads(one.removeprefix("data: "))["id"].startswith("cmpl-") for one in events)
