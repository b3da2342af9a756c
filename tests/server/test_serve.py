"""The bundled model served over loopback, asked by OpenAI's own client and by raw HTTP."""

from __future__ import annotations

import http.client
import json
import math
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from served import PROMPT, Command, Served, send, to_serve
from tiny import make_model
from transformers import AutoTokenizer

import mixbits
from mixbits import serve
from mixbits.runtime.token_step import TokenStep

openai = pytest.importorskip("openai")
for extra in ("starlette", "uvicorn", "h11"):
    pytest.importorskip(extra)

HI = [{"role": "user", "content": "read a file"}]
POSITIONS = 512  # of the bundled model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_serve(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Command]:
    command = Command(folder, "--max-body", "0.1")
    try:
        yield command
        assert command.end(again=True) == (0, "")
    finally:
        command.process.kill()


def client(port: int, **options: Any) -> Any:
    url = f"http://127.0.0.1:{port}/v1"
    return openai.OpenAI(
        **{"base_url": url, "api_key": "none", "max_retries": 0, "timeout": 120, **options}
    )


@pytest.fixture(scope="module")
def server(running: Command) -> Any:
    return client(running.port)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return mixbits.load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(model: Any, tokenizer: Any) -> str:
    """What `generate` makes of PROMPT, without the server."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(inputs["input_ids"], max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def complete(server: Any, prompt: Any = PROMPT, **options: Any) -> Any:
    wanted = {"max_tokens": 24, "temperature": 0, **options}
    return server.completions.create(model="packed", prompt=prompt, **wanted)


def chat(server: Any, **options: Any) -> Any:
    wanted = {"max_tokens": 16, "temperature": 0, "messages": HI, **options}
    return server.chat.completions.create(model="packed", **wanted)


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Status and JSON of a request by raw HTTP; of an error, what is in its "error"."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    own = {"Content-Type": "application/json"} | (headers or {})
    connection.request(method, path, raw, own)
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    if response.status < 400:
        return response.status, found
    assert found.keys() == {"error"} and found["error"].keys() == {
        "message",
        "type",
        "param",
        "code",
    }
    assert found["error"]["message"] and "\n" not in found["error"]["message"]
    return response.status, found["error"]


# -------------------------------------------------------------------------------- answers


def test_completions(server: Any, expected: str) -> None:
    answer = complete(server)
    assert answer.choices[0].text == expected and answer.object == "text_completion"
    parts = list(complete(server, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected
    assert len(parts) > 10 and parts[-1].choices[0].finish_reason == "length"
    assert len({part.id for part in parts}) == 1


def test_chat_is_the_templates_prompt_completed(server: Any) -> None:
    whole, parts = chat(server), list(chat(server, stream=True))
    text = whole.choices[0].message.content
    assert text and text == "".join(p.choices[0].delta.content or "" for p in parts)
    assert parts[0].choices[0].delta.role == whole.choices[0].message.role == "assistant"
    assert text == complete(server, "# read a file\n", max_tokens=16).choices[0].text
    split = [{"role": "user", "content": [{"type": "text", "text": "read a file"}]}]
    assert chat(server, messages=split).choices[0].message.content == text


def test_a_temperature_is_heeded(server: Any, expected: str) -> None:
    """The model's generation_config.json does not ask for sampling, like most."""

    def texts(**options: Any) -> list[str]:
        return [complete(server, seed=s, **options).choices[0].text for s in (1, 2, 1)]

    for options in ({"temperature": 1.5}, {"temperature": None, "top_p": 0.99}):
        first, second, again = texts(**options)
        assert first == again != second
    assert texts(temperature=0) == [expected] * 3


def test_stop_strings_end_an_answer(server: Any, expected: str) -> None:
    for stop in (expected[6:9], ["never there", expected[6:9]], [expected[6:9], expected[12:]]):
        cut = expected[: expected.index(expected[6:9])]
        choice = complete(server, stop=stop).choices[0]
        assert (choice.text, choice.finish_reason) == (cut, "stop")
        parts = list(complete(server, stop=stop, stream=True))
        assert "".join(part.choices[0].text for part in parts) == cut
        assert parts[-1].choices[0].finish_reason == "stop"
    assert complete(server, stop="never there").choices[0].text == expected
    text = chat(server).choices[0].message.content
    choice = chat(server, stop=text[4:7]).choices[0]
    assert choice.message.content == text[: text.index(text[4:7])]
    assert choice.finish_reason == "stop"


