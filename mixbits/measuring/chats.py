"""Conversations as text: messages, rendered by the chat template of the model's tokenizer.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

The first is OpenAI's form, the second ShareGPT's. A template has its own marks of where a text and
its turns begin and end, a BOS among them where the model wants one: rendered conversations follow
each other without anything between them, and are cut like any other text.
"""

from __future__ import annotations

from typing import Any

from ..errors import UsageError, plain_errors

COLUMNS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, of either form."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict)
            and (isinstance(m.get("role"), str) or isinstance(m.get("from"), str))
            and ("content" in m or isinstance(m.get("value"), str))
            for m in value
        )
    )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """In OpenAI's form. What is there and None, as in tables, is left out."""
    known = {k: v for k, v in message.items() if v is not None}
    role = known.pop("role", None) or known.pop("from")
    text = known.pop("content", None) or known.pop("value", "")
    return {**known, "role": _ROLES.get(role, role), "content": text}


def render(tokenizer: Any, conversation: list[dict[str, Any]], where: str) -> str:
    """The text of a conversation. Raises UsageError that says `where` it was, and what is wrong."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"messages need the model's chat template, and its tokenizer has none ({where}): "
            "pass texts, or a model that is made for chats"
        )
    messages = [_message(message) for message in conversation]

    def sentence(why: str) -> str:
        return f"the model's chat template refuses a conversation: {why} ({where})"

    with plain_errors(sentence):  # of jinja, the template's own, or a lack of either
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    if not isinstance(text, str):
        raise UsageError(sentence(f"it gives {type(text).__name__}, not text"))
    return text


class Rendered(str):
    """The text of a conversation, which needs nothing between it and what stands before."""

    __slots__ = ()


def row_text(row: Any, tokenizer: Any, where: str, column: str | None = None) -> str | None:
    """What a row of a table says: its text, or its conversation as `Rendered`; None for neither.

    That of `column`, or else of the first of `text` and `COLUMNS` that has something. Raises
    KeyError where the row has no such column, TypeError, with the column, for anything else in it,
    and UsageError as `render` does.
    """
    columns = [column] if column else [c for c in ("text", *COLUMNS) if c in row]
    if not columns:
        raise KeyError("text")
    for name in columns:
        value = row[name]
        if isinstance(value, str):
            return value
        if is_conversation(value):
            return Rendered(render(tokenizer, value, where))
        if value is not None:
            raise TypeError(name)
    return None
