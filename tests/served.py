"""The bundled model, packed, and the real command that serves it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mixbits import demo, serve
from mixbits.checkpoint import saving as checkpoint
from mixbits.formats.recipes import parse_recipe
from mixbits.model.layout import find_linears
from mixbits.server.jobs import Done
from mixbits.source.source import open_source

TEMPLATE = "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}"
PROMPT = "def read(path):\n"


def pack_demo(out: Path) -> Path:
    """Write the bundled model in MXFP4 and MXFP8, rounded to nearest; returns `out`."""
    out.mkdir()
    source = open_source(str(demo.MODEL_DIR))
    model = source.load()
    linears = find_linears(model, include_head=True)
    schemes = [parse_recipe(name) for name in ("MXFP4", "MXFP8")]
    assignment = {info.name: schemes[i % 2] for i, info in enumerate(linears)}
    checkpoint.save(out, source, model, linears, assignment, {})
    return out


class Command:
    """The real command in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "mixbits.serve", str(folder), "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()  # once it listens
        if not self.said.startswith("serving "):
            pytest.fail(f"the server did not come up: {self.process.communicate()[1]}")
        self.port = int(self.said.partition("/v1:")[0].rpartition(":")[2])

    def end(self, number: int = signal.SIGTERM, again: bool = False) -> tuple[int, str]:
        """The exit code and what it has written to stderr; `again`: signals until it has ended."""
        self.process.send_signal(number)
        while again and self.process.poll() is None:
            self.process.send_signal(number)
            time.sleep(0.01)
        errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode, errors


def to_serve(folder: Path) -> Path:
    """What `pack_demo` writes into `folder`, with a chat template."""
    out = pack_demo(folder / "packed")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def send(port: int, **body: Any) -> socket.socket:
    """A connection on which a request for a completion has been sent."""
    raw = json.dumps({"model": "packed", "prompt": PROMPT, "temperature": 0, **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock = socket.create_connection(("127.0.0.1", port), timeout=120)
    sock.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return sock


class Served:
    """The server in this process, whose jobs can be seen."""

    def __init__(self, folder: Path, *options: str) -> None:
        args = serve.parse_arguments([str(folder), "--port", "0", *options])
        found, sockets = serve._check(args)
        self.port = sockets[0].getsockname()[1]
        self.serving = serve.Serving(found, args, sockets)
        self.ends: list[str] = []
        self.begun = threading.Semaphore(0)
        run, engine = self.serving.engine.run, self.serving.engine

        def watched(job: Any) -> None:
            emit, events = job.emit, []
            job.emit = lambda event: (events.append(event), emit(event))
            self.begun.release()
            run(job)
            self.ends.append("done" if events and isinstance(events[-1], Done) else "cancelled")

        engine.run = watched
        self.serving.start()
        while not self.serving.server.started:
            time.sleep(0.01)

    def wait(self, ends: int) -> list[str]:
        """How jobs have ended, once there are so many."""
        give_up = time.monotonic() + 60
        while len(self.ends) < ends and time.monotonic() < give_up:
            time.sleep(0.01)
        return self.ends
