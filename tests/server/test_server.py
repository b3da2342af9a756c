"""What a request may ask for, and tokens as text that can be sent: without a server."""

from __future__ import annotations

import json
import random
import sys
import typing
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixbits import demo

pytest.importorskip("starlette")

from mixbits.server.errors import RequestError
from mixbits.server.generation import log_probabilities
from mixbits.server.jobs import Piece
from mixbits.server.prompts import Limits, Prompts, TemplateBounds, bounded
from mixbits.server.requests import ChatRequest, CompletionRequest, Request, parse
from mixbits.server.texts import Decoder, StopStrings, Transcript, Vocabulary

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
ENDPOINTS: list[tuple[type[Request], dict[str, Any]]] = [
    (ChatRequest, CHAT),
    (CompletionRequest, COMPLETION),
]


def refusal(kind: type[Request], body: object) -> RequestError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        parse(kind, raw)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return caught.value


# -------------------------------------------------------------------------------- fields

# Values that ask for nothing, of fields of OpenAI's API.
DEFAULTS: dict[str, list[Any]] = {
    "n": [1],
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "logit_bias": [{}],
    "user": ["x"],
    "metadata": [{}, {"a": "b"}],
    "store": [False],
    "service_tier": ["auto", "default"],
    "parallel_tool_calls": [True, False],
    "temperature": [1, 0, 2, 1.0],
    "top_p": [1, 1.0],
    "presence_penalty": [0, 0.0, -2, 2],
    "frequency_penalty": [0],
    "stop": [[], "x", ["a", "b", "c", "d"]],
    "stream": [False, True],
    "echo": [False],
    "best_of": [1],
    "suffix": [""],
    "seed": [0, -1, 2**63 - 1],
    "modalities": [["text"]],
    "verbosity": ["medium"],
    "reasoning_effort": ["medium", "none"],
    "max_tokens": [1, 10**6],
    "prompt_cache_key": ["k"],
    "safety_identifier": ["k"],
}
WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 129, "1", 1.5, True, [], {}],
    "tools": [[{"type": "function"}], {}, "x", 0],
    "functions": [[{}], "x"],
    "tool_choice": ["required", {"type": "function"}, ["auto"], 1],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, {}, "text", []],
    "logit_bias": [{"a": 1}, {"1": 101}, {"1": "1"}, {"1": None}, {"-1": 1}, [], {"1": True}],
    "user": [1, [], {}],
    "metadata": [{"a": 1}, [], "x"],
    "store": [True, 0, "false"],
    "service_tier": ["flex", 1],
    "parallel_tool_calls": ["x", 1, 0],
    "temperature": [-0.1, 2.1, "warm", True, [1], float("nan"), float("inf"), -float("inf")],
    "top_p": [0, -1, 1.1, 3, float("nan"), "1"],
    "presence_penalty": [-2.1, 3, float("nan"), "0"],
    "frequency_penalty": [10**400, 2.5],
    "stop": ["", ["a"] * 5, [1], {}, 1, [""], ["a", None], "x" * 1001],
    "stream": [1, 0, "true", []],
    "stream_options": [True, [], {"x": 1}],
    "seed": [1.5, float("inf"), 2**63, -(2**63) - 1, "1", True],
    "modalities": [["text", "audio"], "text"],
    "max_tokens": [-1, 1.5, "3", True, float("inf"), []],
    "max_completion_tokens": [-1, "3"],
    "model": [None, 1, [], {}],
    "top_k": [-2, 1.5, "x"],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 11, float("inf")],
    "audio": [{}],
    "prediction": [{"type": "content"}],
    "web_search_options": [{}],
    "no_such_field": [None, 1],
    "chat_template": [None, "x"],
    "generation_config": [{"num_beams": 2000}],
}


@pytest.mark.parametrize(("kind", "body"), ENDPOINTS)
def test_what_asks_for_nothing_is_accepted(kind: type[Request], body: dict[str, Any]) -> None:
    for name, values in DEFAULTS.items():
        for value in [*values, None]:
            assert isinstance(parse(kind, json.dumps(body | {name: value}).encode()), kind)


@pytest.mark.parametrize(("kind", "body"), ENDPOINTS)
def test_what_is_not_done_is_refused_by_name(kind: type[Request], body: dict[str, Any]) -> None:
    for name, values in WRONG.items():
        for value in values:
            error = refusal(kind, body | {name: value})
            assert error.status == 400 and name in str(error) and name in str(error.param)