def reference(model: Any, prompt: list[int], new: int) -> tuple[list[int], Any]:
    """A greedy sequence of `generate`, and log-probabilities [T - 1, vocab] of what follows."""
    with torch.no_grad():
        read = model(torch.tensor([prompt])).logits[0, :-1]
    found = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    rows = torch.cat([read.float(), *(row.float() for row in found.logits)])
    return found.sequences[0].tolist(), torch.log_softmax(rows, -1)


def test_log_probabilities_are_those_of_the_model(server: Any, model: Any, tokenizer: Any) -> None:
    prompt = tokenizer(PROMPT)["input_ids"]
    found = complete(server, logprobs=3, echo=True, max_tokens=6).choices[0]
    shown = found.logprobs
    ids, rows = reference(model, prompt, 6)
    assert found.text.startswith(PROMPT) and len(shown.tokens) == len(ids)
    assert shown.token_logprobs[0] is None and shown.top_logprobs[0] is None
    for place in range(1, len(ids)):
        value = float(rows[place - 1, ids[place]])
        assert shown.token_logprobs[place] == pytest.approx(value, abs=1e-3)
        assert shown.top_logprobs[place][shown.tokens[place]] == shown.token_logprobs[place]
        best = max(shown.top_logprobs[place].values())
        assert best == pytest.approx(float(rows[place - 1].max()), abs=1e-3)
    assert "".join(shown.tokens) == found.text and shown.text_offset[0] == 0
    plain = complete(server, logprobs=0, max_tokens=6).choices[0].logprobs
    assert plain.token_logprobs == shown.token_logprobs[len(prompt) :]


def test_log_probabilities_of_a_chat(server: Any) -> None:
    whole = chat(server, logprobs=True, top_logprobs=2).choices[0]
    assert "".join(one.token for one in whole.logprobs.content) == whole.message.content
    for one in whole.logprobs.content:
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob)  # temperature 0
        assert bytes(one.bytes).decode() == one.token == one.top_logprobs[0].token
        assert len(one.top_logprobs) == 2 and math.exp(one.logprob) <= 1
    parts = chat(server, logprobs=True, top_logprobs=2, stream=True)
    streamed = [part.choices[0].logprobs for part in parts]
    flat = [one for some in streamed if some for one in some.content]
    assert flat == whole.logprobs.content
    assert chat(server, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_several_choices_and_prompts(server: Any, tokenizer: Any, expected: str) -> None:
    other = "class Reader:\n"
    alone = complete(server, other).choices[0].text
    answer = complete(server, [PROMPT, other], n=2)
    assert [choice.text for choice in answer.choices] == [expected, expected, alone, alone]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = [tokenizer(text)["input_ids"] for text in (PROMPT, other)]
    assert complete(server, ids[0]).choices[0].text == expected
    assert [choice.text for choice in complete(server, ids).choices] == [expected, alone]
    assert answer.usage.prompt_tokens == sum(map(len, ids))  # of each prompt once
    assert answer.usage.completion_tokens == 4 * 24
    sampled = chat(server, n=3, temperature=1.5, seed=1).choices
    assert len({choice.message.content for choice in sampled}) > 1
    texts = ["", "", ""]
    for part in chat(server, n=3, temperature=1.5, seed=1, stream=True):
        texts[part.choices[0].index] += part.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in sampled]


def test_echo(server: Any, expected: str) -> None:
    assert complete(server, echo=True).choices[0].text == PROMPT + expected
    parts = complete(server, echo=True, stream=True)
    assert "".join(part.choices[0].text for part in parts) == PROMPT + expected
    nothing = complete(server, echo=True, max_tokens=0)
    assert nothing.choices[0].text == PROMPT and nothing.usage.completion_tokens == 0


