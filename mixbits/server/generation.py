"""One sequence of the model, token by token: transformers' `generate`, watched.

`generate` decides everything, so answers are those of the library, with its native steps. What
it lacks hangs on hooks of the model: whether the client is still there is asked before every step
and, while the prompt is read, before every block of layers; log-probabilities are those of the
model's own logits. Long prompts are read in chunks (`prefill_chunk_size`) where the model's state
is its keys and values alone.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers import StoppingCriteriaList as Criteria

from ..errors import UsageError, plain_errors
from ..model.layout import decoder_blocks
from .jobs import Done, Job, Piece, SamplingParams, Token
from .texts import Decoder, Transcript, Vocabulary

CHUNK = 512  # tokens of a prompt that are read at once
LEAST_LOGPROB = -9999.0  # JSON has no infinity
_ROWS = 64  # whose float32 log-probabilities are in memory at once
# Settings of a generation_config.json that would make something else than one sequence.
_ONE_SEQUENCE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "stop_strings": None,
    "max_time": None,
    "max_length": None,
    "min_length": 0,
}


class Cancelled(Exception):
    """The client has gone, or the server ends."""


class Engine:
    """Runs jobs on a model of `mixbits.load`; one at a time, in any thread."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.vocabulary_size = int(model.get_input_embeddings().weight.shape[0])
        config = model.generation_config
        self.ends = {*_numbers(config.eos_token_id), *_numbers(tokenizer.eos_token_id)}
        self.blocks: Sequence[Any] = ()
        with suppress(UsageError):
            self.blocks = list(decoder_blocks(model)[1])
        self.chunk: int | None = None
        if model.device.type == "cpu" and not getattr(model, "_is_stateful", False):
            self.chunk = CHUNK

    def check(self) -> None:
        """Generate a token, as a request would. Raises UsageError where that fails."""
        job = Job([0, 0], SamplingParams(max_tokens=1), emit=lambda event: None)
        chunk, self.chunk = self.chunk, self.chunk and 1
        if chunk:
            # A cache of its own kind may be none that can be filled in parts.
            with suppress(UsageError), plain_errors("a prompt must go in as a whole"):
                self.run(job)
                self.chunk = chunk
                return
            self.chunk = None
        with plain_errors("the model cannot generate"):
            self.run(job)

    def run(self, job: Job) -> None:
        """Emit the pieces of a job, and Done. Nothing more comes of one that is cancelled."""
        generation = _Generation(self, job)
        with suppress(Cancelled):
            generation.run()
            job.emit(generation.done())