def test_every_field_of_openais_client_is_known() -> None:
    """A field that its users can set is accepted as null, or where it is required, refused so."""
    openai = pytest.importorskip("openai")
    chat = openai.types.chat.completion_create_params
    theirs = {
        ChatRequest: typing.get_type_hints(chat.CompletionCreateParamsNonStreaming),
        CompletionRequest: typing.get_type_hints(
            openai.types.completion_create_params.CompletionCreateParamsNonStreaming
        ),
    }
    for kind, body in ENDPOINTS:
        unknown = theirs[kind].keys() - kind.model_fields.keys()
        assert len(theirs[kind]) > 15 and not unknown
        for name in theirs[kind].keys() - body.keys():
            parse(kind, json.dumps(body | {name: None}).encode())


def test_fields_that_depend_on_each_other() -> None:
    for kind, body, more in [
        (ChatRequest, CHAT, {"top_logprobs": 2}),
        (ChatRequest, CHAT, {"logprobs": True, "top_logprobs": 21}),
        (ChatRequest, CHAT, {"max_tokens": 0}),
        (ChatRequest, CHAT, {"max_tokens": 2, "max_completion_tokens": 3}),
        (ChatRequest, CHAT, {"stream_options": {"include_usage": True}}),
        (CompletionRequest, COMPLETION, {"best_of": 2}),
        (CompletionRequest, COMPLETION, {"logprobs": 6}),
        (CompletionRequest, COMPLETION, {"prompt": ["a", "b"], "n": 65}),
        (CompletionRequest, COMPLETION, {"suffix": "x"}),
    ]:
        assert refusal(kind, {**body, **more}).status == 400
    request = parse(ChatRequest, json.dumps({**CHAT, "logprobs": True}).encode())
    assert request.top == 0
    request = parse(ChatRequest, json.dumps({**CHAT, "max_completion_tokens": 7}).encode())
    assert request.new_tokens == 7


def test_prompts_are_texts_or_tokens() -> None:
    for prompt, expected in [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ]:
        body = json.dumps({"model": "m", "prompt": prompt}).encode()
        assert parse(CompletionRequest, body).prompt == expected
    for wrong in (None, 1, [], [[]], [1, "a"], [1.5], [True], {"a": 1}, [None], [[1], "a", {}]):
        assert refusal(CompletionRequest, {"model": "m", "prompt": wrong}).param == "prompt"
    assert "prompt is required" in str(refusal(CompletionRequest, {"model": "m"}))
    assert "model is required" in str(refusal(CompletionRequest, {"prompt": "x"}))


def test_messages_are_text() -> None:
    def content(of: object, role: str = "user", **more: object) -> Any:
        message = {"role": role, "content": of, **more}
        body = json.dumps({"model": "m", "messages": [message]}).encode()
        return parse(ChatRequest, body).messages[0].for_template()

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert content(parts) == {"role": "user", "content": "a\nb"}
    assert content("a", "developer") == {"role": "system", "content": "a"}
    # What OpenAI's client gives back of an answer.
    kept = {"refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    assert content("a", "assistant", function_call=None, **kept)["content"] == "a"
    assert content("a", name="Ann")["name"] == "Ann"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    audio = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    for wrong in ([image], [parts[0], audio], [{"type": "text"}], [], 1, {}, ["a"], None, [None]):
        error = refusal(
            ChatRequest, {"model": "m", "messages": [{"role": "user", "content": wrong}]}
        )
        assert "messages[0].content" in str(error)
    for message in (
        {"role": "wizard", "content": "a"},
        {"role": "tool", "content": "a", "tool_call_id": "x"},
        {"role": None, "content": "a"},
        {"content": "a"},
        {"role": "user", "content": "a", "mood": "good"},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]},
        "hello",
        None,
        [],
    ):
        assert refusal(ChatRequest, {"model": "m", "messages": [message]}).param == "messages"
    for messages in ("hello", [], None, {}, 1):
        assert refusal(ChatRequest, {"model": "m", "messages": messages}).param == "messages"


def test_variables_of_a_template_are_no_template() -> None:
    body = {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}
    request = parse(ChatRequest, json.dumps(body).encode())
    assert request.chat_template_kwargs == {"enable_thinking": False}
    for name in ("chat_template", "tools", "tokenize", "messages", "return_dict", "padding"):
        error = refusal(ChatRequest, {**CHAT, "chat_template_kwargs": {name: "x"}})
        assert error.param == "chat_template_kwargs" and name in str(error)
    for wrong in ("x", [], {"a": []}, {"a": {"b": 1}}):
        refusal(ChatRequest, {**CHAT, "chat_template_kwargs": wrong})


