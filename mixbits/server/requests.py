"""What a body may ask for: models of the two requests, and nothing that is taken and ignored.

A field is done, or it is refused by name. Fields of OpenAI's API that ask for what is not done
here may be null, or have the values that ask for nothing (`only`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError, from_json

from .errors import RequestError, shortened

MAX_CHOICES = 128  # of one request
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 1000
_SIGNED_64 = 1 << 63


def _wrong(what: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{what}", {"what": what})


def only(*values: Any) -> PlainValidator:
    """Of a field that may be null, or what asks for nothing."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(v) and value == v for v in values):
            return value
        raise _wrong(f"must be {' or '.join(map(json.dumps, [None, *values]))}, as it is not done")

    return PlainValidator(check)


def _stops(value: Any) -> list[str]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(x, str) and x for x in found):
        raise _wrong("must be a string, or a list of strings, none of them empty")
    if len(found) > MAX_STOPS or any(len(x) > MAX_STOP_CHARACTERS for x in found):
        raise _wrong(f"must be {MAX_STOPS} strings of {MAX_STOP_CHARACTERS} characters at most")
    return found


def _prompts(value: Any) -> list[str | list[int]]:
    """A list of prompts, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    if _is_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(x, str) or _is_ids(x) for x in value):
        return value
    raise _wrong(
        "must be a string, a list of strings, a list of token ids, or a list of such lists, "
        "none of them empty"
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


def _biases(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("must be an object of token ids and numbers")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise _wrong(f"must name token ids: got {shortened(key)}")
        if type(bias) not in (int, float) or not abs(bias) <= 100:
            raise _wrong(f"must be numbers from -100 to 100: got {shortened(bias)} for {key}")
    return {int(key): float(bias) for key, bias in value.items()}


def _variables(value: Any) -> dict[str, Any]:
    """Variables of the folder's template: not a template, nor what transformers is told."""
    taken = (
        "add_generation_prompt continue_final_message conversation documents max_length messages"
    )
    taken += " padding return_dict tokenize tokenizer_kwargs tools truncation chat_template"
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("must be an object of variables of the model's own template")
    for name, variable in value.items():
        if name in taken.split() or name.startswith(("return_", "sanitize_", "_")):
            raise _wrong(f"must not set {shortened(name)}: the template is the model's own")
        if not isinstance(variable, str | int | float | bool | None):
            raise _wrong(f"must be strings, numbers or booleans: got another for {shortened(name)}")
    return value


def _content(value: Any) -> str | None:
    """A text, or text parts, joined by line breaks."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _wrong("must be a string, or a list of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise _wrong(f"must be text parts only, as nothing else is read: got {shortened(part)}")
    return "\n".join(part["text"] for part in value)


_Stops = Annotated[Any, PlainValidator(_stops)]
_Biases = Annotated[Any, PlainValidator(_biases)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # pads streams against listeners: none is added


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, PlainValidator(_content)] = None
    name: str | None = None
    # What OpenAI's answers hold, and clients send back.
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None
    tool_call_id: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None

    def for_template(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": self.content or "", **named}


class Request(_Model):
    """What both endpoints take."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: _Stops = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-_SIGNED_64, lt=_SIGNED_64)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: _Biases = Field(default_factory=dict)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not of OpenAI's API.
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)] | None = None
    # Who asks, and hints: answers do not depend on them.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    metadata: dict[str, str] | None = None
    # Not done.
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    modalities: Annotated[Any, only(["text"])] = None
    moderation: Annotated[Any, only()] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    prediction: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only({}, {"mode": "implicit"})] = None
    reasoning_effort: Annotated[Any, only("none", "medium")] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    tools: Annotated[Any, only([])] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    @property
    def choices(self) -> int:
        """How many answers are made of each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Of how many of the likeliest tokens log-probabilities are wanted; None for no token's."""
        raise NotImplementedError

    def _check(self) -> None:
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise RequestError(
                400, "max_tokens and max_completion_tokens must be the same", "max_tokens"
            )
        if self.stream_options is not None and not self.stream:
            raise RequestError(400, "stream_options needs stream: true", "stream_options")


class CompletionRequest(Request):
    prompt: Annotated[Any, PlainValidator(_prompts)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: Annotated[Any, only("")] = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    def _check(self) -> None:
        super()._check()
        if self.best_of not in (None, self.choices):
            raise RequestError(
                400, "best_of must be null or n: all choices are returned", "best_of"
            )
        if len(self.prompt) * self.choices > MAX_CHOICES:
            raise RequestError(
                400,
                f"prompt and n must make at most {MAX_CHOICES} choices: "
                f"got {len(self.prompt)} prompts and n = {self.choices}",
                "prompt",
            )


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: Annotated[Any, PlainValidator(_variables)] = Field(default_factory=dict)
    best_of: Annotated[Any, only(1)] = None
    echo: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def _check(self) -> None:
        super()._check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if self.new_tokens == 0:
            raise RequestError(400, "max_tokens must be at least 1: got 0", "max_tokens")
        for number, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise RequestError(400, f"messages[{number}].content is required", "messages")


AnyRequest = TypeVar("AnyRequest", bound=Request)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """A body as a request of its kind. Raises RequestError: one sentence that names the field."""
    try:
        found = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {shortened(str(error), 200)}") from error
    if not isinstance(found, dict):
        raise RequestError(400, f"the body must be a JSON object: got a {type(found).__name__}")
    try:
        request = kind.model_validate(found)
    except ValidationError as error:
        raise _refusal(error) from error
    request._check()
    return request


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    field = str(first["loc"][0]) if first["loc"] else None
    kind, said = first["type"], first["msg"]
    if kind == "extra_forbidden":
        return RequestError(400, f"unknown field: {shortened(place)}", field and field[:80])
    if kind == "missing":
        return RequestError(400, f"{place} is required", field)
    sentence = said[:1].lower() + said[1:]
    return RequestError(400, f"{place}: {sentence}: got {_shown(first['input'])}", field)


def _shown(value: Any) -> str:
    """JSON's words for what Python has others for."""
    plain = value is None or isinstance(value, bool)
    return json.dumps(value) if plain else shortened(value)
