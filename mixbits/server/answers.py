"""The shapes of OpenAI's answers: whole ones, chunks of a stream, log-probabilities."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .jobs import Done, Piece, Token
from .requests import ChatRequest, CompletionRequest, Request
from .texts import Vocabulary


def dumps(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


@dataclass
class Choice:
    """What has come of one job."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    done: Done | None = None

    def add(self, event: Piece | Done) -> None:
        if isinstance(event, Done):
            self.done = event
        else:
            self.text += event.text
            self.tokens += event.tokens


class Shape(Protocol):
    """How one endpoint answers."""

    name: str
    chunk: str
    prefix: str

    def whole(self, choice: Choice) -> dict[str, Any]: ...

    def first(self) -> dict[str, Any] | None: ...

    def piece(self, piece: Piece) -> dict[str, Any]: ...

    def last(self) -> dict[str, Any]: ...


class CompletionShape:
    """/v1/completions: a choice is a text."""

    name = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, request: CompletionRequest, vocabulary: Vocabulary) -> None:
        self._wanted, self._vocabulary = request.top is not None, vocabulary

    def whole(self, choice: Choice) -> dict[str, Any]:
        return self._choice(choice.text, choice.tokens)

    def first(self) -> None:
        return None

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece.text, piece.tokens)

    def last(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _choice(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(tokens) if self._wanted else None}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        name = self._vocabulary.text
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            # Of tokens that read the same, the likeliest counts; the one that was taken is there.
            top = {name(id): value for id, value in reversed(token.top)}
            tops.append(None if token.logprob is None else {name(token.id): token.logprob} | top)
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }


class ChatShape:
    """/v1/chat/completions: a choice is a message of the assistant."""

    name, chunk = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary) -> None:
        self._wanted, self._vocabulary = request.top is not None, vocabulary

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.tokens)}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def piece(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text}, "logprobs": self._logprobs(piece.tokens)}

    def last(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._wanted:
            return None
        content = []
        for token in tokens:
            top = [self._one(id, value) for id, value in token.top]
            content.append({**self._one(token.id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _one(self, id: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self._vocabulary.text(id), self._vocabulary.bytes(id)
        return {"token": text, "logprob": logprob, "bytes": raw}


class Answer:
    """One answer to a request, whole or in chunks: its id, its model's name, its usage."""

    def __init__(self, request: Request, shape: Shape, prompts: Sequence[Sequence[int]]) -> None:
        self._request, self._shape = request, shape
        self._prompt_tokens = sum(map(len, prompts))
        self._generated = 0
        self._common = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._generated,
            "total_tokens": self._prompt_tokens + self._generated,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        shown = []
        for index, choice in enumerate(choices):
            assert choice.done is not None
            self._generated += choice.done.generated
            shown.append(
                {
                    "index": index,
                    **self._shape.whole(choice),
                    "finish_reason": choice.done.reason,
                }
            )
        return {
            **self._common,
            "object": self._shape.name,
            "choices": shown,
            "usage": self.usage(),
        }

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """What a stream says before a choice begins."""
        if (content := self._shape.first()) is not None:
            yield self._chunk(index, content, None)

    def chunk(self, index: int, event: Piece | Done) -> dict[str, Any]:
        if isinstance(event, Done):
            self._generated += event.generated
            return self._chunk(index, self._shape.last(), event.reason)
        return self._chunk(index, self._shape.piece(event), None)

    def end(self) -> Iterator[dict[str, Any]]:
        """What a stream says when all choices have ended."""
        if self._request.wants_usage:
            yield {
                **self._common,
                "object": self._shape.chunk,
                "choices": [],
                "usage": self.usage(),
            }

    def _chunk(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "finish_reason": reason}
        usage = {"usage": None} if self._request.wants_usage else {}
        return {**self._common, "object": self._shape.chunk, "choices": [choice], **usage}
