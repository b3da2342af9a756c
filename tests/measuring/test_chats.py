"""Conversations become text by the model's own template; data sets of the hub are named in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_tokens import BOS, VOCAB, make_tokenizer
from tiny import read

from mixbits.errors import UsageError
from mixbits.measuring.hub_data import HubData
from mixbits.measuring.text import load_sequences, read_tokens

TURNS = [("user", "one"), ("assistant", "two"), ("user", "three")]
OPENAI = [{"role": role, "content": text} for role, text in TURNS]
NAMES = {"user": "human", "assistant": "gpt"}
SHARE_GPT = [{"from": NAMES[role], "value": text} for role, text in TURNS]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
)
CHAT = "<s>[user]one</s>[assistant]two</s>[user]three</s>"


def tokenizer(template: str | None = TEMPLATE) -> Any:
    found = make_tokenizer(["<s>", "$A"])
    found.chat_template = template
    return found


def text_of(source: object, template: str | None = TEMPLATE) -> str:
    made = tokenizer(template)
    return made.decode(read_tokens(str(source), made, 10_000))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": OPENAI},
    "ShareGPT": {"id": "a", "conversations": SHARE_GPT},
    "messages by the other name": {"conversations": OPENAI},
    "columns of a table": {"messages": [{**m, "tool_calls": None, "from": None} for m in OPENAI]},
    "a text that is missing": {"text": None, "messages": OPENAI},
}


@pytest.mark.parametrize("case", ROWS)
def test_the_template_renders_each_form(case: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS[case], ROWS[case])
    assert text_of(path) == CHAT + CHAT  # marks of the template, and nothing else, lie between


def test_a_text_that_is_there_is_taken_and_stands_apart(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a", "messages": OPENAI}, ROWS["ShareGPT"])
    assert text_of(jsonl(path, {"text": "a"}, ROWS["ShareGPT"], {"text": "b"})) == f"a{CHAT}\n\nb"
    assert text_of(jsonl(path, {"text": "a", "messages": OPENAI})) == "a"


def test_sequences_begin_with_one_bos(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *[{"messages": OPENAI}] * 8)
    length = len(tokenizer()(CHAT, add_special_tokens=False)["input_ids"])
    first, held = load_sequences(str(path), tokenizer(), VOCAB, 4, 2, length)
    assert [tokenizer().decode(row) for row in [*first.ids, *held.ids]] == [CHAT] * 6
    assert (first.ids == BOS).sum() == 4
    without = TEMPLATE.replace("{{ bos_token }}", "")  # as ChatML: the tokenizer's own stands there
    first, _ = load_sequences(str(path), tokenizer(without), VOCAB, 4, 2, length)
    assert [tokenizer().decode(row) for row in first.ids] == [CHAT] * 4


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": OPENAI}, None, r"needs? the model's chat template.* has none \(.*line 1\)"),
        ({"messages": [{"role": "tool", "content": ""}]}, TEMPLATE, r"no role tool \(.*line 1\)"),
        ({"messages": OPENAI}, "{% for %}", r"chat template refuses a conversation: .*line 1"),
        ({"messages": []}, TEMPLATE, "with a field 'text'.*line 1"),
        ({"messages": ["hello"]}, TEMPLATE, "with a field 'text'.*line 1"),
        ({"messages": [{"role": 3, "content": ""}]}, TEMPLATE, "with a field 'text'.*line 1"),
        ({"messages": "hello"}, None, None),
        ({"conversations": [{"from": "human"}]}, TEMPLATE, "with a field 'text'.*line 1"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, TEMPLATE, None),
    ],
)
def test_what_is_no_conversation(
    row: Any, template: str | None, message: str | None, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", row)
    if message is None:  # odd, and within what a template takes
        assert text_of(path, template)
        return
    with pytest.raises(UsageError, match=message):
        text_of(path, template)


def test_the_command_calibrates_with_chats(
    run: Callable[..., int], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "chats.jsonl", *[{"messages": OPENAI}] * 40)
    assert run("--dataset", path, "--rounding", "rtn") == 2  # its tokenizer has no template
    assert "chat template" in capsys.readouterr().err and not (tmp_path / "out").exists()
    model = tmp_path / "chat"
    model.mkdir()
    for file in (shared / "llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert run("--dataset", path, "--rounding", "rtn", model=model) == 0
    assert read(tmp_path / "out" / "report.json")["calibration"]["source"] == path.name


# ------------------------------------------------------------------------------- the hub's


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in whose place `load_dataset` looks for names: `OWNER/NAME` is a folder in it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load = datasets.load_dataset

    def load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
        return load(str(tmp_path / name), *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tmp_path


def dataset(folder: Path, configs: dict[str, dict[str, list[Any]]]) -> None:
    """Config -> split -> rows, as a repository of the hub lays them out."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = f"{config}/{split}.jsonl"
            (folder / config).mkdir(parents=True, exist_ok=True)
            jsonl(folder / file, *rows)
            lines += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_parts_of_data_sets_on_the_hub(hub: Path) -> None:
    parts = {"test": [{"text": "t"}], "train": [{"text": "a"}, {"text": None}, {"text": "b"}]}
    dataset(hub / "Salesforce/wikitext", {"wikitext-2-raw-v1": parts, "x": {"train": [{"a": "c"}]}})
    assert text_of("Salesforce/wikitext:config=wikitext-2-raw-v1") == "a\n\nb"
    assert text_of("Salesforce/wikitext:split=test:config=wikitext-2-raw-v1") == "t"
    assert text_of("Salesforce/wikitext:config=x:column=a") == "c"
    chats = {"train_sft": [{"prompt": "p", "messages": OPENAI}] * 2}
    dataset(hub / "HuggingFaceH4/ultrachat_200k", {"default": chats})
    assert text_of("HuggingFaceH4/ultrachat_200k:split=train_sft") == CHAT * 2
    assert text_of("HuggingFaceH4/ultrachat_200k:split=train_sft:column=prompt") == "p\n\np"
    for name, message in (
        ("Salesforce/wikitext", "could be fetched .Config name is missing.*NAME:config=C"),
        ("Salesforce/wikitext:config=x", r"no column 'text' but \['a'\]"),
        ("Salesforce/wikitext:config=x:column=b", r"no column 'b' but \['a'\]"),
        ("HuggingFaceH4/ultrachat_200k", "could be fetched .*train_sft"),
    ):
        with pytest.raises(UsageError, match=message):
            text_of(name)
    with pytest.raises(UsageError, match=r"template.* has none \(HuggingFaceH4.*, row 0\)"):
        text_of("HuggingFaceH4/ultrachat_200k:split=train_sft", None)


@pytest.mark.parametrize(
    "name", ["a/b:c", "a/b:split=", "a/b:split=x:split=y", "a/b:", "a:revision=x"]
)
def test_settings_of_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="must be config=, split= or column="):
        HubData.parse(name)
