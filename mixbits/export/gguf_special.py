"""Special tokens and chat templates of a model's folder, as a gguf.SpecialVocab.

SpecialVocab reads merges, special tokens, whether BOS and EOS are put around a text, and templates;
it looks into tokenizer.json, tokenizer_config.json and config.json only. So a folder is made for
it, in which these files say all that transformers reads elsewhere too:

    special tokens  tokenizer_config.json and special_tokens_map.json; what they lack,
                    generation_config.json says, then config.json, where it is written there
    ends of text    all that generation_config.json lists, as far as GGUF has keys: eos, eot, eom
    templates       chat_template.jinja and additional_chat_templates/ before tokenizer_config.json,
                    and chat_template.json last
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import UsageError
from ..files.io import read_object
from ..progress import say
from ..source.model_files import TOKENIZER_BYTES

Put: TypeAlias = tuple[list[str], list[str]]  # the tokens before, and after, every text

_ENDS = ("eos", "eot", "eom")  # text may end with each of them
_KINDS = ("bos", *_ENDS, "unk", "sep", "pad", "mask")  # of which GGUF has keys


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises UsageError."""
    return read_object(path, TOKENIZER_BYTES) if path.exists() else {}


def _text(value: Any) -> str | None:
    """A token as tokenizer_config.json has it: a text, or an object with one."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise UsageError(f"a special token must be a text: got {text!r:.60}")
    return text or None


def _named_tokens(folder: Path, data: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, str]:
    """Kind -> special token, as the tokenizer's files name it.

    Raises UsageError for tokens that tokenizer.json lacks: transformers would add them to it.
    """
    config = read_json(folder / "tokenizer_config.json")
    legacy = read_json(folder / "special_tokens_map.json")
    # transformers reads the legacy file unless there is this key; what is told last holds.
    files = [legacy, config] if "added_tokens_decoder" in config else [config, legacy]
    told = [(kind, _text(file.get(f"{kind}_token"))) for file in files for kind in _KINDS]
    found = {kind: token for kind, token in told if token is not None}
    named = [(f"{kind}_token", token) for kind, token in found.items()]
    for key, token in [*named, *_more_tokens(folder, config)]:
        if token not in ids:
            raise UsageError(
                f"special tokens must be in tokenizer.json: {token!r:.60} ({key}) is not ({folder})"
            )
    unknown = data["model"].get("unk_token")
    return ({"unk": unknown} if unknown in ids else {}) | found


def _more_tokens(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Other tokens that the tokenizer's files name, each with the key that names it."""
    for key in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"):
        many = config.get(key) or []
        for value in many.values() if isinstance(many, dict) else many:
            if (token := _text(value)) is not None:
                yield key, token
    yield from (("added_tokens.json", t) for t in read_json(folder / "added_tokens.json"))


def _listed_ids(folder: Path, kinds: Sequence[str], rows: int) -> dict[str, list[int]]:
    """Kind -> what generation_config.json, or else config.json, says of special tokens."""
    config = read_json(folder / "config.json")
    files = [("generation_config.json", read_json(folder / "generation_config.json"))]
    inner = config.get("text_config")  # of a model of text and pictures
    files += [("config.json", part) for part in (config, inner) if isinstance(part, dict)]
    found: dict[str, list[int]] = {}
    for kind in kinds:
        said = [(name, file.get(f"{kind}_token_id")) for name, file in files]
        name, value = next(((n, v) for n, v in said if v is not None), ("", []))
        found[kind] = value if isinstance(value, list) else [value]
        wrong = [i for i in found[kind] if type(i) is not int or not 0 <= i < rows]
        if wrong or (kind != "eos" and len(found[kind]) > 1):
            raise UsageError(
                f"{kind}_token_id of {name} must be a row of the embedding, which has {rows}: "
                f"got {value!r:.60} ({folder})"
            )
    return found


def _add_ends(found: dict[str, int], listed: Sequence[int], tokens: Mapping[int, str]) -> None:
    """Give the ends of text that are listed to the keys that are left, by their names if they can.

    Ends of a turn and of a message are usually called so: <|eot_id|>, <|eom_id|>.
    """
    more = [i for i in dict.fromkeys(listed) if i not in [found.get(key) for key in _ENDS]]
    for name in (*_ENDS, ""):
        for key in _ENDS:
            fits = [i for i in more if name in (key, "") and name in tokens.get(i, "")]
            if fits and key not in found:
                found[key] = fits[0]
                more.remove(fits[0])
    if more:
        names = ", ".join(repr(tokens.get(i, i)) for i in more)
        say(f"a GGUF has keys for three ends of text: {names} left out")