def _numbers(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else [int(i) for i in ids]


class _Generation:
    """The state of one job while `generate` runs."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.engine, self.job, self.params = engine, job, job.params
        self.taken: list[int] = []
        self.reason = "length"
        special = map(engine.vocabulary.special, self.params.stop)
        self.ends = engine.ends | {token for token in special if token is not None}
        self.logits: Tensor | None = None  # [vocab], of the step before
        self.prompt_rows: list[tuple[float, list[tuple[int, float]]]] = []
        self.position = 0  # of the prompt, while it is read
        self.transcript = Transcript(
            engine.tokenizer,
            self.params.stop,
            job.prompt if job.continues else (),
            len(job.echo or ""),
        )

    # --- what surrounds generate -----------------------------------------------------------------

    def run(self) -> None:
        if self.job.echo is not None and not self._wants_prompt_logprobs:
            self.job.emit(Piece(self.job.echo))
        if self.params.max_tokens == 0 and not self._wants_prompt_logprobs:
            return
        seed = self.params.seed
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        model, ids = self.engine.model, torch.tensor([list(self.job.prompt)])
        ids = ids.to(model.device)
        with self._hooks():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._config(),
                logits_processor=LogitsProcessorList(_processors(self.params)),
                stopping_criteria=Criteria([_Watch(self._next)]),
                **({"logits_to_keep": 0} if self._keeps_all_logits else {}),
            )

    def done(self) -> Done:
        if self.params.max_tokens:
            self._emit(self.transcript.end())
        return Done(self.reason, len(self.taken))

    @property
    def _wants_prompt_logprobs(self) -> bool:
        return self.job.echo is not None and self.params.logprobs is not None

    @property
    def _keeps_all_logits(self) -> bool:
        return self._wants_prompt_logprobs and self.engine.model._supports_logits_to_keep()

    def _config(self) -> Any:
        """The model's generation_config, with what the request asks for."""
        config = copy.deepcopy(self.engine.model.generation_config)
        for name, value in _ONE_SEQUENCE.items():
            setattr(config, name, value)
        config.max_new_tokens = max(self.params.max_tokens, 1)
        config.eos_token_id = sorted(self.ends) or None
        if config.pad_token_id is None and self.ends:
            config.pad_token_id = min(self.ends)
        if self.engine.chunk and len(self.job.prompt) > self.engine.chunk:
            config.prefill_chunk_size = self.engine.chunk
        self._set_sampling(config)
        return config

    def _set_sampling(self, config: Any) -> None:
        params = self.params
        if params.asks_for_sampling is not None:
            config.do_sample = params.asks_for_sampling
        if params.repetition_penalty is not None:
            config.repetition_penalty = params.repetition_penalty
        off = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None}
        for name, neutral in off.items():
            asked, own = getattr(params, name), getattr(config, name)
            value = own if asked is None else asked
            setattr(config, name, neutral if value is None or not config.do_sample else value)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Only the outermost module is watched while tokens come: else the native step is lost."""
        model = self.engine.model
        with ExitStack() as self._while_reading, ExitStack() as stack:
            before = model.register_forward_pre_hook(self._before)
            stack.callback(before.remove)
            if self.params.logprobs is not None:
                stack.callback(model.register_forward_hook(self._after).remove)
            for block in self.engine.blocks:
                self._while_reading.callback(block.register_forward_pre_hook(self._before).remove)
            yield

    def _before(self, module: Any, inputs: Any) -> None:
        if self.job.is_cancelled:
            raise Cancelled

    def _after(self, module: Any, inputs: Any, output: Any) -> None:
        logits = output.logits[0]
        if not self.taken and self._wants_prompt_logprobs:
            self._read(logits)
        self.logits = logits[-1]

    def _read(self, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens, from logits [T, vocab] of a chunk of it."""
        start, self.position = self.position, self.position + len(logits)
        wanted = self.job.prompt[start + 1 : self.position + 1]
        for row in range(0, len(wanted), _ROWS):
            part = wanted[row : row + _ROWS]
            self.prompt_rows += log_probabilities(
                logits[row : row + len(part)], part, self.params.logprobs or 0
            )

    # --- tokens ----------------------------------------------------------------------------------

    def _next(self, token: int) -> bool:
        """Take a token; returns whether it is the last."""
        if not self.taken:
            self._while_reading.close()
            if self._wants_prompt_logprobs:
                self._emit_prompt()
            if self.params.max_tokens == 0:
                return True
        if self.job.is_cancelled:
            raise Cancelled
        self.taken.append(token)
        if token in self.ends:
            self.reason = "stop"
            return True
        row: tuple[float | None, list[tuple[int, float]]] = (None, [])
        if self.logits is not None:
            [row] = log_probabilities(self.logits[None], [token], self.params.logprobs or 0)
        self._emit(self.transcript.add(token, *row))
        if self.transcript.is_stopped:
            self.reason = "stop"
        return self.transcript.is_stopped

    def _emit(self, piece: Piece) -> None:
        if self.params.logprobs is None:
            piece = Piece(piece.text)
        if piece.text or piece.tokens:
            self.job.emit(piece)

    def _emit_prompt(self) -> None:
        prompt, decoder = self.job.prompt, Decoder(self.engine.tokenizer)
        rows: list[Any] = [(None, []), *self.prompt_rows]
        tokens, offset = [], 0
        for token, (logprob, top) in zip(prompt, rows, strict=True):
            tokens.append(Token(token, offset, logprob, top))
            offset += len(decoder.add(token))
        self.job.emit(Piece(self.job.echo or "", tokens))


def log_probabilities(
    logits: Tensor, tokens: Sequence[int], k: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of each row of logits [T, vocab]: the log-probability of a token, and of the k likeliest."""
    rows = torch.log_softmax(logits.float(), dim=-1).nan_to_num(nan=LEAST_LOGPROB)
    rows = rows.clamp(min=LEAST_LOGPROB)
    own = rows.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in rows.topk(k))
    return [
        (value, list(zip(row_ids, row_values, strict=True)))
        for value, row_ids, row_values in zip(own, ids, values, strict=True)
    ]


class _Watch(StoppingCriteria):
    """Hands each token on as it comes, until `take` says that it was the last."""

    def __init__(self, take: Callable[[int], bool]) -> None:
        self._take, self._ended = take, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self._ended = self._ended or self._take(int(input_ids[0, -1]))
        return torch.tensor([self._ended], device=input_ids.device)


class _Penalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties, of generated tokens only."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompt is None:
            self._prompt = input_ids.shape[1]
        ids, counts = input_ids[0, self._prompt :].unique(return_counts=True)
        scores = scores.clone()
        scores[0, ids] -= self._presence + self._frequency * counts.to(scores.dtype)
        return scores


class _Bias(LogitsProcessor):
    """Adds to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids, self._values = list(bias), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[0, self._ids] += self._values.to(scores)
        return scores


def _processors(params: SamplingParams) -> list[Any]:
    found: list[Any] = []
    if params.presence_penalty or params.frequency_penalty:
        found.append(_Penalties(params.presence_penalty, params.frequency_penalty))
    if params.bias:
        found.append(_Bias(params.bias))
    return found
