"""What a server adds to its model: many clients at once, and the queue's own work.

    python scripts/serve_load.py [--clients 50] [--turns 4] [--tokens 32] [OUT]

Without OUT the model is one that only counts: it gives a token every --token-ms, so that all else
is the server's. Prints the percentiles of each step of the queue (from the end of an answer to the
beginning of the next, from a token to its reader in the event loop), as the server's own histogram
is fed, and of the time to the first token. The clients run in a process of their own; in another
one, beside them all, a thread hands numbers to an event loop that does nothing else: what that
takes is the machine's, on a busy one most of it.
"""

import argparse
import asyncio
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn

from ane_moe.loop.generation import GenerateOptions, Piece
from ane_moe.serve.app import Limits, Server
from ane_moe.serve.guard import Rules
from ane_moe.serve.listening import address_of, bind
from ane_moe.serve.model import Begin, End, LanguageModel, Prompt


class Counting(LanguageModel):
    """Says its numbers one after the other, and takes so many seconds for each."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.figures = seconds, {}
        self.manifest = self.form = None
        self.tokenizer = self

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def prompt(self, ask) -> Prompt:
        return Prompt([0], GenerateOptions(ask.max_tokens), ())

    def answer(self, prompt, halted):
        yield Begin(0)
        for number in range(prompt.options.max_tokens):
            if self.seconds:
                time.sleep(self.seconds)
            yield Piece(number, f"{number} ")
        yield End("length", prompt.options.max_tokens)


def model_of(options) -> LanguageModel:
    if options.out is None:
        return Counting(options.token_ms / 1000)
    from ane_moe.loop.conversations import Conversations
    from ane_moe.loop.opened import open_model

    opened = open_model(options.out)
    return LanguageModel(Conversations(opened.shards, 4), opened.tokenizer)


def clients(url: str, count: int, turns: int, tokens: int, told) -> None:
    """Run `turns` of each client, and tell the seconds to each first token."""
    import openai

    async def one(client, number: int) -> list[float]:
        firsts = []
        for turn in range(turns):
            started = time.perf_counter()
            stream = await client.chat.completions.create(
                model="load",
                messages=[{"role": "user", "content": f"{number} {turn}"}],
                max_tokens=tokens,
                temperature=0,
                stream=True,
            )
            async for chunk in stream:
                if chunk.choices[0].delta.content and len(firsts) == turn:
                    firsts.append(time.perf_counter() - started)
        return firsts

    async def every() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, number) for number in range(count)))

    told.put(asyncio.run(every()))


def bare(token_ms: float, ended, told) -> None:
    """Hand numbers from a thread to an idle event loop until `ended`; tell the seconds of each."""
    steps: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def hand(started: float) -> None:
            steps.append(time.perf_counter() - started)

        def work() -> None:
            while not ended.wait(token_ms / 1000):
                loop.call_soon_threadsafe(hand, time.perf_counter())

        await asyncio.to_thread(work)

    asyncio.run(run())
    told.put(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=None)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--token-ms", type=float, default=1.0)
    options = parser.parse_args()

    bound, steps = bind("127.0.0.1", 0), []
    server = Server(model_of(options), "load", lambda: "", Rules(), Limits(waiting=10_000))
    server.line._handed = steps.append
    listening = uvicorn.Server(uvicorn.Config(server.app, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(listening.serve(sockets=[bound])))
    thread.start()
    spawned = multiprocessing.get_context("spawn")
    told, beside, ended = spawned.Queue(), spawned.Queue(), spawned.Event()
    given = (address_of(bound), options.clients, options.turns, options.tokens, told)
    started, used = time.perf_counter(), time.process_time()
    process = spawned.Process(target=clients, args=given)
    control = spawned.Process(target=bare, args=(options.token_ms, ended, beside))
    process.start()
    control.start()
    firsts = np.concatenate(told.get())
    ended.set()
    bare_steps = beside.get()
    process.join()
    control.join()
    wall, cpu = time.perf_counter() - started, time.process_time() - used
    listening.should_exit = True
    thread.join()

    answers = options.clients * options.turns
    print(f"{answers} answers of {options.tokens} tokens, {options.clients} clients at once")
    print(
        f"wall {wall:.1f} s, the server's CPU {cpu:.1f} s, {1e3 * cpu / answers:.2f} ms an answer"
    )
    shown = (("queue step", steps), ("bare step beside it", bare_steps), ("first token", firsts))
    for name, values in shown:
        ms = 1e3 * np.asarray(values)
        spread = "  ".join(f"p{p:g} {np.percentile(ms, p):.3f}" for p in (50, 95, 99))
        print(f"{name}, ms: {spread}  max {ms.max():.3f}, n {len(ms)}")


if __name__ == "__main__":
    main()
