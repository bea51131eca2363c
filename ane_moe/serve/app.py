"""The HTTP face: OpenAI's endpoints over one model, a page, and what watches a server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from time import perf_counter, time
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ane_moe.errors import UserError
from ane_moe.serve.answers import DONE, Answer, as_bytes, event
from ane_moe.serve.guard import App, Guard, Receive, Rules, Scope, Send
from ane_moe.serve.line import Closed, Full, IsHalted, Job, Line
from ane_moe.serve.metrics import Metrics
from ane_moe.serve.model import Begin, End, LanguageModel, PrivacyFilter, Served
from ane_moe.serve.refusal import INTERNAL, OVERLOADED, Refusal
from ane_moe.serve.requests import Ask, chat_ask, completion_ask, parse_json, redact_ask

T = TypeVar("T")
BODY_SECONDS = 30.0  # that a client has to send its request
JSON = "application/json"
GONE = 499  # nobody reads it: the client went away


@dataclass(frozen=True)
class Limits:
    """`waiting` requests stand in the queue at most, with bodies of at most `body_bytes`."""

    waiting: int = 64
    body_bytes: int = 4 << 20


@dataclass
class Server:
    """One model under a name, and its line. `report` makes the page of that name when it is first
    asked for."""

    model: Served
    name: str
    report: Callable[[], str]
    rules: Rules = field(default_factory=Rules)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.line = Line(self.limits.waiting, self.metrics.handed.observe)
        self.metrics.watch(self.line)
        self.created = int(time())
        self._report: str | None = None
        self._reporting = asyncio.Lock()

    @property
    def app(self) -> App:
        """The ASGI application. Its shutdown closes the line."""
        routes = [
            Route("/", self._page),
            Route("/healthz", self._health),
            Route("/metrics", self._metrics),
            Route("/figures", self._figures),
            Route("/report", self._show_report),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
        ]
        asked = (
            (("/v1/chat/completions", chat_ask), ("/v1/completions", completion_ask))
            if isinstance(self.model, LanguageModel)
            else ()
        )
        routes += [Route(path, self._text_of(parse), methods=["POST"]) for path, parse in asked]
        if isinstance(self.model, PrivacyFilter):
            routes.append(Route("/v1/redact", self._counted(self._redact), methods=["POST"]))
        handlers: Any = {
            Refusal: _refused,
            HTTPException: _unknown,
            ClientDisconnect: lambda request, error: Response(status_code=GONE),
        }

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await run_in_threadpool(self.line.close)

        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
        return Guard(app, self.rules)

    # -- what is asked of the model

    def _text_of(self, parse: Callable[[dict[str, Any]], Ask]) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            assert isinstance(self.model, LanguageModel)
            ask = parse(await self._body(request))
            self._require_name(ask.model)
            prompt = await run_in_threadpool(self.model.prompt, ask)
            model = self.model
            job = self._enter(lambda halted: model.answer(prompt, halted))
            answer = Answer(
                self.name, prompt, model.tokenizer.decode, ask.is_chat, ask.stream and ask.usage
            )
            return await self._answered(request, ask, job, answer)

        return self._counted(respond)

    async def _answered(
        self, request: Request, ask: Ask, job: Job[Any], answer: Answer
    ) -> Response:
        """The whole answer, or the stream of it once there is something to give."""
        values = self._timed(job, answer)
        if ask.stream:
            first = await self._while_there(request, job, anext(values))
            return Stream(self, job, _events(first, values, answer))

        async def whole() -> dict[str, Any]:
            async for value in values:
                answer.take(value)
            return answer.whole()

        return _json(await self._while_there(request, job, whole()))

    async def _timed(self, job: Job[Any], answer: Answer) -> AsyncIterator[Any]:
        """The job's values, counted; what a client cannot mend becomes a Refusal."""
        metrics, began = self.metrics, False
        try:
            async for value in job:
                if not began and not isinstance(value, Begin):
                    metrics.first_token.observe(perf_counter() - job.entered)
                    began = True
                if isinstance(value, End):
                    metrics.prompt_tokens.inc(answer.prompt.tokens)
                    metrics.cached_tokens.inc(answer.cached)
                    metrics.new_tokens.inc(value.tokens)
                    metrics.request_seconds.observe(perf_counter() - job.entered)
                yield value
        except Exception as error:
            raise _failure(error) from error

    async def _redact(self, request: Request) -> Response:
        assert isinstance(self.model, PrivacyFilter)
        model, ask = self.model, redact_ask(await self._body(request))
        model.require_known(ask)
        job = self._enter(lambda halted: model.redacted(ask, halted))

        async def only() -> dict[str, Any]:
            try:
                async for value in job:
                    return value
            except Exception as error:
                raise _failure(error) from error
            raise _failure(Closed())

        return _json(await self._while_there(request, job, only()))

    def _enter(self, work: Callable[[IsHalted], Iterator[T]]) -> Job[T]:
        try:
            return self.line.enter(work)
        except Full:
            said = f"{self.limits.waiting} requests are waiting already"
            raise Refusal(429, said, OVERLOADED, code="queue_full") from None
        except Closed as error:
            raise _failure(error) from None

    async def _while_there(self, request: Request, job: Job[Any], work: Awaitable[T]) -> T:
        """What `work` gives, unless the client goes away before: that ends the job."""
        try:
            return await _unless(_gone(request.receive), work)
        except (ClientDisconnect, asyncio.CancelledError):
            self.leave(job)
            raise

    def leave(self, job: Job[Any]) -> None:
        """End a job that nobody waits for any more."""
        self.line.leave(job)
        self.metrics.left.inc()

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object that a request carries. Raises Refusal."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:  # which a page of another origin cannot send unasked
            raise Refusal(415, f"the content type has to be {JSON}")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for some in request.stream():
                    body += some
                    if len(body) > self.limits.body_bytes:
                        said = f"a request has at most {self.limits.body_bytes} bytes"
                        raise Refusal(413, said)
        except TimeoutError:
            raise Refusal(408, f"the request took more than {BODY_SECONDS:.0f} s") from None
        return parse_json(bytes(body))

    def _require_name(self, name: str) -> None:
        if name != self.name:
            said = f"there is no model {name[:80]!r}, only {self.name!r}"
            raise Refusal(404, said, param="model", code="model_not_found")

    # -- what is told of the server

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(files("ane_moe.serve").joinpath("page.html").read_text("utf-8"))

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _figures(self, request: Request) -> Response:
        return _json(
            {"waiting": self.line.waiting, "running": self.line.running}
            | {"figures": self.model.figures}
        )

    async def _show_report(self, request: Request) -> Response:
        async with self._reporting:
            if self._report is None:
                self._report = await run_in_threadpool(self.report)
        return HTMLResponse(self._report)

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._require_name(request.path_params["name"])
        return _json(self._described())

    def _described(self) -> dict[str, Any]:
        """In OpenAI's form, with what the page shows beside."""
        manifest, model = self.model.manifest, self.model
        described = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ane-moe",
            "family": manifest.family,
            "weights": manifest.weights,
        }
        if isinstance(model, PrivacyFilter):
            return described | {"labels": model.labels}
        form = "plain transcript" if model.form.is_plain else "checkpoint"
        return described | {"context": manifest.context, "chat_template": form}

    def _counted(self, respond: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """`respond`, counted by its path and status."""

        async def counted(request: Request) -> Response:
            status = GONE
            try:
                response: Response = await respond(request)
                status = response.status_code
                return response
            except Refusal as refusal:
                status = refusal.status
                raise
            finally:
                self.metrics.requests.labels(request.url.path, str(status)).inc()

        return counted


class Stream(Response):
    """Server-sent events of a job, which ends when its reader goes away."""

    media_type = "text/event-stream"

    def __init__(self, server: Server, job: Job[Any], events: AsyncIterator[bytes]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._server, self._job, self._events = server, job, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}

        async def given() -> None:
            await send(start)
            async for some in self._events:
                await send({"type": "http.response.body", "body": some, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await _unless(_gone(receive), given())
        except (ClientDisconnect, OSError):
            self._server.leave(self._job)
        except BaseException:
            self._server.leave(self._job)
            raise


async def _events(first: Any, values: AsyncIterator[Any], answer: Answer) -> AsyncIterator[bytes]:
    """The stream of an answer; a failure on the way is its last event."""
    try:
        for chunk in answer.take(first):
            yield event(chunk)
        async for value in values:
            for chunk in answer.take(value):
                yield event(chunk)
    except Refusal as refusal:
        yield event(refusal.as_json())
    yield DONE


async def _unless(gone: Awaitable[None], work: Awaitable[T]) -> T:
    """What `work` gives, unless `gone` comes before. Raises ClientDisconnect then."""
    tasks = [asyncio.ensure_future(gone), asyncio.ensure_future(work)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[1].done():
            raise ClientDisconnect
        return tasks[1].result()  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
            with suppress(BaseException):
                await task


async def _gone(receive: Receive) -> None:
    """Comes back when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _failure(error: BaseException) -> Refusal:
    """What a client is told that could do nothing about it."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Closed):
        return Refusal(503, "the server is shutting down", OVERLOADED, code="shutting_down")
    said = str(error) if isinstance(error, UserError) else "the model failed"
    return Refusal(500, said, INTERNAL)


def _json(document: dict[str, Any], status: int = 200) -> Response:
    return Response(as_bytes(document), status, media_type=JSON)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    response = _json(error.as_json(), error.status)
    if error.status in (429, 503):
        response.headers["retry-after"] = "1"
    return response


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is no such path", 405: "this path takes another method"}
    refusal = Refusal(error.status_code, said.get(error.status_code, error.detail))
    return _json(refusal.as_json(), error.status_code)
