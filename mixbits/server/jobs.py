"""What passes between the endpoints, the queue and the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How a sequence is made. None: as the model's generation_config.json says.

    temperature         0 takes the likeliest token
    bias                token -> what is added to its logit
    seed                None: another one each time
    max_tokens          new tokens at most; 0 makes none
    logprobs            of how many of the likeliest tokens; None: not even of those taken
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None

    @property
    def asks_for_sampling(self) -> bool | None:
        """None where nothing is said of it."""
        if self.temperature is not None:
            return self.temperature >= 1e-5  # below, float32 has no digits left for the others
        given = (self.top_p, self.top_k, self.min_p)
        return True if any(value is not None for value in given) else None


@dataclass(frozen=True)
class Token:
    """A token of an answer, and what the model's unprocessed logits said of it.

    offset   where its text begins, in characters of the whole answer
    logprob  None for the first token of a prompt
    top      the likeliest tokens at its place, with their log-probabilities, best first
    """

    id: int
    offset: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Piece:
    """More text of an answer, and the tokens that begin in it, if they were asked for."""

    text: str
    tokens: Sequence[Token] = ()


@dataclass(frozen=True)
class Done:
    """The last event of a job: reason is "stop" or "length"; how many tokens were generated."""

    reason: str
    generated: int


@dataclass(frozen=True)
class Failed:
    """The last event of a job that the model could not do."""

    message: str


Event = Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """One sequence to generate.

    prompt       token ids, at least one
    echo         the prompt as text, to be sent before what is generated; None: it is not sent
    continues    whether the text goes on from the prompt's, as a completion does
    emit         takes what comes of it, in the worker's thread
    """

    prompt: Sequence[int]
    params: SamplingParams
    emit: Callable[[Event], None]
    echo: str | None = None
    continues: bool = True
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for it any more: it ends at its next block of layers, or never begins."""
        self.is_cancelled = True
