"""Text and messages as token ids, refused before work where the model's positions end.

The template of a chat is the folder's, run in transformers' sandbox and, as a template may loop
for ever, against a clock: the trace of its thread asks for the time at every line, and for the
memory of the process where that is not the first tenth of a second.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ..errors import UsageError, plain_errors
from .errors import RequestError
from .texts import Vocabulary

TEMPLATE_SECONDS = 5.0
TEMPLATE_BYTES = 1 << 30  # by which the process may grow meanwhile
_QUICK = 0.1  # s: no template of a model takes longer
POSITIONS = 1 << 15  # of a model that has no limit of its own
_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


class TemplateBounds(Exception):
    """A chat template has run for too long, or takes too much memory."""


@dataclass(frozen=True)
class Limits:
    """positions: tokens of a prompt and its answer; max_tokens: new ones; vocabulary: token ids."""

    positions: int
    max_tokens: int
    vocabulary: int


def positions_of(config: Any, tokenizer: Any) -> int:
    """How many tokens the model sees, by its config, or else its tokenizer."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in _LIMITS]
    found.append(getattr(tokenizer, "model_max_length", None))
    return next((n for n in found if isinstance(n, int) and 0 < n < 1 << 30), POSITIONS)


class Prompts:
    """Makes prompts of one tokenizer; of several threads at once."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, limits: Limits) -> None:
        self._tokenizer, self._vocabulary, self.limits = tokenizer, vocabulary, limits

    def of_text(self, text: str, param: str) -> list[int]:
        """As the tokenizer begins a text. Raises RequestError for none, or too many tokens."""
        return self._encoded(text, param, add_special_tokens=True)

    def of_ids(self, ids: Sequence[int], param: str) -> list[int]:
        for place, token in enumerate(ids):
            if not 0 <= token < self.limits.vocabulary:
                raise RequestError(
                    400,
                    f"token ids of {param} must be 0 to {self.limits.vocabulary - 1}: "
                    f"got {token} at {place}",
                    "prompt",
                )
        return self._checked(list(ids), param)

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as the text of an answer would have them."""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def of_messages(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> list[int]:
        """Messages in the folder's template. Raises RequestError for what the template refuses."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError(
                400,
                "this model has no chat template (tokenizer.chat_template is not set): "
                "use /v1/completions",
                "messages",
            )
        refused = "the chat template refuses these messages"
        try:
            with plain_errors(refused), bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, **variables
                )
        except TemplateBounds as error:
            raise RequestError(400, f"{refused}: {error}", "messages") from error
        except UsageError as error:
            raise RequestError(400, str(error), "messages") from error
        return self._encoded(str(text), "messages", add_special_tokens=False)

    def room(self, prompt: Sequence[int], asked: int | None, default: int | None) -> int:
        """New tokens: those asked for, or the default, or as many as there is room for.

        Raises RequestError where what is asked for is more than the model or the server allows.
        """
        left = self.limits.positions - len(prompt)
        if asked is None:
            if left < 1:
                self._refuse(len(prompt), 1)
            return min(left, self.limits.max_tokens, default or left)
        if asked > self.limits.max_tokens:
            raise RequestError(
                400,
                f"max_tokens must be at most {self.limits.max_tokens} on this server: got {asked}",
                "max_tokens",
            )
        if asked > left:
            self._refuse(len(prompt), asked)
        return asked

    def _refuse(self, prompt: int, new: int) -> None:
        raise RequestError(
            400,
            f"{prompt} tokens and {new} new ones make {prompt + new}, "
            f"{self.limits.positions} at most",
            "max_tokens",
            "context_length_exceeded",
        )

    def _encoded(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        most = self.limits.positions * self._vocabulary.longest
        if len(text) > most:
            raise RequestError(
                400,
                f"{param} has {len(text)} characters, which is more than "
                f"{self.limits.positions} tokens at most, whatever they are",
                param.partition("[")[0],
                "context_length_exceeded",
            )
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return self._checked(list(ids), param)

    def _checked(self, ids: list[int], param: str) -> list[int]:
        field = param.partition("[")[0]
        if not ids:
            raise RequestError(400, f"{param} must hold at least one token: it is empty", field)
        if len(ids) > self.limits.positions:
            raise RequestError(
                400,
                f"{param} has {len(ids)} tokens, {self.limits.positions} at most",
                field,
                "context_length_exceeded",
            )
        return ids


@contextmanager
def bounded(seconds: float, growth: int) -> Iterator[None]:
    """Raise TemplateBounds in whatever Python code this thread still runs after so long.

    Or, beyond `_QUICK`, once the process has grown by more than `growth` bytes.
    """
    start, size, before = time.monotonic(), _resident(), sys.gettrace()
    look = start + _QUICK

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        nonlocal look
        now = time.monotonic()
        if now > start + seconds:
            raise TemplateBounds(f"it has not ended within {seconds:g} s")
        if now > look:
            look = now + _QUICK / 100
            if _resident() - size > growth:
                raise TemplateBounds(f"it takes more than {growth >> 20} MB")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _resident() -> int:
    """Bytes of memory that the process has; 0 where Linux does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0
