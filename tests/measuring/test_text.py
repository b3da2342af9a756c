"""Token sequences: where they come from, that none is used twice, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixbits.errors import UsageError
from mixbits.measuring.hub_data import check_datasets, is_dataset_name
from mixbits.measuring.text import (
    Sequences,
    cut,
    listed,
    load_sequences,
    read_tokens,
    split,
)


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def read(source: Path | str, count: int = 1000) -> list[int]:
    return read_tokens(str(source), Letters(), count).tolist()


def as_text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_a_text_file_is_one_stream(tmp_path: Path) -> None:
    for name in ("a.txt", "a.py", "a"):
        path = tmp_path / name
        path.write_text("Grün\n\nist", encoding="utf-8")
        assert as_text(read(path)) == "Grün\n\nist"


def test_jsonl_texts_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert as_text(read(path)) == "one\n\ntwo"


def test_token_ids_from_npy_and_json(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]], dtype=np.uint16))
    (tmp_path / "flat.json").write_text("[1, 2, 3, 4]")
    (tmp_path / "nested.json").write_text("[[1, 2, 3], [4]]")
    for name in ("a.npy", "flat.json", "nested.json"):
        ids = read_tokens(str(tmp_path / name), None, 4)
        assert ids.tolist() == [1, 2, 3, 4]
        assert ids.dtype == torch.int64


def test_long_text_is_read_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 400}) + "\nnot json\n")
    assert len(read(path, count=10)) == 400  # the second line is never looked at
    with pytest.raises(UsageError, match="line 2"):
        read(path, count=1000)


def test_sequences_are_consecutive_and_disjoint() -> None:
    pool = cut(torch.arange(103), 10, "ids", 103)
    assert pool.ids.shape == (10, 10)
    first, held = split([pool], 4, 5)
    assert first.ids.flatten().tolist() == list(range(40))
    assert held.ids.flatten().tolist() == list(range(40, 90))


def test_the_same_ids_have_the_same_hash() -> None:
    ids = torch.arange(6).reshape(2, 3)
    expected = hashlib.sha256(np.arange(6, dtype="<i8").tobytes()).hexdigest()
    described = Sequences(ids, "here").describe()
    counts = {"nsamples": 2, "seqlen": 3, "prefix": []}
    assert described == {"source": "here", **counts, "sha256": expected}
    assert Sequences(ids + 1, "here").sha256 != expected


def test_calibration_does_not_depend_on_how_much_is_held_out(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    some = load_sequences(str(tmp_path / "a.npy"), None, 100, 3, 0, 10)[0]
    more = load_sequences(str(tmp_path / "a.npy"), None, 100, 3, 7, 10)
    assert some.sha256 == more[0].sha256
    assert more[1].ids.shape == (7, 10)


@pytest.mark.parametrize(
    ("nsamples", "held_out", "message"),
    [
        (8, 3, r"need 11 sequences of 10 tokens \(8 for calibration and 3 held out\): got 10"),
        (11, 0, r"need 11 sequences of 10 tokens \(11 for calibration\)"),
        (0, 11, r"need 11 sequences of 10 tokens \(11 held out\)"),
    ],
)
def test_too_short(nsamples: int, held_out: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split([cut(torch.zeros(100, dtype=torch.int64), 10, "ids", 1)], nsamples, held_out)


def _pools(*counts: int) -> list[Sequences]:
    """Sequences of two tokens: 100 times the pool's number, and their own."""
    return [
        Sequences(torch.tensor([[100 * n, i] for i in range(count)]), f"{n}.txt", (7,))
        for n, count in enumerate(counts)
    ]


def test_of_several_datasets_sequences_are_taken_in_turn() -> None:
    first, held = split(_pools(9, 9, 9), 4, 3)
    assert first.ids.tolist() == [[0, 0], [100, 0], [200, 0], [0, 1]]
    assert held.ids.tolist() == [[100, 1], [200, 1], [0, 2]]
    for part in (first, held):
        assert (part.source, part.datasets, part.prefix) == ("0.txt, 1.txt and 2.txt", 3, (7,))
        assert part[:1].describe()["datasets"] == 3
    assert split(_pools(3, 2), 5, 0)[0].source == "0.txt and 1.txt"
    assert "datasets" not in split(_pools(3), 2, 1)[0].describe()