def _put_around(data: Mapping[str, Any], ids: Mapping[str, int]) -> Put:
    """The tokens that the post-processor puts before, and after, a text."""
    processor = data.get("post_processor") or {}
    found: Put = [], []
    special: dict[str, list[int]] = {}
    for part in processor.get("processors", [processor]):
        kind = part.get("type", "ByteLevel")
        if kind == "TemplateProcessing":
            names = [p.get("SpecialToken", {}).get("id") for p in part["single"]]
            text = names.index(None)
            found = names[:text], names[text + 1 :]
            special = {name: entry["ids"] for name, entry in part["special_tokens"].items()}
        elif kind == "RobertaProcessing":
            found = [part["cls"][0]], [part["sep"][0]]
            special = {name: [number] for name, number in (part["cls"], part["sep"])}
        elif kind != "ByteLevel":
            raise UsageError(f"a GGUF has nothing like the {kind!r:.60} of tokenizer.json")
    for name in (*found[0], *found[1]):
        if special[name] != [ids.get(name)]:
            raise UsageError(
                f"the post-processor of tokenizer.json must put tokens by their ids: {name!r:.60} "
                f"has {ids.get(name)}, and it puts {special[name]!r:.60}"
            )
    return found


def _check_around(
    before: Sequence[str], after: Sequence[str], ids: Mapping[str, int], bos: int | None
) -> None:
    """Raises UsageError for what GGUF cannot say: it has BOS before a text, and EOS after it."""
    if len(after) > 1 or len(before) > 1 or any(ids[token] != bos for token in before):
        raise UsageError(
            "llama.cpp puts BOS before a text and EOS after it, and no more: the tokenizer makes "
            f"{' '.join([*before, 'TEXT', *after])!r:.160}, its BOS is {bos}; --lossy leaves it out"
        )


def _templates(folder: Path, config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every chat template with its name, which is "default" for the one that none is asked for."""
    said = config.get("chat_template")
    if said is None:
        said = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(said, list):
        said = {entry["name"]: entry["template"] for entry in said}
    found = {"default": said} if isinstance(said, str) else dict(said or {})
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    named = {path.stem: path for path in files} | {"default": folder / "chat_template.jinja"}
    found |= {name: path.read_text("utf-8") for name, path in named.items() if path.is_file()}
    names = {re.sub("[^a-zA-Z0-9]", "_", name) for name in found}  # as GGUF spells them
    if len(names) < len(found) or "" in names:
        raise UsageError(f"chat templates must have names of their own: got {list(found)!r:.160}")
    if not all(isinstance(text, str) for text in found.values()):
        raise UsageError(f"a chat template must be a text ({folder})")
    if found and "default" not in found:
        say("no chat template is called default: llama.cpp must be given one by name")
    return [{"name": name, "template": text} for name, text in found.items()]


def _collected(
    folder: Path, merges: Any, found: Mapping[str, int], put: Put, ids: Mapping[str, int]
) -> dict[str, Any]:
    """The files that SpecialVocab is given: name -> content."""
    config = read_json(folder / "tokenizer_config.json")
    tokens = {number: token for token, number in ids.items()}
    named = {kind: tokens[number] for kind, number in found.items() if number in tokens}
    spoken = dict.fromkeys([*named.values(), *put[0], *put[1]])
    if "eos" not in named:  # SpecialVocab would take the separator for it
        named.pop("sep", None)
    said: dict[str, Any] = {f"{kind}_token": token for kind, token in named.items()}
    said |= {key: config[key] for key in ("add_bos_token", "add_eos_token") if key in config}
    templates = _templates(folder, config)
    before, after = ([{"SpecialToken": {"id": token}} for token in part] for part in put)
    around = [*before, {"Sequence": {"id": "A"}}, *after]
    return {
        "tokenizer.json": {
            "model": {"merges": merges},
            "added_tokens": [{"content": token, "id": ids[token]} for token in spoken],
            "post_processor": {"type": "TemplateProcessing", "single": around},
        },
        "tokenizer_config.json": said | ({"chat_template": templates} if templates else {}),
        "config.json": {f"{kind}_token_id": number for kind, number in found.items()},
    }


def special_vocab(
    folder: Path, data: Mapping[str, Any], ids: Mapping[str, int], rows: int, lossy: bool
) -> Any:
    """A gguf.SpecialVocab of a folder whose tokenizer.json holds `data`, with `ids` of tokens.

    Raises UsageError for special tokens that are not among the `rows` of the embedding, or that
    GGUF cannot express (unless `lossy`).
    """
    import gguf

    merges, put = data["model"]["merges"], _put_around(data, ids)
    named = _named_tokens(folder, data, ids)
    listed = _listed_ids(folder, [k for k in _KINDS if k == "eos" or k not in named], rows)
    found = {kind: numbers[0] for kind, numbers in listed.items() if numbers}
    for kind, part in zip(("bos", "eos"), put, strict=True):
        found |= {kind: ids[part[0]]} if part else {}  # used, even if nothing names it
    found |= {kind: ids[token] for kind, token in named.items()}
    if not lossy:
        _check_around(*put, ids, found.get("bos"))
    with tempfile.TemporaryDirectory() as there:
        for name, content in _collected(folder, merges, found, put, ids).items():
            text = json.dumps(content, ensure_ascii=False)
            Path(there, name).write_text(text, encoding="utf-8")
        special = gguf.SpecialVocab(there, bool(merges), tuple(found), rows)
    tokens = {number: token for token, number in ids.items()}
    _add_ends(special.special_token_ids, listed["eos"], tokens)
    for kind in ("bos", "eos"):  # said in any case: llama.cpp's own default goes by the tokenizer
        added = special.add_special_token.get(kind, False)
        special.add_special_token[kind] = added and kind in special.special_token_ids
    return special
