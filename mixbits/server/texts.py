"""Tokens as text that can be sent: no half characters, no stop strings.

A character may take several tokens, a token may end within one, and how a token reads may depend
on the one before (a space at the beginning of a text is dropped by some). So text is decoded with
a few tokens before it, and what may still change is held back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from .jobs import Piece, Token

_CONTEXT = 8  # tokens that are decoded again
_UNFINISHED = "\ufffd"  # what a decoder makes of a part of a character


class Decoder:
    """The text of tokens that come one by one; all of it is what decoding them at once gives.

    Only where bytes are no text do some tokenizers, asked at once, give up what was good before.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        """`context` are tokens before the first, whose text has been sent."""
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT:])
        self._sent = len(self._decode().rstrip(_UNFINISHED)) if self._ids else 0

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def add(self, token: int) -> str:
        """The text that is certain by now, and was not before."""
        self._ids.append(token)
        text = self._decode()
        certain = text.rstrip(_UNFINISHED)
        new = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if certain == text and len(self._ids) > 2 * _CONTEXT:
            del self._ids[:-_CONTEXT]
            self._sent = len(self._decode())
        return new

    def end(self) -> str:
        """What was held back and will not be completed."""
        return self._decode()[self._sent :] if self._ids else ""


class StopStrings:
    """Cuts a text before the stop string that is complete first, whatever its pieces are."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # the beginning of a stop string, perhaps

    def add(self, text: str) -> tuple[str, bool]:
        """Text that can be sent, and whether the end is reached."""
        if not self._stops:
            return text, False
        held = self._held + text
        found = [(held.find(stop), len(stop)) for stop in self._stops if stop in held]
        if found:
            self._held = ""
            _, place = min((place + length, place) for place, length in found)
            return held[:place], True
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def end(self) -> str:
        """What was held back and is no stop string."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Transcript:
    """An answer in the making: pieces that can be sent, with the tokens that begin in them."""

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], context: Sequence[int] = (), offset: int = 0
    ) -> None:
        """`offset` characters have been sent before."""
        self._decoder, self._stops = Decoder(tokenizer, context), StopStrings(stops)
        self._decoded = self._sent = offset
        self._tokens: list[Token] = []
        self.is_stopped = False

    def add(
        self, token: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()
    ) -> Piece:
        """The next token, not one that ends the sequence."""
        self._tokens.append(Token(token, self._decoded, logprob, top))
        return self._piece(self._decoder.add(token))

    def end(self) -> Piece:
        """What is left when the last token has been added."""
        last = self._piece(self._decoder.end())
        if self.is_stopped:
            return last
        text = self._stops.end()
        return Piece(last.text + text, (*last.tokens, *self._tokens))

    def _piece(self, new: str) -> Piece:
        if self.is_stopped:
            return Piece("")
        self._decoded += len(new)
        text, self.is_stopped = self._stops.add(new)
        self._sent += len(text)
        begun = [token for token in self._tokens if token.offset < self._sent]
        self._tokens = self._tokens[len(begun) :]
        return Piece(text, begun)


class Vocabulary:
    """How a single token is written in an answer, and its bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(maxsize=1 << 16)(self._text)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token, at least one."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Of byte-level tokenizers: the byte that a character stands for."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {character: byte for byte, character in bytes_to_unicode().items()}

    def special(self, text: str) -> int | None:
        """The id of a special token, which is not in the text of an answer, or None."""
        if text not in self._tokenizer.all_special_tokens:
            return None
        return int(self._tokenizer.convert_tokens_to_ids(text))

    def bytes(self, token: int) -> list[int] | None:
        """The token's bytes in UTF-8; None where the tokenizer does not tell."""
        text = self.text(token)
        if not text.startswith("bytes:"):
            return list(text.encode())
        return self._raw_bytes(token)

    def _text(self, token: int) -> str:
        """As it reads behind another token; part of a character is written bytes:\\xe4."""
        both = [token, token]  # a leading space is dropped in front only
        alone = self._decode([token])
        text = self._decode(both)[len(alone) :]
        if _UNFINISHED not in text + alone:
            return text
        raw = self._raw_bytes(token)
        return text if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _raw_bytes(self, token: int) -> list[int] | None:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return None
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return [int(match[1], 16)]
        found = [self._byte_of.get(character) for character in name]
        return None if None in found else found  # type: ignore[return-value]
