"""What serving costs beside `generate`: `python -m benchmarks.kernels.serving DIR`.

DIR is an output of mixbits.quantize, such as mixbits-demo. The same greedy tokens come from
`generate` in this process, and over loopback from `python -m mixbits.serve`, as one answer and as a
stream; the three take turns. Milliseconds per token are those between the first token and the last;
for one answer, of the whole request.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two processes share the cores

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from transformers import AutoTokenizer

import mixbits
from benchmarks.tools.records import Records
from benchmarks.tools.timing import machine, percentile
from mixbits.report.tables import table

RESULTS = Path(__file__).parents[1] / "results" / "serving.csv"
KEY = ("model", "way")
COLUMNS = (*KEY, "tokens", "ms_per_token", "ms_p20", "ms_p80", "first_ms", "more_than_generate_ms")
PROMPT = "def read(path):\n    "


class Clock:
    """A streamer: when each token came. The prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.times.pop(0)


Way = Callable[[int], list[float]]  # seconds after the request at which each of n tokens was there


def by_generate(folder: Path) -> Way:
    model, tokenizer = mixbits.load(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def run(tokens: int) -> list[float]:
        clock, start = Clock(), time.perf_counter()
        model.generate(
            inputs["input_ids"],
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )
        return [at - start for at in clock.times]

    return run


@contextmanager
def served(folder: Path) -> Iterator[Any]:
    """An OpenAI client of a server of its own."""
    import openai

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "mixbits.serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, TimeoutError):
                if process.poll() is not None:
                    raise SystemExit(
                        f"{' '.join(command)} ended with {process.returncode}"
                    ) from None
                time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.wait()


def by_server(client: Any, folder: Path, stream: bool) -> Way:
    def run(tokens: int) -> list[float]:
        start = time.perf_counter()
        options: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "stream": stream}
        answer = client.completions.create(model=str(folder), prompt=PROMPT, **options)
        if not stream:
            if answer.usage.completion_tokens != tokens:
                raise SystemExit(f"the text ends after {answer.usage.completion_tokens} tokens")
            return [time.perf_counter() - start]
        return [time.perf_counter() - start for part in answer if part.choices[0].text]

    return run


def per_token(times: list[float], tokens: int) -> float:
    """Milliseconds."""
    if len(times) == 1:
        return 1e3 * times[0] / tokens
    return 1e3 * (times[-1] - times[0]) / (tokens - 1)


def measure(ways: dict[str, Way], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way; they take turns, and the first round is not counted."""
    steps: dict[str, list[float]] = {name: [] for name in ways}
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            times = run(tokens)
            if number:
                steps[name].append(per_token(times, tokens))
                firsts[name] += [1e3 * times[0]] if len(times) > 1 else []
    rows = []
    for name in ways:
        more = [s - g for s, g in zip(steps[name], steps["generate"], strict=True)]
        rows.append(
            {
                "way": name,
                "tokens": tokens,
                "ms_per_token": round(percentile(steps[name], 50), 3),
                "ms_p20": round(percentile(steps[name], 20), 3),
                "ms_p80": round(percentile(steps[name], 80), 3),
                "first_ms": round(percentile(firsts[name], 50), 2) if firsts[name] else "",
                "more_than_generate_ms": round(percentile(more, 50), 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.serving")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(machine())
    torch.manual_seed(0)
    with served(args.folder) as client:
        ways = {
            "generate": by_generate(args.folder),
            "served, streamed": by_server(client, args.folder, stream=True),
            "served": by_server(client, args.folder, stream=False),
        }
        rows = measure(ways, args.tokens, args.rounds)
    records = Records(args.csv, COLUMNS, KEY)
    shown = ["way", "ms_per_token", "ms_p20", "ms_p80", "first_ms", "more_than_generate_ms"]
    cells = [["", *shown[1:], "ratio"]]
    for row in rows:
        records.append({"model": args.folder.name, **row})
        ratio = row["ms_per_token"] / rows[0]["ms_per_token"]
        cells.append([*(str(row[name]) for name in shown), f"{ratio:.2f}"])
    print(table(cells))


if __name__ == "__main__":
    main()
