"""A GGUF cuts text into tokens as the tokenizer does, or the tokenizer is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from exported import export, packed
from gguf_files import (
    REPLACE,
    added,
    around,
    sentencepiece,
    stored,
    write,
)

from mixbits.errors import UsageError
from mixbits.export.__main__ import main
from mixbits.export.gguf_tokenizer import Vocabulary, add_vocabulary, read_vocabulary

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


ROWS = 12  # of the embedding
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def vocabulary(tmp_path: Path, data: Any, lossy: bool = False, **files: Any) -> Vocabulary:
    """Of a folder with tokenizer.json, tokenizer_config.json and `files`, by their stems."""
    write(tmp_path, {"tokenizer.json": data, "tokenizer_config.json": NAMED})
    write(tmp_path, {f"{stem}.json": content for stem, content in files.items()})
    return read_vocabulary(tmp_path, ROWS, lossy)


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    found = vocabulary(tmp_path, sentencepiece())
    assert found.model == "llama" and found.special.merges == []
    assert found.tokens[6:] == ["b", "ab", "▁ab", "[PAD9]", "[PAD10]", "[PAD11]"]
    assert found.types == [3, 3, 2, 6, 1, 1, 1, 1, 1, 5, 5, 5]
    assert found.scores is not None and found.scores[7] > found.scores[8]  # merged first
    assert found.add_space_prefix is True
    assert found.special.special_token_ids == {"bos": 0, "eos": 1, "unk": 2}


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({"normalizer": REPLACE}, False),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, True),
        ({"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}}, False),
    ],
)
def test_the_space_before_a_text(tmp_path: Path, changes: dict[str, Any], prefix: bool) -> None:
    assert vocabulary(tmp_path, sentencepiece(**changes)).add_space_prefix is prefix


def byte_level(before: Any, merges: Any = ("a b",), **changes: Any) -> dict[str, Any]:
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "ab": 5}
    model = {"type": "BPE", "vocab": vocab, "merges": list(merges)}
    extra = [added(6, "<|end|>"), added(7, "<tool>", special=False), added(8, "<|eom_id|>")]
    data = {"model": model, "added_tokens": extra, "normalizer": None}
    return {**data, "pre_tokenizer": before, "post_processor": None, **changes}


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {**GPT2, "use_regex": False}


def split(expression: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": expression}}
    cut |= {"behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, BYTES]}


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    gpt2 = vocabulary(tmp_path, byte_level(GPT2))
    assert (gpt2.model, gpt2.cut, gpt2.special.merges) == ("gpt2", "gpt-2", ["a b"])
    assert gpt2.types == [1, 1, 1, 1, 1, 1, 3, 4, 3, 5, 5, 5]
    assert vocabulary(tmp_path, byte_level(GPT2, [["a", "b"]])).special.merges == ["a b"]
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert vocabulary(tmp_path, byte_level(split(llama3))).cut == "llama-bpe"
    qwen2 = llama3.replace("{1,3}", "")
    assert vocabulary(tmp_path, byte_level(split(qwen2))).cut == "qwen2"


# Which files say what the special tokens are; eos, eot and eom are the ends of a text.
SPECIAL: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "the tokenizer before all others": (
        {"generation_config": {"bos_token_id": 4}, "config": {"bos_token_id": 5}},
        {"bos": 0, "eos": 1},
    ),
    "the tokenizer, and nothing else": ({"config": {}}, {"bos": 0, "eos": 1}),
    "the legacy map": (
        {
            "tokenizer_config": {"pad_token": "<|end|>"},
            "special_tokens_map": {"bos_token": {"content": "<s>"}, "pad_token": "<unk>"},
        },
        {"bos": 0, "pad": 2},
    ),
    "the legacy map beside a newer file": (
        {
            "tokenizer_config": {"added_tokens_decoder": {}, "pad_token": "<|end|>"},
            "special_tokens_map": {"bos_token": "<s>", "pad_token": "<unk>"},
        },
        {"bos": 0, "pad": 6},
    ),
    "tokens of the vocabulary that are not added": (
        {"tokenizer_config": {"bos_token": "a", "eos_token": "b", "unk_token": None}},
        {"bos": 3, "eos": 4},
    ),
    "generation_config.json before config.json": (
        {
            "tokenizer_config": {},
            "generation_config": {"bos_token_id": 4, "eos_token_id": 5},
            "config": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        },
        {"bos": 4, "eos": 5, "pad": 2},
    ),
    "config.json of a model of text and pictures": (
        {"tokenizer_config": {}, "config": {"text_config": {"bos_token_id": 3}}},
        {"bos": 3},
    ),
    "nothing says it": ({"tokenizer_config": {}, "config": {"model_type": "llama"}}, {}),
    "an end of its own": (
        {"generation_config": {"eos_token_id": 6}},
        {"bos": 0, "eos": 1, "eot": 6},
    ),
    "several ends": (
        {"generation_config": {"eos_token_id": [8, 1, 6]}},
        {"bos": 0, "eos": 1, "eot": 6, "eom": 8},
    ),
    "several ends of config.json alone": (
        {"tokenizer_config": {}, "config": {"eos_token_id": [6, 1]}},
        {"eos": 6, "eot": 1},
    ),
    "what the tokenizer says already may be wrong elsewhere": (
        {"tokenizer_config": {"pad_token": "<unk>"}, "config": {"pad_token_id": -1}},
        {"pad": 2},
    ),
    "a separator is no end": ({"tokenizer_config": {"sep_token": "a"}}, {"sep": 3}),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_who_says_what_a_special_token_is(tmp_path: Path, case: str) -> None:
    files, expected = SPECIAL[case]
    found = vocabulary(tmp_path, byte_level(GPT2), **files).special
    assert found.special_token_ids == expected
    assert found.add_special_token == {"bos": False, "eos": False}


@pytest.mark.usefixtures("printed")
def test_a_fourth_end_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = {"eos_token_id": [6, 7, 8]}
    found = vocabulary(tmp_path, byte_level(GPT2), generation_config=ends).special
    assert found.special_token_ids == {"bos": 0, "eos": 1, "eot": 6, "eom": 8}
    assert "'<tool>' left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parts", "config", "flags", "ids"),
    [
        (("<s>", "A"), NAMED, (True, False), {"bos": 0, "eos": 1}),
        (("A", "</s>"), NAMED, (False, True), {"bos": 0, "eos": 1}),
        (("<s>", "A", "</s>"), NAMED, (True, True), {"bos": 0, "eos": 1}),
        (("A",), NAMED, (False, False), {"bos": 0, "eos": 1}),
        (("<s>", "A"), {**NAMED, "add_bos_token": False}, (False, False), {"bos": 0, "eos": 1}),
        (("A",), {**NAMED, "add_eos_token": True}, (False, True), {"bos": 0, "eos": 1}),
        (("A",), {"add_bos_token": True}, (False, False), {}),  # there is none
        (("<s>", "A"), {}, (True, False), {"bos": 0}),  # what it puts is one
        (("A", "</s>"), {"eos_token": "<unk>"}, (False, True), {"eos": 1, "eot": 2}),
    ],
)
def test_what_is_put_around_a_text(
    tmp_path: Path,
    parts: tuple[str, ...],
    config: dict[str, Any],
    flags: tuple[bool, bool],
    ids: dict[str, int],
) -> None:
    data = byte_level(GPT2, post_processor=around(*parts))
    found = vocabulary(tmp_path, data, tokenizer_config=config).special
    assert (found.add_special_token["bos"], found.add_special_token["eos"]) == flags
    assert found.special_token_ids == ids


@pytest.mark.parametrize("parts", [("<s>", "<unk>", "A"), ("<unk>", "A"), ("A", "</s>", "<s>")])
def test_what_gguf_cannot_put_around_a_text(tmp_path: Path, parts: tuple[str, ...]) -> None:
    data = byte_level(GPT2, post_processor=around(*parts))
    with pytest.raises(UsageError, match="and no more"):
        vocabulary(tmp_path, data)
    vocabulary(tmp_path, data, lossy=True)


TEMPLATES: dict[str, tuple[dict[str, Any], str | None, list[str] | None]] = {
    "none": ({}, None, None),
    "a text": ({"tokenizer_config.json": {"chat_template": "T"}}, "T", None),
    "a file": ({"chat_template.jinja": "F"}, "F", None),
    "a file before a text": (
        {"tokenizer_config.json": {"chat_template": "T"}, "chat_template.jinja": "F"},
        "F",
        None,
    ),
    "of a processor": ({"chat_template.json": {"chat_template": "P"}}, "P", None),
    "a list": (
        {
            "tokenizer_config.json": {
                "chat_template": [
                    {"name": "tool-use", "template": "U"},
                    {"name": "default", "template": "T"},
                    {"name": "rag", "template": "R"},
                ]
            }
        },
        "T",
        ["rag", "tool_use"],
    ),
    "files": (
        {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"},
        "F",
        ["rag"],
    ),
    "no default": (
        {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "R"}]}},
        None,
        ["rag"],
    ),
}


@pytest.mark.usefixtures("printed")
@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, default, names = TEMPLATES[case]
    write(tmp_path, {"tokenizer.json": byte_level(GPT2), **files})
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    add_vocabulary(writer, read_vocabulary(tmp_path, ROWS, lossy=False))
    said = {key: entry.value for key, entry in writer.kv_data[0].items()}
    assert said.get("tokenizer.chat_template") == default
    assert said.get("tokenizer.chat_templates") == names
    assert said.get("tokenizer.chat_template.rag") == ("R" if "rag" in (names or []) else None)
    assert ("no chat template is called default" in capsys.readouterr().out) == (
        case == "no default"
    )


def changed(where: str, value: Any) -> dict[str, Any]:
    """A tokenizer.json with another value at the dotted path `where`; lists are appended to."""
    data: Any = byte_level(GPT2)
    *path, last = where.split(".")
    target = data
    for key in path:
        target = target[key]
    if isinstance(target[last], list) and not isinstance(value, str):
        target[last].append(value)
    else:
        target[last] = value
    return dict(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed("added_tokens", added(12, "<x>")), "has 12: tokenizer.json gives '<x>' the id 12"),
        (changed("added_tokens", added(2**32 - 1, "<x>")), "has 12: .* '<x>' the id 4294967295"),
        (changed("added_tokens", added(-1, "<x>")), "'<x>' the id -1"),
        (changed("added_tokens", added(True, "<x>")), "'<x>' the id True"),
        (changed("model.vocab", {"a": 10**20}), "'a' the id 1000000"),
        (changed("model.vocab", {"a": 0, "b": 1.0}), "'b' the id 1.0"),
        (changed("added_tokens", added(5, "<x>")), "gives 5 to both 'ab' and '<x>'"),
        (changed("added_tokens", added(9, "a")), "gives 'a' both 3 and 9"),
        (changed("added_tokens", added(10, "<x>")), "'<x>' the id 10, the tokenizers library 9"),
        (changed("added_tokens", added(9, "\ud800")), "cannot read"),
        (changed("added_tokens", 5), "cannot read"),
        (changed("added_tokens", "xy"), "cannot read"),
        (changed("model", []), "cannot read"),
        (changed("model.vocab", ["a"]), "cannot read"),
        (changed("model.merges", 5), "cannot read"),
        (changed("model.merges", ["a", "b", "ab"]), "cannot read"),
        (changed("model.type", "Unigram"), "got 'Unigram'"),
        (changed("model.type", {}), "got {}"),
        (changed("post_processor", {"type": "BertProcessing"}), "cannot read"),
        (changed("post_processor", around("<s>", "A", **{"<s>": [7]})), "has 0, and it puts"),
        (changed("pre_tokenizer", {"type": ["ByteLevel"]}), "cannot read"),
        ([], "must hold a JSON object: got list"),
        ("", "cannot read .*tokenizer.json"),
        ("[" * 100_000 + "]" * 100_000, "cannot read .*nested in more than 100"),
        ('{"model": ' + "1" * 5000 + "}", "cannot read"),
    ],
)
def test_tokenizers_that_fit_no_model(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        vocabulary(tmp_path, data)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<x>"}}, r"'<x>' \(eos_token\) is not"),
        ({"tokenizer_config": {"eos_token": ["<s>"]}}, "must be a text: got \\['<s>'\\]"),
        ({"tokenizer_config": {"eos_token": {"content": 5}}}, "must be a text: got 5"),
        ({"tokenizer_config": []}, "must hold a JSON object"),
        ({"tokenizer_config": '{"a":' * 100_000}, "cannot read"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"20000": {"content": "<x>"}}}},
            r"'<x>' \(added_tokens_decoder\) is not",
        ),
        (
            {"tokenizer_config": {"extra_special_tokens": ["<s>", "<x>"]}},
            r"'<x>' \(extra_special_tokens\) is not",
        ),
        ({"added_tokens": {"<x>": 9}}, r"'<x>' \(added_tokens.json\) is not"),
        ({"special_tokens_map": "null"}, "special_tokens_map.json must hold a JSON object"),
        ({"generation_config": {"eos_token_id": [1, 12]}}, r"has 12: got \[1, 12\]"),
        ({"generation_config": {"eos_token_id": -1}}, "generation_config.json .* got -1"),
        ({"generation_config": {"eos_token_id": "1"}}, "got '1'"),
        ({"generation_config": {"pad_token_id": [1, 2]}}, "pad_token_id of generation_config"),
        ({"config": {"eos_token_id": 2**32 - 1}}, "eos_token_id of config.json .* got 4294967295"),
        ({"tokenizer_config": {"chat_template": 5}}, "cannot read"),
        ({"tokenizer_config": {"chat_template": {"default": {}}}}, "must be a text"),
        ({"tokenizer_config": {"chat_template": {"a-b": "", "a b": ""}}}, "names of their own"),
        ({"tokenizer_config": '{"chat_template": "\\ud800"}'}, "cannot read"),
    ],
)
def test_files_beside_a_tokenizer_that_cannot_be(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        vocabulary(tmp_path, byte_level(GPT2), **files)
    assert "\n" not in str(raised.value)


def test_nothing_is_written_of_a_tokenizer_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, folder = packed(tmp_path, "MXFP4A16", head=False)  # 160 rows
    data = sentencepiece()
    out = tmp_path / "out"
    argv = [str(folder), "--format", "gguf", "--out", str(out)]
    for number, code in ((160, 2), (9, 0)):
        data["added_tokens"][3:] = [added(number, "<x>")]
        write(folder, {"tokenizer.json": {"version": "1.0", **data}})
        assert main(argv) == code
        assert out.exists() == (code == 0)
    assert "has 160: tokenizer.json gives '<x>' the id 160" in capsys.readouterr().err
    settings, _ = stored(out / "model.gguf")
    assert len(settings["tokenizer.ggml.tokens"]) == 160
    assert settings["tokenizer.ggml.tokens"][9:11] == ["<x>", "[PAD10]"]
    assert settings["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.usefixtures("printed")
def test_tokenizers_that_llama_cpp_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="no name for the expression"):
        vocabulary(tmp_path, byte_level(split(r"\w+|.")))
    assert vocabulary(tmp_path, byte_level(split(r"\w+|.")), lossy=True).cut == "gpt-2"
    assert "tokens may differ" in capsys.readouterr().out
    with pytest.raises(UsageError, match="made like"):
        vocabulary(tmp_path, sentencepiece(normalizer={"type": "NFKC"}))
    with pytest.raises(UsageError, match="cannot read"):
        vocabulary(tmp_path, {"model": {"type": "BPE"}})


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt", "tekken.json"])
def test_other_forms_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    assert read_vocabulary(tmp_path, ROWS, False).model == "no_vocab"
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=r"tokenizer\.json only"):
        read_vocabulary(tmp_path, ROWS, False)


TEXT = (Path(__file__).parents[1] / "tiny.py").read_text(encoding="utf-8").replace("<", "(")
HARD = "It's 12345 o'clock,  DON'T\n\n\tÜnïcode 你好 🙂 x=1;  \r\n end "
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(cut: str) -> Any:
    """A tokenizer of each kind, trained on a little text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    if cut == "llama":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        pieces = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        words = [f"▁{word}" for word in TEXT.split()]  # merges do not cross spaces
        tokenizer.train_from_iterator(words, pieces)
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    expression = {"llama-bpe": QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), "qwen2": QWEN2}.get(cut)
    split = [] if expression is None else [pre_tokenizers.Split(Regex(expression), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=bytes_, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.mark.parametrize("cut", ["llama", "gpt-2", "llama-bpe", "qwen2"])
def test_llama_cpp_cuts_text_the_same_way(tmp_path: Path, cut: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizer = trained(cut)
    *_, folder = packed(tmp_path, "MXFP4A16", vocab_size=tokenizer.get_vocab_size(), head=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    path = export(folder, "gguf") / "model.gguf"
    assert stored(path)[0].get("tokenizer.ggml.pre", "llama") == cut
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in [HARD, *TEXT.splitlines()]:
        if text:
            tokens = model.tokenize(text.encode(), add_bos=False, special=False)
            assert tokens == tokenizer.encode(text, add_special_tokens=False).ids, text
    model.close()