def test_one_of_several_that_is_too_short_is_named() -> None:
    """Nine sequences of two datasets are five of the first and four of the second."""
    split(_pools(5, 4), 6, 3)
    message = r"need 4 sequences of 2 tokens \(6 for calibration and 3 held out, of 2 datasets in "
    with pytest.raises(UsageError, match=message + r"turn\): got 3 from 1.txt"):
        split(_pools(9, 3), 6, 3)


def test_names_in_a_sentence() -> None:
    assert [listed(list(names)) for names in ("", "a", "ab", "abc")] == [
        *("", "a", "a and b", "a, b and c")
    ]


def test_a_dataset_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "a,b.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "link.txt").symlink_to("a.txt")
    hub = "some/data:split=test"
    for good in (["a.txt", "b.txt", "a,b.txt"], ["some/data", hub, "some/data:config=x"]):
        check_datasets("--dataset", good)
    for twice in (["a.txt", "a.txt"], ["a.txt", "./a.txt"], ["a.txt", "link.txt"], [hub, hub]):
        with pytest.raises(UsageError, match=rf"once: got {twice[0]}, and .* again"):
            check_datasets("--dataset", twice)
    with pytest.raises(UsageError, match=r"a.txt,b.txt is no file; .* \(--dataset A --dataset B"):
        check_datasets("--dataset", ["a.txt,b.txt"])


def test_what_can_be_nothing_else_is_the_name_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("text")
    for name in (str(tmp_path / "notes"), "no.txt", "A.JSONL", "a/b", "a/b-c.d:split=x:config=y"):
        assert is_dataset_name(name)
    for text in (
        "a text",
        "notes",
        "see a/b for more",
        "ein/Köln",
        "a\nb.txt",
        "",
        "a/b:c=d",
        "\0",
    ):
        assert not is_dataset_name(text)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(
        UsageError, match=rf"must be in 0\.\.49, the model's vocabulary: got .*{bad}"
    ):
        cut(torch.tensor([1, bad, 2]), 1, "ids", 50)


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.arange(3), b=np.arange(3))