def test_usage(server: Any, tokenizer: Any) -> None:
    prompt = len(tokenizer(PROMPT)["input_ids"])
    usage = complete(server, max_tokens=5).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 5)
    assert usage.total_tokens == prompt + 5
    *parts, last = complete(
        server, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage == usage and last.choices == []
    assert all(part.usage is None for part in parts)
    assert complete(server, max_tokens=None).usage.completion_tokens == 16


def test_penalties_and_biases_change_the_text(server: Any, tokenizer: Any, expected: str) -> None:
    first = tokenizer(expected, add_special_tokens=False)["input_ids"][0]
    banned = complete(server, logit_bias={str(first): -100}).choices[0].text
    assert banned and banned[:1] != expected[:1]
    forced = complete(server, logit_bias={"65": 100}, max_tokens=4, logprobs=0).choices[0]
    assert forced.logprobs.tokens == [tokenizer.decode([65])] * 4
    loop = {"logit_bias": {"65": 30}, "max_tokens": 24, "logprobs": 0}
    penalized = complete(server, frequency_penalty=2, presence_penalty=2, **loop)
    assert set(penalized.choices[0].logprobs.tokens) > {tokenizer.decode([65])}


def test_eight_requests_at_a_time_get_their_own_answers(server: Any) -> None:
    prompts = [f"def f{i}(x):\n" for i in range(8)]
    alone = [complete(server, prompt).choices[0].text for prompt in prompts]
    gate = threading.Barrier(8)

    def one(prompt: str) -> str:
        gate.wait()
        return str(complete(server, prompt).choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, prompts)) == alone
    assert len(set(alone)) > 1


# -------------------------------------------------------------------------------- refusals