def test_bodies_that_are_no_requests() -> None:
    bodies = [b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe{}", b"[" * 10**5]
    bodies += [b'{"a":' * 10**5, b'{"model": "\\ud800", "prompt": "x"}', b"{} {}", b"{'a': 1}"]
    bodies += [b'{"model": "m", "prompt": "\xed\xa0\x80"}', b"\x00", b"\xef\xbb\xbf{}"]
    bodies += [b'{"model": "m", "prompt": "x", "seed": 1' + b"0" * 10**4 + b"}"]
    for body in bodies:
        assert refusal(CompletionRequest, body).status == 400


# -------------------------------------------------------------------------------- text


def sentencepiece() -> Any:
    """A tokenizer as Llama 2 has: a space before words, dropped in front; bytes as a fallback."""
    words = ["▁the", "▁cat", "s", "▁", "é", "▁é"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = models.BPE(
        {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {
        "bytes": AutoTokenizer.from_pretrained(demo.MODEL_DIR),
        "sentencepiece": sentencepiece(),
    }


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_pieces_make_the_text_that_decoding_at_once_gives(
    kind: str, tokenizers: dict[str, Any]
) -> None:
    tokenizer, rng = tokenizers[kind], random.Random(0)
    parts = [[token] for token in range(len(tokenizer))]
    if kind == "sentencepiece":  # of bytes that are no text it makes another text at once
        parts = [[token] for token in range(len(tokenizer)) if not 3 <= token < 259]
        parts += [[3 + byte for byte in text.encode()] for text in ("a", "ß", "🙂", "\n")]
    for count in (0, 1, 2, 5, 40, 300):
        ids = [token for _ in range(count) for token in rng.choice(parts)]
        decoder = Decoder(tokenizer)
        pieces = [decoder.add(token) for token in ids]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces) + decoder.end() == whole
        assert not any(piece.endswith("\ufffd") for piece in pieces)


def test_characters_of_several_tokens_come_whole(tokenizers: dict[str, Any]) -> None:
    for tokenizer in tokenizers.values():
        ids = tokenizer("né 🙂", add_special_tokens=False)["input_ids"]
        ids = [token for token in ids if token != tokenizer.unk_token_id]
        decoder = Decoder(tokenizer)
        pieces = [decoder.add(token) for token in ids]
        assert pieces[-1] == "🙂" and len(pieces) > len("".join(pieces))


def test_a_completion_keeps_the_space_after_its_prompt(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    the, cat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat"])
    assert Decoder(tokenizer).add(cat) == "cat"  # as an answer in a chat begins
    assert Decoder(tokenizer, [the]).add(cat) == " cat"


def test_stop_strings_are_cut_at_the_first_whatever_the_pieces() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(30)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))) for _ in range(3)]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        _, place = min(ends, default=(0, len(text)))
        cutter, sent, ended, rest = StopStrings(stops), "", False, text
        while rest and not ended:
            size = rng.randrange(1, 5)
            more, ended = cutter.add(rest[:size])
            sent, rest = sent + more, rest[size:]
            assert text[:place].startswith(sent)  # never more than what stays
        assert (sent if ended else sent + cutter.end()) == text[:place]
        assert ended == any(stop in text for stop in stops)


def test_tokens_of_an_answer_begin_in_its_text(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    ids = tokenizer("one two three four", add_special_tokens=False)["input_ids"]

    def transcribed(*stops: str) -> list[Piece]:
        transcript = Transcript(tokenizer, stops)
        pieces = []
        for token in ids:
            if not transcript.is_stopped:
                pieces.append(transcript.add(token))
        return [*pieces, transcript.end()]

    for stops, text in (
        ((), "one two three four"),
        (("o t", "zz"), "one tw"),
        (("ree f",), "one two th"),
    ):
        pieces = transcribed(*stops)
        assert "".join(piece.text for piece in pieces) == text
        tokens = [token for piece in pieces for token in piece.tokens]
        assert [token.id for token in tokens] == ids[: len(tokens)]
        assert all(token.offset < len(text) for token in tokens)
        ends = [*(token.offset for token in tokens[1:]), len(text)]
        for token, end in zip(tokens, ends, strict=True):
            assert tokenizer.decode([token.id]).startswith(text[token.offset : end])


def test_single_tokens_are_written_with_their_bytes(tokenizers: dict[str, Any]) -> None:
    for kind, tokenizer in tokenizers.items():
        vocabulary = Vocabulary(tokenizer)
        ids = tokenizer("🙂", add_special_tokens=False)["input_ids"]
        ids = [token for token in ids if token != tokenizer.unk_token_id]
        raw = [byte for token in ids for byte in vocabulary.bytes(token) or ()]
        assert bytes(raw).decode() == "🙂" and all(
            vocabulary.text(token).startswith("bytes:\\x") for token in ids
        ), kind
    vocabulary = Vocabulary(tokenizers["sentencepiece"])
    cat = tokenizers["sentencepiece"].convert_tokens_to_ids("▁cat")
    assert vocabulary.text(cat) == " cat" and vocabulary.bytes(cat) == list(b" cat")


def test_log_probabilities_are_those_of_float64() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 5
    logits[0, :] = -float("inf")
    logits[0, 3] = 0.0
    tokens = [3, 1, 2, 3, 4, 5, 6]
    expected = torch.log_softmax(logits.double(), -1)
    for row, (value, top) in enumerate(log_probabilities(logits, tokens, 3)):
        assert value == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        best = expected[row].topk(3)
        if row:
            assert [token for token, _ in top] == best.indices.tolist()
        assert all(-9999 <= value <= 0 for _, value in top)


# -------------------------------------------------------------------------------- prompts


@pytest.fixture
def prompts(tokenizers: dict[str, Any]) -> Prompts:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    return Prompts(tokenizer, Vocabulary(tokenizer), Limits(100, 50, len(tokenizer)))


def test_prompts_that_are_too_long_are_refused(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="200 tokens, 100 at most") as caught:
        prompts.of_ids([5] * 200, "prompt")
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match=r"tokens, 100 at most"):
        prompts.of_text("a b c d " * 60, "prompt")
    monkeypatch.setattr(prompts, "_tokenizer", None)  # it is not even asked
    with pytest.raises(RequestError, match="characters"):
        prompts.of_text("a" * 10**6, "prompt")


def test_there_is_room_for_what_is_asked_or_it_is_refused(prompts: Prompts) -> None:
    prompt = [5] * 90
    assert prompts.room(prompt, None, None) == 10 and prompts.room(prompt, None, 3) == 3
    assert prompts.room([5] * 10, None, None) == 50  # the server's own limit
    assert prompts.room(prompt, 10, None) == 10 and prompts.room([5] * 100, 0, 16) == 0
    for length, asked, message in ((90, 11, "make 101, 100 at most"), (10, 51, "at most 50")):
        with pytest.raises(RequestError, match=message):
            prompts.room([5] * length, asked, None)
    with pytest.raises(RequestError, match="100 at most"):
        prompts.room([5] * 100, None, 16)


def test_token_ids_are_the_models(prompts: Prompts) -> None:
    for wrong in (-1, prompts.limits.vocabulary, 10**30):
        with pytest.raises(RequestError, match="token ids of prompt must be 0 to"):
            prompts.of_ids([1, wrong], "prompt")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('only one message') }}", "only one message"),
        ("{{ messages[7].content }}", "refuses these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for a in", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages|tokens"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "ended"),
        (
            "{% set n = namespace(s='aaaaaaaa') %}"
            "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "takes more than 200 MB",
        ),
        ("{{ 'a' * 10000000 }}", "characters"),
    ],
)
def test_what_a_template_does_not_take_is_said(
    template: str | None, why: str, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.2 if why == "ended" else 60.0
    monkeypatch.setattr("mixbits.server.prompts.TEMPLATE_SECONDS", seconds)
    monkeypatch.setattr("mixbits.server.prompts.TEMPLATE_BYTES", 200 << 20)
    monkeypatch.setattr("mixbits.server.prompts._QUICK", 0.01)
    prompts._tokenizer.chat_template = template
    with pytest.raises(RequestError, match=why) as caught:
        prompts.of_messages([{"role": "user", "content": "hi"}], {})
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_a_deadline_ends_a_loop_and_nothing_after_it() -> None:
    def loop() -> None:
        while True:
            len([])

    before = sys.gettrace()
    with pytest.raises(TemplateBounds), bounded(0.05, 1 << 30):
        loop()
    assert sys.gettrace() is before  # what comes after is traced no more