def _pickle(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


_SHAPE = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
HUGE = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + _SHAPE.ljust(117) + b"\n"
BROKEN: dict[str, tuple[str, Any, str]] = {
    "empty npy": ("a.npy", b"", "cannot read token ids"),
    "not npy": ("a.npy", b"text", "cannot read token ids"),
    "pickle": ("a.npy", _pickle, "cannot read token ids"),
    "npz": ("a.npy", _npz, "cannot read token ids"),
    "float npy": ("a.npy", lambda p: np.save(p, np.ones(3)), "must be integers: got float64"),
    "no zip": ("a.npy", b"PK\x03\x04" + bytes(500), "cannot read token ids"),
    "tebibytes": ("a.npy", HUGE, "cannot read token ids"),
    "deep json": ("a.json", b"[" * 100_000, "cannot read token ids"),
    "long integer": ("a.jsonl", b'{"n": ' + b"9" * 5000 + b', "text": ""}', "field 'text'.*line 1"),
    "deep jsonl": ("a.jsonl", b"[" * 100_000, "with a field 'text'.*line 1"),
    "not json": ("a.json", b"[1, 2", "cannot read token ids"),
    "object": ("a.json", b'{"ids": [1]}', "cannot read token ids"),
    "string": ("a.json", b'"abc"', "cannot read token ids"),
    "number": ("a.json", b"7", "cannot read token ids"),
    "strings": ("a.json", b'["a"]', "must be integers"),
    "mixed": ("a.json", b"[[1], 2]", "cannot read token ids"),
    "floats": ("a.json", b"[1.5]", "must be integers"),
    "no text": ("a.jsonl", b'{"content": "x"}\n', "with a field 'text'.*line 1"),
    "null text": ("a.jsonl", b'{"text": null}\n', "with a field 'text'.*line 1"),
    "list": ("a.jsonl", b'{"text": "x"}\n["x"]\n', "with a field 'text'.*line 2"),
    "no jsonl": ("a.jsonl", b"plain\n", "with a field 'text'.*line 1"),
    "upper case npy": ("a.NPY", b"text", "cannot read token ids"),
    "upper case jsonl": ("a.JSONL", b"plain\n", "with a field 'text'.*line 1"),
    "npy of time": ("a.npy", lambda p: np.save(p, np.ones(3, "m8[s]")), "must be integers"),
    "npy of bools": ("a.npy", lambda p: np.save(p, np.ones(3, bool)), "must be integers: got bool"),
    "npy beyond": ("a.npy", lambda p: np.save(p, np.full(3, 2**64 - 1, "u8")), "must be in 0"),
    "npy below": ("a.npy", lambda p: np.save(p, np.full(3, -1, "i1")), "must be in 0"),
    "npy code": ("a.npy", HUGE.replace(b"'<i8'", b"exit()"), "cannot read token ids"),
    "true": ("a.json", b"[1, true]", "must be integers in .*: got True"),
    "nested": ("a.json", b"[[[1]]]", r"must be integers in .*: got \[1\]"),
    "long in json": ("a.json", b"[" + b"9" * 30 + b"]", "must be integers in .*: got 999"),
    "text in rows": ("a.json", b'[[1], "23"]', "cannot read token ids.*got str"),
    "utf-16 text": ("a.txt", "text".encode("utf-16"), "must be UTF-8"),
    "utf-16 without a mark": ("a.txt", "text".encode("utf-16-le"), "must be text: got NUL"),
    "nothing": ("a.txt", b"", "is empty"),
    "binary": ("a.md", bytes(100), "must be text: got NUL"),
    **{
        end: (f"a.{end}", b"a,b\n1,2\n", rf"is \.{end.lower()}, which is not read")
        for end in ("csv", "CSV", "tsv", "parquet", "arrow", "npz", "gz", "zst", "pt", "pkl", "pdf")
    },
    "jsonl not utf-8": ("a.jsonl", b'{"text": "\xff"}\n', "must be UTF-8"),
    "text not utf-8": ("a.txt", b"abc\xff\xfe", "must be UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in {
        "a.jsonl": '{"text": "abc"}',
        "a.ndjson": '{"text": "abc"}',
        "a": "abc",
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert as_text(read(tmp_path / name)) == "abc"
    (tmp_path / "a.JSON").write_text("[97, 98]", encoding="utf-8-sig")
    assert as_text(read(tmp_path / "a.JSON")) == "ab"


def test_a_dataset_is_a_regular_file_with_a_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, message in {
        "pipe": "must be a regular file: got a named pipe",
        "zero": "must be a regular file: got a device",
        "a\udc80.txt": "name in UTF-8",
        "a\nb.txt": "is no file",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_of_ids_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.lib.format.open_memmap(path, "w+", np.int64, (1 << 40,))[:4] = 1, 2, 3, 4
    assert read_tokens(str(path), None, 3).tolist() == [1, 2, 3]  # of 8 TiB, most of them a hole


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.json", "no.npy", "."])
@pytest.mark.parametrize("tokenizer", [None, Letters()])
def test_a_file_that_is_not_there(name: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file"):
        read_tokens(str(tmp_path / name), tokenizer, 10)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="the model has no tokenizer"):
        read_tokens(str(tmp_path / "a.txt"), None, 10)


def test_a_hub_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("someone/some", "train", True)
        yield {"text": "a" * 2000}
        yield {"text": "b"}
        raise AssertionError("read further than needed")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert as_text(read("someone/some", count=100)) == "a" * 2000
    with pytest.raises(UsageError, match=r"could be fetched .read further than needed"):
        read("someone/some", count=5000)


def test_a_hub_dataset_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(load_dataset=lambda *_, **__: [{"prompt": "a", "id": 1}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UsageError, match=r"no column 'text' but \['id', 'prompt'\]"):
        read("someone/some")


def test_rows_of_a_hub_dataset_without_text_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"text": None}, {"text": "one"}, {"text": None}, {"text": "two"}]
    fake = SimpleNamespace(load_dataset=lambda *_, **__: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert as_text(read("someone/some")) == "one\n\ntwo"
    rows.append({"text": ["three"]})
    with pytest.raises(UsageError, match=r"column 'text' of dataset .* must hold text: got list"):
        read("someone/some")


def test_half_a_surrogate_pair_is_no_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good \\ud83d!"}\n{"text": "\\ud83d\\ude00"}\n')
    assert as_text(read(path)) == "good \ufffd!\n\n\U0001f600"


def test_text_that_repeats_its_own_beginning_is_read_far_enough(tmp_path: Path) -> None:
    class Marked(Letters):
        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> Any:
            ids = [ord(c) for c in text]
            return {"input_ids": [ord("^"), *ids] if add_special_tokens else ids}

    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "^" * 400 + "ab"}) for _ in range(50)))
    first, held = load_sequences(str(path), Marked(), 256, 20, 5, 5)
    assert as_text(first.ids[0].tolist()) == "^ab\n\n"
    assert len(first.ids) == 20 and len(held.ids) == 5
