"""Odd requests by raw HTTP: each is answered, none with 500, and the server is as it was.

Seeded; MIXBITS_FUZZ_SECONDS is how long it goes on, a second otherwise.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Command, send, to_serve

SECONDS = float(os.environ.get("MIXBITS_FUZZ_SECONDS", "1"))
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
PATHS = ("/v1/completions", "/v1/chat/completions")
FIELDS = """
    model prompt messages max_tokens max_completion_tokens temperature top_p n stop seed
    presence_penalty frequency_penalty logit_bias stream stream_options top_k min_p logprobs
    repetition_penalty user metadata echo best_of suffix top_logprobs chat_template_kwargs tools
    response_format functions tool_choice modalities audio store service_tier role num_beams
    generation_config chat_template __class__
"""
ODD = [None, True, False, 0, 1, -1, 2, 3, 1.5, 1e-9, -0.0, 10**30, 2**63, -(2**63), 1e308]
ODD += [float("nan"), float("inf"), -float("inf"), "", "x", "1", "\x00", "\ud800", "🙂" * 9, [], {}]
ODD += [[None], [[]], [1], [-1], [[1, 2], [3]], ["a", "b"], [1, "a"], {"1": 1}, {"a": {"b": []}}]
ODD += ["x" * 9999, [0] * 600, ["x"] * 200, {"type": "text"}, "{{ 7 * 7 }}", "<|endoftext|>"]
ODD += [[{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text"}]}]]
ODD += [[{"role": "assistant", "content": "x"}] * 3, {"include_usage": True}, "null", "../x"]
# Values that may be answered, at the edges of what is done: these go through the model.
EDGES: dict[str, list[Any]] = {
    "max_tokens": [0, 1, 3, 400],
    "temperature": [0, 1e-9, 1e-5, 0.01, 2],
    "top_p": [1e-300, 1e-9, 0.5, 1],
    "top_k": [-1, 0, 1, 1 << 31],
    "min_p": [0, 1e-300, 1],
    "n": [1, 2, 5],
    "seed": [0, -1, 2**63 - 1, -(2**63)],
    "stop": ["e", ["", "x"], ["<|endoftext|>"], ["\n", "\x00", "🙂", " "]],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "repetition_penalty": [0.1, 10],
    "logit_bias": [{"0": 100, "65": -100}, {"0": -100}, {"999999999": 1}],
    "logprobs": [0, 5, True],
    "top_logprobs": [0, 20],
    "echo": [True, False],
    "stream": [True],
    "prompt": ["", " ", "\x00", "🙂é", "<|endoftext|>", [0], [[0], [0]], ["a", [5]]],
    "messages": [[{"role": "developer", "content": ""}], [{"role": "user", "content": "\x00"}]],
    "chat_template_kwargs": [{"messages_": 1}, {"bos_token": "x"}, {"range": 1}, {"loop": None}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_serve(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    command = Command(folder, "--max-body", "0.1", "--max-tokens", "400")
    before = _resources(command.process.pid)
    try:
        assert _text(command.port)
        yield command.port
        assert _text(command.port)
        _settle(lambda: _resources(command.process.pid)[0] <= before[0] + 2)
        assert _resources(command.process.pid)[1] < before[1] + 200e6
        assert command.end() == (0, "")
    finally:
        command.process.kill()


def _resources(pid: int) -> tuple[int, float]:
    """Open descriptors, and bytes in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return len(os.listdir(f"/proc/{pid}/fd")), float(pages * os.sysconf("SC_PAGE_SIZE"))


