"""The endpoints: what OpenAI's clients ask of a language model, and nothing else.

Everything that happens to a request while it is answered (what was prepared in another thread,
pieces of text, that its client has gone, that the server ends) comes into one inbox.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .access import Access, Guard
from .answers import Answer, ChatShape, Choice, CompletionShape, Shape, dumps
from .errors import RequestError, shortened
from .jobs import Done, Failed, Job, Piece, SamplingParams
from .prompts import Limits, Prompts
from .requests import ChatRequest, CompletionRequest, Request, parse
from .texts import Vocabulary
from .worker import Worker

COMPLETION_TOKENS = 16  # of a completion that names no number, as at OpenAI
BODY_SECONDS = 30.0
BODIES = 64  # times the limit of one: bytes of bodies that are being read at once
THREADS = 4  # that read bodies and templates


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Inbox:
    """What happens to one request; `put` and `end` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._end: Exception | None = None

    def put(self, event: Any) -> None:
        """An event, or the exception that `get` raises instead."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def end(self, why: Exception) -> None:
        """Let `get` raise from now on, whatever has come before."""
        self._end = self._end or why
        self.put(why)

    async def get(self) -> Any:
        event = await self._events.get()
        if self._end is not None:
            raise self._end
        if isinstance(event, Exception):
            raise event
        return event


@dataclass(frozen=True)
class Prepared:
    """A request as it goes to the model. `params` are those of each prompt."""

    request: Request
    shape: Shape
    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    echoes: Sequence[str | None]
    continues: bool

    def jobs(self, emit: Callable[[Any], None]) -> Iterator[Job]:
        """One for each choice, in the order of their indices."""
        for prompt, params, echo in zip(self.prompts, self.params, self.echoes, strict=True):
            for number in range(self.request.choices):
                seed = None if params.seed is None else _another_seed(params.seed, number)
                yield Job(prompt, replace(params, seed=seed), emit, echo, self.continues)


def _another_seed(seed: int, number: int) -> int:
    return (seed + number + (1 << 63)) % (1 << 64) - (1 << 63)


class Service:
    """A model under its name, for as many requests at a time as may wait for it."""

    def __init__(
        self,
        name: str,
        worker: Worker,
        prompts: Prompts,
        vocabulary: Vocabulary,
        max_body: int,
        waiting: int,
        aliases: Sequence[str] = (),
    ) -> None:
        self.name, self.max_body, self.waiting = name, max_body, waiting
        self._names = {name, *aliases}
        self._worker, self._prompts, self._vocabulary = worker, prompts, vocabulary
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="requests")
        self._inboxes: set[Inbox] = set()
        self._reading = 0  # bytes
        self._is_ending = False

    def end(self) -> None:
        """Answer who waits, and whoever comes, that the server ends."""
        self._is_ending = True
        for inbox in self._inboxes:
            inbox.end(_ending())

    @property
    def limits(self) -> Limits:
        return self._prompts.limits

    def close(self) -> None:
        """Take no more bodies."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- what is asked ---------------------------------------------------------------------------

    def completion(self, body: bytes) -> Prepared:
        request = self._parsed(CompletionRequest, body)
        prompts: list[Sequence[int]] = []
        echoes: list[str | None] = []
        for number, prompt in enumerate(request.prompt):
            param = "prompt" if len(request.prompt) == 1 else f"prompt[{number}]"
            is_text = isinstance(prompt, str)
            make = self._prompts.of_text if is_text else self._prompts.of_ids
            prompts.append(make(prompt, param))
            text = prompt if is_text else self._prompts.text(prompts[-1])
            echoes.append(text if request.echo else None)
        shape = CompletionShape(request, self._vocabulary)
        params = [self._params(request, prompt, COMPLETION_TOKENS) for prompt in prompts]
        return Prepared(request, shape, prompts, params, echoes, continues=True)

    def chat(self, body: bytes) -> Prepared:
        request = self._parsed(ChatRequest, body)
        messages = [message.for_template() for message in request.messages]
        prompt = self._prompts.of_messages(messages, request.chat_template_kwargs)
        shape, params = ChatShape(request, self._vocabulary), self._params(request, prompt, None)
        return Prepared(request, shape, [prompt], [params], [None], continues=False)

    def _parsed(self, kind: Any, body: bytes) -> Any:
        request = parse(kind, body)
        if request.model not in self._names:
            raise RequestError(
                404,
                f"model {shortened(request.model)} is not served here, only {self.name!r}",
                "model",
                "model_not_found",
            )
        return request

    def _params(
        self, request: Request, prompt: Sequence[int], default: int | None
    ) -> SamplingParams:
        wrong = [token for token in request.logit_bias if token >= self._prompts.limits.vocabulary]
        if wrong:
            raise RequestError(
                400,
                f"logit_bias must name token ids below {self._prompts.limits.vocabulary}: "
                f"got {wrong[0]}",
                "logit_bias",
            )
        return SamplingParams(
            max_tokens=self._prompts.room(prompt, request.new_tokens, default),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=None if request.top_k is None else max(request.top_k, 0),
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            bias=request.logit_bias,
            seed=request.seed,
            stop=request.stop,
            logprobs=request.top,
        )

    # --- how it is answered ----------------------------------------------------------------------

    def endpoint(self, prepare: Callable[[bytes], Prepared]) -> Endpoint:
        return Endpoint(self, prepare)

    async def body(self, request: HttpRequest) -> bytes:
        """Raises RequestError for what is no JSON by its header, too large, or too slow."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(400, f"Content-Type must be application/json: got {shortened(kind)}")
        if int(request.headers.get("content-length", 0)) > self.max_body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    self._reading += len(part)
                    body += part
                    if len(body) > self.max_body:
                        raise self._too_large()
                    if self._reading > BODIES * self.max_body:
                        raise _busy("too much is being sent to this server at once")
        except TimeoutError as error:
            raise RequestError(
                408,
                f"the body has not arrived within {BODY_SECONDS:g} s",
                headers={"Connection": "close"},
            ) from error
        except ClientDisconnect as error:
            raise ClientGone from error
        finally:
            self._reading -= len(body)
        return bytes(body)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body must be at most {self.max_body} bytes (--max-body)")

    @asynccontextmanager
    async def inbox(self, receive: Receive) -> AsyncIterator[Inbox]:
        """The inbox of a request whose body has been read, while it is answered."""
        if self._is_ending:
            raise _ending()
        if len(self._inboxes) > self.waiting:
            raise _busy(f"{self.waiting} requests wait already")
        inbox = Inbox()
        listening = asyncio.create_task(_listen(receive, inbox))
        self._inboxes.add(inbox)
        try:
            yield inbox
        finally:
            self._inboxes.discard(inbox)
            listening.cancel()

    async def prepared(
        self, prepare: Callable[[bytes], Prepared], body: bytes, inbox: Inbox
    ) -> Prepared:
        """`prepare(body)` in another thread: the loop goes on, and the client may leave."""

        def run() -> None:
            try:
                inbox.put(prepare(body))
            except RequestError as error:
                inbox.put(error)
            except Exception as error:  # a chat template is the model's: it raises what it likes
                inbox.put(_failure(error))

        self._threads.submit(run)
        found: Prepared = await inbox.get()
        return found

    async def events(
        self, prepared: Prepared, inbox: Inbox
    ) -> AsyncGenerator[tuple[int, Piece | Done | None]]:
        """Pieces and the end of each choice in turn, by index; None before it begins.

        The next choice is queued when the one before is done, behind others' requests.
        """
        for index, job in enumerate(prepared.jobs(inbox.put)):
            yield index, None
            try:
                self._worker.submit(job)
                event = None
                while not isinstance(event, Done):
                    event = await inbox.get()
                    if isinstance(event, Failed):
                        raise RequestError(503, event.message)
                    yield index, event
            finally:
                job.cancel()

    # --- the other endpoints ---------------------------------------------------------------------

    def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(self.name)]})

    def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name not in self._names:
            raise RequestError(
                404,
                f"model {shortened(name)} is not served here, only {self.name!r}",
                "model",
                "model_not_found",
            )
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        positions = self._prompts.limits.positions
        shown = {"id": name, "object": "model", "created": 0, "owned_by": "mixbits"}
        return {**shown, "max_model_len": positions}


class Endpoint:
    """An ASGI application that answers what `prepare` makes of a body."""

    def __init__(self, service: Service, prepare: Callable[[bytes], Prepared]) -> None:
        self._service, self._prepare = service, prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            body = await self._service.body(HttpRequest(scope, receive))
            async with self._service.inbox(receive) as inbox:
                prepared = await self._service.prepared(self._prepare, body, inbox)
                del body
                answer = Answer(prepared.request, prepared.shape, prepared.prompts)
                async with aclosing(self._service.events(prepared, inbox)) as events:
                    if prepared.request.stream:
                        await _stream(answer, events, send)
                    else:
                        response = JSONResponse(await _whole(answer, events))
                        await response(scope, receive, send)


async def _whole(answer: Answer, events: AsyncIterator[Any]) -> dict[str, Any]:
    choices: list[Choice] = []
    async for _, event in events:
        if event is None:
            choices.append(Choice())
        else:
            choices[-1].add(event)
    return answer.whole(choices)


async def _stream(answer: Answer, events: AsyncIterator[Any], send: Send) -> None:
    """Server-sent events; what goes wrong on the way is one of them, and the last."""
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def say(content: bytes, more: bool = True) -> None:
        body = b"data: " + content + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": more})

    try:
        async for index, event in events:
            chunks = answer.first(index) if event is None else [answer.chunk(index, event)]
            for chunk in chunks:
                await say(dumps(chunk))
        for chunk in answer.end():
            await say(dumps(chunk))
    except RequestError as error:
        await say(dumps(error.body()), more=False)
    else:
        await say(b"[DONE]", more=False)


async def _listen(receive: Receive, inbox: Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.end(ClientGone())


def _ending() -> RequestError:
    return RequestError(503, "the server is stopping", headers={"Connection": "close"})


def _busy(why: str) -> RequestError:
    return RequestError(429, f"{why}: try again later", headers={"Retry-After": "5"})


def _failure(error: Exception) -> RequestError:
    """What nobody has foreseen, which the log has in full."""
    traceback.print_exception(error, file=sys.stderr)
    kind = type(error).__name__
    return RequestError(503, f"the server failed on this request ({kind}); the log says where")


def make_app(service: Service, access: Access) -> Starlette:
    """The application: five paths."""
    paths = {
        "/v1/completions": Route(
            "/v1/completions", service.endpoint(service.completion), methods=["POST"]
        ),
        "/v1/chat/completions": Route(
            "/v1/chat/completions", service.endpoint(service.chat), methods=["POST"]
        ),
        "/v1/models": Route("/v1/models", service.models),
        "/v1/models/{name}": Route("/v1/models/{name:path}", service.model),
        "/health": Route("/health", lambda request: JSONResponse({"status": "ok"})),
    }

    def refuse(request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, RequestError):
            return error.response()
        if not isinstance(error, HTTPException):
            return _failure(error).response()
        what = {404: "is not here", 405: f"does not take {request.method}"}
        said = what.get(error.status_code, str(error.detail))
        message = f"{shortened(request.scope['path'])} {said}: this server has {', '.join(paths)}"
        return RequestError(error.status_code, message, headers=error.headers).response()

    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(access.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    app = Starlette(
        routes=list(paths.values()),
        middleware=[*([cors] if access.origins else []), Middleware(Guard, access=access)],
        exception_handlers={RequestError: refuse, HTTPException: refuse, Exception: refuse},
    )
    app.router.redirect_slashes = False
    return app
