"""The bundled model served over loopback, asked by OpenAI's own client."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from transformers import AutoTokenizer

import mixbits
from mixbits import checkpoint, demo, serve
from mixbits.decode import DecodeStep
from mixbits.formats import parse_scheme
from mixbits.model import find_linears
from mixbits.source import open_source

openai = pytest.importorskip("openai")

TEMPLATE = "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}"
PROMPT = "def read(path):\n"


def pack_demo(out: Path) -> Path:
    """Write the bundled model in MXFP4 and MXFP8, rounded to nearest; returns `out`."""
    out.mkdir()
    source = open_source(str(demo.MODEL_DIR))
    model = source.load()
    linears = find_linears(model, include_head=True)
    schemes = [parse_scheme(name) for name in ("MXFP4", "MXFP8")]
    assignment = {info.name: schemes[i % 2] for i, info in enumerate(linears)}
    checkpoint.save(out, source, model, linears, assignment, {})
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = pack_demo(tmp_path_factory.mktemp("serve") / "packed")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def client(port: int) -> Any:
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        time.sleep(0.2)
    pytest.fail("the server did not come up")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    """A client of the real command."""
    port = free_port()
    command = [sys.executable, "-m", "mixbits.serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ, text=True)
    try:
        yield client(port)
    finally:
        process.terminate()
        errors = process.communicate(timeout=30)[1]
        assert "Traceback" not in errors


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """What `generate` makes of PROMPT, without the server."""
    model, tokenizer = mixbits.load(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(inputs["input_ids"], max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def complete(server: Any, folder: Path, prompt: str = PROMPT, **options: Any) -> Any:
    wanted = {"max_tokens": 24, "temperature": 0, **options}
    return server.completions.create(model=str(folder), prompt=prompt, **wanted)


def test_completions(server: Any, folder: Path, expected: str) -> None:
    answer = complete(server, folder)
    assert answer.choices[0].text == expected and answer.usage.completion_tokens == 24
    parts = list(complete(server, folder, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected
    assert len(parts) > 10 and parts[-1].choices[0].finish_reason == "length"


def test_chat_is_the_templates_prompt_completed(server: Any, folder: Path) -> None:
    messages = [{"role": "user", "content": "read a file"}]
    options: dict[str, Any] = {"model": str(folder), "max_tokens": 16, "temperature": 0}
    whole = server.chat.completions.create(messages=messages, **options)
    parts = list(server.chat.completions.create(messages=messages, stream=True, **options))
    text = whole.choices[0].message.content
    assert text and text == "".join(p.choices[0].delta.content or "" for p in parts)
    assert text == complete(server, folder, "# read a file\n", max_tokens=16).choices[0].text


def test_a_temperature_is_heeded(server: Any, folder: Path, expected: str) -> None:
    """The model's generation_config.json does not ask for sampling, like most."""

    def texts(**options: Any) -> list[str]:
        seeds = (1, 2, 1)
        return [complete(server, folder, seed=s, **options).choices[0].text for s in seeds]

    for options in ({"temperature": 1.5}, {"temperature": None, "top_p": 0.99}):
        first, second, again = texts(**options)
        assert first == again != second
    assert texts(temperature=0) == [expected] * 3


def test_eight_requests_at_a_time_get_their_own_answers(server: Any, folder: Path) -> None:
    prompts = [f"def f{i}(x):\n" for i in range(8)]
    alone = [complete(server, folder, prompt).choices[0].text for prompt in prompts]
    gate = threading.Barrier(8)

    def ask(prompt: str) -> str:
        gate.wait()
        return str(complete(server, folder, prompt).choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert len(set(alone)) > 1


def test_bad_requests_are_told_what_is_wrong(server: Any, folder: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": -1}, "max_new_tokens"),
        ({"temperature": "warm"}, "warm"),
        ({"prompt": [1, 2]}, "must be a string"),
        ({"model": "gpt-4"}, "pinned to"),
    ]
    for options, message in bad:
        with pytest.raises(openai.BadRequestError, match=message):
            server.completions.create(**{"model": str(folder), "prompt": "x", **options})
    with pytest.raises(openai.BadRequestError, match="messages"):
        server.post("/chat/completions", body={"model": str(folder)}, cast_to=object)
    assert complete(server, folder).choices[0].text  # it lives


def test_the_models_name_is_listed(server: Any, folder: Path) -> None:
    assert [model.id for model in server.models.list()] == [str(folder)]


def test_without_a_template_chat_is_a_clear_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, to see that requests take the native step, too."""
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    taken = []
    call = DecodeStep.__call__

    def count(self: DecodeStep, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(DecodeStep, "__call__", count)
    port = free_port()
    running = serve.start(tmp_path / "base", "127.0.0.1", port, "cpu", background=True)
    try:
        ask = client(port)
        with pytest.raises(openai.BadRequestError, match="chat_template is not set"):
            messages = [{"role": "user", "content": "hi"}]
            ask.chat.completions.create(model=str(tmp_path / "base"), messages=messages)
        complete(ask, tmp_path / "base", max_tokens=9)
    finally:
        running.kill_server()
    assert taken == [False] + 8 * [True]  # the prompt, and what follows the first new token


# -------------------------------------------------------------------------------- the command


def test_what_cannot_be_served_is_said_first(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serve, "start", lambda *args: pytest.fail("never reached"))
    plain = make_model(tmp_path / "plain")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    at = tmp_path / "a@b"
    shutil.copytree(folder, at)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            ([plain], "no mixbits checkpoint"),
            ([tmp_path / "none"], "cannot read"),
            ([bare], "needs a tokenizer"),
            ([at], "takes @ for a revision"),
            ([folder, "--port", port], "cannot listen at 127.0.0.1"),
            ([folder, "--port", "99999"], "cannot listen at 127.0.0.1"),
            ([folder, "--host", "no.such.host.invalid"], "cannot listen at no.such.host"),
        ]
        for words, message in cases:
            assert serve.main([str(word) for word in words]) == 2
            assert message in capsys.readouterr().err


def test_the_missing_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert serve.main([str(folder)]) == 2
    assert "pip install 'transformers[serving]'" in capsys.readouterr().err


def test_it_listens_to_this_machine_only_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve.parse_arguments(["DIR"]).host == "127.0.0.1"
    assert serve.parse_arguments(["DIR", "--host", "0.0.0.0"]).host == "0.0.0.0"
    assert not torch.cuda.is_available() or serve.parse_arguments(["DIR"]).device is None