def test_bad_requests_are_told_what_is_wrong(server: Any, expected: str) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": "warm"}, "warm"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": [1, "a"]}, "must be a string"),
        ({"prompt": [10**6]}, "token ids of prompt"),
        ({"n": 0}, "n: "),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"extra_body": {"tools": [{"type": "function"}]}}, "tools"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
        ({"extra_body": {"generation_config": {"num_beams": 2}}}, "generation_config"),
    ]
    for options, message in bad:
        with pytest.raises(openai.BadRequestError, match=message):
            complete(server, **options)
    with pytest.raises(openai.BadRequestError, match="messages"):
        server.post("/chat/completions", body={"model": "packed"}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat(server, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    with pytest.raises(openai.NotFoundError, match="only 'packed'"):
        server.completions.create(model="gpt-4", prompt="x")
    assert complete(server).choices[0].text == expected  # it lives


def test_null_and_what_asks_for_nothing_is_accepted(server: Any, expected: str) -> None:
    nothing = {"n": 1, "tools": [], "response_format": {"type": "text"}, "stop": None}
    answer = complete(server, extra_body={**nothing, "logit_bias": None, "user": "x"})
    assert answer.choices[0].text == expected


def test_limits(running: Command, server: Any) -> None:
    body: dict[str, Any] = {"model": "packed", "prompt": "x" * 10**5}
    status, error = ask(running.port, "POST", "/v1/completions", body)
    assert status == 413 and "--max-body" in error["message"]
    for prompt, tokens in (("x = 1\n" * 400, 1), ("x", POSITIONS), ([5] * POSITIONS, 1)):
        status, error = ask(
            running.port, "POST", "/v1/completions", body | {"prompt": prompt, "max_tokens": tokens}
        )
        assert status == 400 and f"{POSITIONS} at most" in error["message"]
        assert error["code"] == "context_length_exceeded"
    long = [{"role": "user", "content": "x = 1\n" * 400}]
    with pytest.raises(openai.BadRequestError, match=f"{POSITIONS} at most"):
        chat(server, messages=long)
    assert complete(server, [5] * (POSITIONS - 1), max_tokens=1).usage.total_tokens == POSITIONS


def test_other_paths_and_methods_are_not_there(running: Command) -> None:
    for path in ("/load_model", "/reset", "/docs", "/", "/v1/embeddings", "/openapi.json", "/v1/"):
        for method in ("GET", "POST"):
            status, error = ask(running.port, method, path, {} if method == "POST" else None)
            assert status == 404 and "/v1/completions" in error["message"]
    for method, path in (("GET", "/v1/completions"), ("POST", "/v1/models"), ("PUT", "/health")):
        assert ask(running.port, method, path)[0] == 405
    assert ask(running.port, "GET", "/v1/models/other")[1]["code"] == "model_not_found"


def test_the_models_name_is_listed(running: Command, server: Any) -> None:
    assert [model.id for model in server.models.list()] == ["packed"]
    assert server.models.retrieve("packed").id == "packed"
    assert running.said.startswith("serving packed at http://127.0.0.1:")


def test_pages_and_names_of_others_may_not_ask(running: Command) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        status, error = ask(running.port, "GET", "/v1/models", None, headers)
        assert status == 403 and "--allow-" in error["message"]
    body = {"model": "packed", "prompt": "x", "max_tokens": 1}
    plain = {"Content-Type": "text/plain"}  # which a page may send without asking
    assert ask(running.port, "POST", "/v1/completions", body, plain)[0] == 400
    own = {"Origin": f"http://127.0.0.1:{running.port}"}
    assert ask(running.port, "POST", "/v1/completions", body, own)[0] == 200


# -------------------------------------------------------------------------------- clients leave


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    found = Served(folder, "--device", "cpu")
    yield found
    found.serving.close()


def test_clients_that_leave_end_their_generation(served: Served, expected: str) -> None:
    forever = {"max_tokens": POSITIONS - 20, "logit_bias": {"65": 100}}
    served.ends.clear()
    for stream in (False, True):
        sock = send(served.port, stream=stream, **forever)
        assert served.begun.acquire(timeout=60)
        if stream:
            assert sock.recv(100)
        sock.close()
    assert served.wait(2) == ["cancelled"] * 2
    first = send(served.port, **forever)
    assert served.begun.acquire(timeout=60)
    queued = send(served.port, **forever)
    queued.close()
    first.close()
    assert complete(client(served.port)).choices[0].text == expected
    assert served.wait(4)[2:] == ["cancelled", "done"]  # the queued one has never begun


def test_requests_take_the_native_step(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    call = TokenStep.__call__

    def count(self: TokenStep, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(TokenStep, "__call__", count)
    complete(client(served.port), max_tokens=9)
    assert taken == [False] + 8 * [True]  # the prompt, and what follows the first new token


def test_without_a_template_chat_is_a_clear_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.serving.engine.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="chat_template is not set"):
        chat(client(served.port))


def test_a_model_that_fails_is_no_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Any) -> None:
        raise MemoryError("secret words")

    with monkeypatch.context() as patch:
        patch.setattr(served.serving.engine, "run", fail)
        status, error = ask(
            served.port, "POST", "/v1/completions", {"model": "packed", "prompt": "x"}
        )
        assert status == 503 and "MemoryError" in error["message"]
        assert "secret" not in error["message"]
        with pytest.raises(openai.APIError, match="MemoryError"):
            list(complete(client(served.port), stream=True))
    assert complete(client(served.port)).choices[0].text


# -------------------------------------------------------------------------------- the command


def test_a_signal_ends_a_server_that_streams(folder: Path, expected: str) -> None:
    options = ("--api-key", "sesame", "--name", "mine", "--max-tokens", "500", "--device", "cpu")
    command = Command(folder, *options, "--allow-origin", "http://page.example")
    try:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client(command.port).models.list()
        server = client(command.port, api_key="sesame")
        assert [model.id for model in server.models.list()] == ["mine"]
        key = {"Authorization": "Bearer sesame", "Origin": "http://page.example"}
        assert ask(command.port, "GET", "/v1/models", None, key)[0] == 200
        with pytest.raises(openai.BadRequestError, match="at most 500"):
            server.completions.create(model="mine", prompt="x", max_tokens=501)
        wanted: dict[str, Any] = {"max_tokens": 480, "logit_bias": {"65": 100}, "stream": True}
        stream = server.completions.create(model="mine", prompt="x", **wanted)
        next(stream)
        assert command.end() == (0, "")
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
    finally:
        command.process.kill()


def test_what_cannot_be_served_is_said_first(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serve, "Serving", lambda *args: pytest.fail("never reached"))
    plain = make_model(tmp_path / "plain")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            ([plain], "no mixbits checkpoint"),
            ([tmp_path / "none"], "none"),
            ([bare], "needs a tokenizer"),
            ([folder, "--port", port], "cannot listen at 127.0.0.1"),
            ([folder, "--port", "99999"], "cannot listen at 127.0.0.1"),
            ([folder, "--host", "no.such.host.invalid"], "cannot listen at no.such.host"),
            ([folder, "--max-tokens", "0"], "--max-tokens must be at least 1"),
            ([folder, "--max-body", "0"], "--max-body must be"),
            ([folder, "--api-key", " "], "--api-key must be"),
            ([folder, "--name", "a\nb"], "--name must be"),
        ]
        for words, message in cases:
            assert serve.main([str(word) for word in words]) == 2
            assert message in capsys.readouterr().err


def test_the_missing_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert serve.main([str(folder)]) == 2
    assert "pip install starlette uvicorn h11" in capsys.readouterr().err


def test_it_listens_to_this_machine_only_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve.parse_arguments(["DIR"]).host == "127.0.0.1"
    assert serve.parse_arguments(["DIR", "--host", "0.0.0.0"]).host == "0.0.0.0"
    monkeypatch.setenv("MIXBITS_API_KEY", "sesame")
    assert serve.parse_arguments(["DIR"]).api_key == "sesame"