def _settle(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def _exchange(port: int, raw: bytes) -> bytes:
    """All that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as sock:
        parts = []
        try:
            sock.sendall(raw)
            while part := sock.recv(1 << 16):
                parts.append(part)
        except (BrokenPipeError, ConnectionResetError):
            assert parts or len(raw) > 1 << 16
        return b"".join(parts)


def _post(path: str, body: bytes, more: bytes = b"") -> bytes:
    head = b"POST " + path.encode() + b" HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n"
    return head + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _status(answer: bytes) -> int:
    """Of a whole answer, an error of which must have OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status < 500, answer[:500]
    assert b'data: {"error"' not in body, answer[-500:]
    if status >= 400:
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        assert "\n" not in error["message"] and len(error["message"]) < 1000
    return status


def _text(port: int) -> str:
    body = {"model": "packed", "prompt": "def f(", "max_tokens": 8, "temperature": 0}
    answer = _exchange(port, _post(PATHS[0], json.dumps(body).encode()))
    assert _status(answer) == 200
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"])


def _odd_body(rng: random.Random) -> tuple[str, bytes]:
    path = rng.choice(PATHS)
    other = "messages" if path == PATHS[0] else "prompt"
    body: dict[str, Any] = {"model": "packed", "max_tokens": rng.choice([1, 2])}
    if path == PATHS[0]:
        body["prompt"] = rng.choice(["x", ["a", "b"], [5, 6]])
    else:
        body["messages"] = [{"role": "user", "content": "hi"}]
    if is_odd := rng.random() < 0.4:
        body[rng.choice(FIELDS.split())] = rng.choice(ODD)
    for name in rng.sample(sorted(EDGES), rng.randrange(1, 5)):
        if (name in ("prompt", "echo")) <= (path == PATHS[0]) and name != other:
            body[name] = rng.choice(EDGES[name])
    raw = json.dumps(body).encode()
    kind = rng.randrange(10) if is_odd else -1
    if kind == 0:
        raw = raw[: rng.randrange(len(raw))]
    elif kind == 1:
        place = rng.randrange(len(raw))
        raw = raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    return path, raw


def test_odd_bodies(port: int) -> None:
    expected, rng = _text(port), random.Random(0)
    end, counts = time.monotonic() + SECONDS, Counter[int]()
    while time.monotonic() < end or sum(counts.values()) < 60:
        path, raw = _odd_body(rng)
        counts[_status(_exchange(port, _post(path, raw)))] += 1
    print(dict(counts))
    assert counts[200] and counts[400] and _text(port) == expected


LONG = {"max_tokens": 380, "logit_bias": {"65": 100}}
BODY = b'{"model": "packed", "prompt": "x", "max_tokens": 1}'
POST = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

# What is sent, and the statuses that may answer it.
RAW: dict[str, tuple[bytes, set[int]]] = {
    "no HTTP": (b"hello\r\n\r\n", {400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n" * 9, {400}),
    "a flood of headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20000, {400}),
    "a long header": (b"GET / HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 10**5, {400}),
    "no host": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", {400, 403}),
    "a wrong host": (
        b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        {403},
    ),
    "another origin": (_post(PATHS[0], BODY, b"Origin: http://evil.example\r\n"), {403}),
    "a large body": (_post(PATHS[0], b" " * 200_000), {413}),
    "a body said to be huge": (
        b"POST /v1/completions HTTP/1.1\r\n"
        + HEAD
        + b"Connection: close\r\nContent-Length: 99999999999\r\n\r\n",
        {413},
    ),
    "a negative length": (
        b"POST /v1/completions HTTP/1.1\r\n"
        + HEAD
        + b"Connection: close\r\nContent-Length: -1\r\n\r\n",
        {400},
    ),
    "two lengths": (_post(PATHS[0], BODY, b"Content-Length: 5\r\n"), {400}),
    "chunks": (CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n", {200}),
    "large chunks": (CHUNKED + (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 9, {413}),
    "wrong chunks": (CHUNKED + b"zz\r\n", {400}),
    "nested lists": (_post(PATHS[0], b"[" * 90_000), {400}),
    "nested objects": (_post(PATHS[0], b'{"a":' * 18_000), {400}),
    "no type": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        {400},
    ),
    "a template": (
        _post(PATHS[1], b'{"model": "packed", "messages": [], "chat_template": "{{ 1 }}"}'),
        {400},
    ),
    "beams": (_post(PATHS[0], BODY[:-1] + b', "num_beams": 9}'), {400}),
    "a path out": (
        b"GET /../../etc/passwd HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n",
        {404},
    ),
    "an upgrade": (
        b"GET /v1/models HTTP/1.1\r\n" + HEAD + b"Connection: Upgrade, close\r\n"
        b"Upgrade: websocket\r\nSec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n\r\n",
        {200, 400},
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_requests(name: str, port: int) -> None:
    raw, statuses = RAW[name]
    assert _status(_exchange(port, raw)) in statuses


def test_crowds(port: int) -> None:
    """Streams that are read, streams that leave, halves of requests, and many in a row."""
    expected, rng = _text(port), random.Random(1)
    halves = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for sock in halves:
        raw = _post(PATHS[0], BODY)
        sock.sendall(raw[: rng.randrange(len(raw))])
    leaving = [send(port, stream=True, **LONG) for _ in range(20)]
    for sock in leaving:
        sock.close()
    body = json.dumps({**json.loads(BODY), "stream": True, "max_tokens": 3}).encode()
    answers: list[bytes] = []

    def one() -> None:
        answers.append(_exchange(port, _post(PATHS[0], body)))

    threads = [threading.Thread(target=one) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    statuses = Counter(map(_status, answers))
    assert len(answers) == 40 and statuses.keys() <= {200, 429} and statuses[200]
    assert all(answer.count(b"[DONE]") == 1 for answer in answers if _status(answer) == 200)
    for sock in halves:
        sock.close()
    for _ in range(50):
        assert _text(port) == expected
