"""What reports call models, texts and commands: no folder of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixbits.errors import first_line, printable
from mixbits.files.io import last_part, without_folders


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("quantize /home/me/Llama --out /tmp/x/out", "quantize Llama --out out"),
        ("quantize ./Llama --dataset=/data/text.txt", "quantize ./Llama --dataset=text.txt"),
        ("quantize ../Llama --keep '*.0.*=BF16'", "quantize ../Llama --keep '*.0.*=BF16'"),
        ("quantize m --keep 're:/x/=BF16'", "quantize m --keep re:/x/=BF16"),
        ("quantize m --prompt '/etc is a folder/of'", "quantize m --prompt '/etc is a folder/of'"),
        ("quantize m '--prompt=/a/b'", "quantize m --prompt=/a/b"),
        ("quantize '/home/me/two words'", "quantize 'two words'"),
        ("quantize org/name --out /", "quantize org/name --out /"),
    ],
)
def test_of_absolute_paths_the_last_part_is_shown(typed: str, shown: str) -> None:
    assert without_folders(typed) == shown


def test_names_are_kept_and_paths_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.txt").touch()
    assert last_part("org/name") == "org/name"  # a name on the hub
    assert (
        last_part("data/text.txt") == last_part(str(tmp_path / "data" / "text.txt")) == "text.txt"
    )
    assert last_part(".") == tmp_path.name and last_part("data/..") == tmp_path.name
    assert last_part("/gone/away.txt") == "away.txt"
    assert last_part("x" * 5000) == "x" * 5000 and last_part("a\0b") == "a\0b"


def test_messages_of_others_end_at_a_word() -> None:
    long = "an issue with the checkpoint that nobody foresaw " * 5
    line = first_line(ValueError(long))
    assert len(line) <= 160 and line.endswith("...") and long.startswith(line[:-3])
    assert long[len(line) - 3] == " "
    unbroken = first_line(ValueError("x" * 300))
    assert unbroken == "x" * 157 + "..."
    assert first_line(ValueError("short enough")) == "short enough"
    assert first_line(ValueError("x" * 160)) == "x" * 160
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("\n first \x1b[2J\nsecond")) == "first \ufffd[2J"


def test_what_is_printable_stays() -> None:
    for text in ("Übung 5 ± 0.1 → 中文", "👩\u200d💻", "\u0645\u06cc\u200c\u062e"):
        assert printable(text) == text
    assert printable("a\nb\tc\x07\u202ed\ud83d") == "a b c\ufffd\ufffdd\ufffd"
