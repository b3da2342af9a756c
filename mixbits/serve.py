"""`python -m mixbits.serve DIR`: an OpenAI-compatible server of a packed model.

The server is transformers' own (`transformers serve`), one request after the other. Here are its
checks at the start, and what its answers lack: what a request did wrong, the model's name, and
sampling where a temperature is given.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve the server's own

import argparse
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .command import Parser, exit_code
from .formats import UsageError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m mixbits.serve",
        description="Serve a packed model: /v1/completions, /v1/chat/completions, /v1/models. "
        "There is no authentication: listen to more than this machine in a network you trust.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="output of mixbits.quantize")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--device", help="cpu, or cuda where there is one (default)")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """What would fail once the model is loaded should fail at once."""
    from transformers.utils.import_utils import is_serve_available

    from .source import open_source
    from .transformers_quantizer import read_config

    read_config(args.folder)
    if not is_serve_available():
        raise UsageError("serving needs more packages: pip install 'transformers[serving]'")
    if not open_source(str(args.folder), quantized=True).has_tokenizer:
        raise UsageError(f"serving needs a tokenizer, and {args.folder} has none")
    if "@" in str(args.folder):
        raise UsageError(f"the server takes @ for a revision: {args.folder} needs another name")
    try:
        socket.create_server((args.host, args.port)).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen at {args.host}, port {args.port}: {error}") from None


def bad_request(request: Any, error: Any) -> Any:
    """What clients of OpenAI print. transformers' server says 500, to a lack of a template too."""
    from fastapi.responses import JSONResponse

    what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    body = {"message": getattr(error, "detail", what), "type": "invalid_request_error"}
    return JSONResponse({"error": body}, status_code=getattr(error, "status_code", 400))


def _let_sample(handler: Any) -> None:
    """A temperature, or top_p, asks for sampling, also where the model's own way is greedy."""
    build = handler._build_generation_config

    def build_generation_config(body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = build(body, *args, **kwargs)
        asked = [body[name] for name in ("temperature", "top_p") if body.get(name) is not None]
        if asked:
            config.do_sample = float(asked[0]) > 0
        return config

    handler._build_generation_config = build_generation_config


def _completed(build: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `build_server`, and what it lacks."""
    from fastapi import HTTPException
    from jinja2 import TemplateError

    def build_server(manager: Any, *args: Any, **kwargs: Any) -> Any:
        model = {"id": manager.force_model, "object": "model", "created": 0, "owned_by": "mixbits"}
        manager.get_gen_models = lambda: [model]  # else those of the hub's cache
        print(f'requests must name the model "{manager.force_model}"', flush=True)
        for handler in (*args, *kwargs.values()):
            if hasattr(handler, "_build_generation_config"):
                _let_sample(handler)
        app = build(manager, *args, **kwargs)
        for kind in (HTTPException, ValueError, TypeError, KeyError, TemplateError):
            app.add_exception_handler(kind, bad_request)
        return app

    return build_server


def start(folder: Path, host: str, port: int, device: str, background: bool = False) -> Any:
    """Load the model and serve it, until stopped or, in the background, `kill_server` is called.

    Raises UsageError for a folder that cannot be loaded.
    """
    from unittest.mock import patch

    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    from .command import plain_errors

    completed = patch.object(server, "build_server", _completed(server.build_server))
    with plain_errors(f"cannot serve {folder}"), completed:
        return Serve(
            force_model=str(folder),
            host=host,
            port=port,
            device=device,
            log_level="error",
            non_blocking=background,
        )


def _command(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    import torch

    from .report import quiet

    quiet()
    _check(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(KeyboardInterrupt):  # that is how a server ends
        start(args.folder, args.host, args.port, device)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: _command(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
