"""`python -m mixbits.serve DIR`: an OpenAI-compatible server of a packed model.

Here are the command line and what is checked before anything is loaded; the server itself is
`mixbits.server`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Parser, exit_code, passive_threads, quiet
from .errors import UsageError, plain_errors

if TYPE_CHECKING:
    from .server.http import Server

MAX_BODY = 4  # MB
WAITING = 64  # requests


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m mixbits.serve",
        description="Serve a packed model: /v1/completions, /v1/chat/completions, /v1/models.",
        epilog="Without --api-key, or MIXBITS_API_KEY in the environment, whoever can reach the "
        "port may ask: listen to more than this machine in a network you trust.",
    )
    parser.add_argument(
        "folder", metavar="DIR", help="output of mixbits.quantize, or its name on the hub"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--device", help="cpu, or cuda where there is one (default)")
    parser.add_argument("--name", help="what requests call the model (the folder's name)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="new tokens that a request may ask for (as many as the model has positions)",
    )
    parser.add_argument(
        "--max-body", type=float, default=MAX_BODY, metavar="MB", help="(%(default)s)"
    )
    parser.add_argument(
        "--int8-activations",
        action="store_true",
        help="let ...A16 schemes round activations to 8 bits on a CPU: prompts are read faster, "
        "with an error of about 0.6 %% in each product",
    )
    parser.add_argument("--api-key", metavar="KEY", help="what clients must send (any may ask)")
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of http://their.address ask, or of any (*); may be repeated",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this server than its addresses, or any (*); may be repeated",
    )
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    if args.api_key is None:
        args.api_key = os.environ.get("MIXBITS_API_KEY") or None
    _check_values(args)
    return args


def _check_values(args: argparse.Namespace) -> None:
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens must be at least 1: got {args.max_tokens}")
    if not 0.001 <= args.max_body <= 1024:
        raise UsageError(f"--max-body must be 0.001 to 1024 MB: got {args.max_body:g}")
    for option, value in (("--api-key", args.api_key), ("--name", args.name)):
        if value is not None and not (value.strip() and value.isprintable()):
            raise UsageError(f"{option} must be printable and not empty")


def _check(args: argparse.Namespace) -> tuple[Path, list[socket.socket]]:
    """What would fail once the model is loaded should fail at once.

    Returns the model's folder, and sockets that are bound.
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError("serving needs more packages: pip install starlette uvicorn h11")
    from .checkpoint.transformers_quantizer import read_config
    from .server.http import bind
    from .source.source import find_folder, open_source

    folder = find_folder(args.folder)
    read_config(folder)
    if not open_source(str(folder), quantized=True).has_tokenizer:
        raise UsageError(f"serving needs a tokenizer, and {folder} has none")
    return folder, bind(args.host, args.port)


class Serving:
    """A model that is served: `run` until a signal comes, or `start` and `close`."""

    def __init__(
        self, folder: Path, args: argparse.Namespace, sockets: Sequence[socket.socket]
    ) -> None:
        """Load the model. Raises UsageError for a folder that cannot be loaded or generate."""
        from .server.app import Service, make_app
        from .server.http import Server
        from .server.prompts import Limits, Prompts, positions_of
        from .server.worker import Worker

        self._args, self._sockets = args, list(sockets)
        self.engine = _engine(folder, args)
        tokenizer, vocabulary = self.engine.tokenizer, self.engine.vocabulary
        positions = positions_of(self.engine.model.config, tokenizer)
        most = min(args.max_tokens or positions, positions)
        limits = Limits(positions, most, self.engine.vocabulary_size)
        self._worker = Worker(self.engine)
        name = args.name or _name(args.folder)
        self.service = Service(
            name,
            self._worker,
            Prompts(tokenizer, vocabulary, limits),
            vocabulary,
            max_body=int(args.max_body * 1e6),
            waiting=WAITING,
            aliases=[args.folder],
        )
        app = make_app(self.service, _access(args))
        self.server: Server = Server(app, self._say, self.service.end)
        self._thread: threading.Thread | None = None

    def _say(self) -> None:
        from .server.http import url

        limits, key = self.service.limits, "an" if self._args.api_key else "no"
        print(
            f"serving {self.service.name} at {url(self._args.host, self._sockets)}/v1: "
            f"{limits.positions} tokens of prompt and answer, {limits.max_tokens} new ones, "
            f"bodies of {self._args.max_body:g} MB, {WAITING} waiting requests at most; "
            f"{key} API key is asked for",
            flush=True,
        )

    def run(self) -> None:
        """Serve until the server is stopped."""
        try:
            self.server.run(self._sockets)
        except OSError as error:
            raise UsageError(f"cannot listen at {self._args.host}: {error}") from error
        finally:
            for bound in self._sockets:
                bound.close()
            self.service.close()
            self._worker.close(seconds=2.0)

    def start(self) -> None:
        """Serve in a thread."""
        self._thread = threading.Thread(target=self.run, name="server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End what `start` began."""
        self.server.stop()
        if self._thread is not None:
            self._thread.join()


def _name(folder: str) -> str:
    """Of a folder its own name, whatever leads there; of a model on the hub its whole name."""
    path = Path(folder)
    return path.resolve().name or "model" if path.is_dir() else folder


def _engine(folder: Path, args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoTokenizer

    from .checkpoint.loading import load
    from .server.generation import Engine

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with plain_errors(f"cannot serve {folder}"):
        model = load(folder, device=device, int8_activations=args.int8_activations)
        engine = Engine(model, AutoTokenizer.from_pretrained(folder))
        engine.check()
    return engine


def _access(args: argparse.Namespace) -> Any:
    from .server.access import Access

    return Access((args.host, *args.allow_host), tuple(args.allow_origin), args.api_key)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM while the model is loaded is what SIGINT is, and either is how a server ends."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main else None
    try:
        with suppress(KeyboardInterrupt):
            yield
    except BaseException:  # it goes on as it is
        if in_main:
            signal.signal(signal.SIGTERM, before)
        raise


def _command(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    with _ended_by_signals():
        quiet()
        folder, sockets = _check(args)
        Serving(folder, args, sockets).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # neither a thread nor one more signal has a say in it


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    passive_threads()
    return exit_code(lambda: _command(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
