"""Gated decoding as a `custom_generate` function, for code that calls `model.generate(...)` of transformers.

The rows of a batch are decoded together, but no row waits for another. So everything that `generate` prepared is
applied to each row by itself; what needs the whole batch at each token raises a `ConfigError`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mara_integrations.engine.backends.forward import weights_version
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Constraint, Request
from mara_integrations.engine.settings import resolve_settings
from mara_integrations.errors import ConfigError
from mara_integrations.fingerprints import fingerprint
from mara_integrations.heads.source import HeadSource, place_heads
from mara_integrations.sampling import Fallback, Selection

_WHOLE_BATCH = "it needs all rows of a batch at once, and each row is decoded by itself"
_OTHER_FILTER = "candidates are chosen by temperature, top_k and top_p"
_AFTER_FILTERS = "it changes scores after the candidates are chosen"
_REFUSED_PROCESSORS = {
    "ClassifierFreeGuidanceLogitsProcessor": "it needs a second forward at each token",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "it needs a second forward at each token",
    "SynthIDTextWatermarkLogitsProcessor": _AFTER_FILTERS,
    "WatermarkLogitsProcessor": _AFTER_FILTERS,
    **dict.fromkeys(("EpsilonLogitsWarper", "EtaLogitsWarper", "MinPLogitsWarper"), _OTHER_FILTER),
    **dict.fromkeys(("TopHLogitsWarper", "TypicalLogitsWarper"), _OTHER_FILTER),
}
_FOR_ONE_ROW = {
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_CACHES = ("cache", "past_key_values")  # the name since transformers 5.24, and the one before
# `generate` adds these itself; all of them follow from the tokens and the mask.
_DERIVED = {*_CACHES, "attention_mask", "position_ids", "use_cache", "cache_position", "logits_to_keep"}


class Streamer(Protocol):
    """The interface of transformers' streamers."""

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then each token."""

    def end(self) -> None:
        """Learn that no token follows."""


def gated_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    head: HeadSource | None = None,
    strength: float | None = None,
    selection: Selection = "auto",
    fallback: Fallback = "first",
    min_candidates: int | None = None,
    streamer: Streamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate under a head: `model.generate(**inputs, custom_generate=gated_generate, head="heads/x")`.

    Greedy decoding uses the candidate settings that the head was trained with. With `do_sample=True`, temperature,
    top-k and top-p come from the generation config, and the seed from torch's generator. `generate` does not pass a
    streamer to custom functions, so bind it: `custom_generate=partial(gated_generate, streamer=streamer)`. Calls from
    several threads on one model take turns.

    Args:
        model: A causal language model of transformers; see `make_backend`.
        input_ids: Prompts, padded on the left, shape (B, L).
        logits_processor: Processors of each row's logits, applied before its candidates are chosen.
        stopping_criteria: Criteria that are checked after each token of a row, with that row alone.
        generation_config: Generation config of the call, completed by `generate`.
        head: See `MARAEngine`.
        strength: See `GateParams`; None takes its default.
        selection: See `GateParams`.
        fallback: See `GateParams`.
        min_candidates: See `SamplingParams`; None takes the head's own.
        streamer: Receiver of the prompt, then of each token; for a batch of one row.
        **model_kwargs: Attention mask, and arguments that `generate` derives from it. An empty cache (`cache`, or
            `past_key_values` before transformers 5.24) is accepted and ignored.

    Returns:
        Prompts and replies, padded on the right with the padding token, shape (B, L + R); in a
        `GenerateDecoderOnlyOutput` where `return_dict_in_generate` asks for one.

    Raises:
        ConfigError: If an option is not supported; the message names it and says why.
        HeadError: See `MARAEngine.load`.
        ModelError: See `make_backend`.

    Source: the contract of `custom_generate` callables, transformers' `GenerationMixin.generate`.
    """
    _check_call(generation_config, model_kwargs, len(input_ids), streamer)
    config, name = model.config.get_text_config(), model.name_or_path or type(model).__name__
    room = min((c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)), default=None)
    if room is None:
        raise ConfigError("the reply has no upper bound", hint="give max_new_tokens")
    settings = resolve_settings(
        {
            **_filters(logits_processor, generation_config, config.vocab_size),
            "max_new_tokens": room - input_ids.shape[1],
            "min_candidates": min_candidates,
            "head": head,
            "strength": strength,
            "selection": selection,
            "fallback": fallback,
            "system_prompt": "",  # the prompts are rendered already
        },
        {},
        lambda head: place_heads(head, model.device, config.hidden_size, name, fingerprint(model)),
    )
    sampling = settings.sampling
    eos_token_ids = {int(i) for c in stopping_criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id}
    prompts = _unpadded(input_ids, model_kwargs.get("attention_mask"))
    requests = []
    for row, prompt_ids in enumerate(prompts):
        reply = _Reply(input_ids[row], stopping_criteria, streamer)
        processors = _processors_for(row, len(prompts), logits_processor)
        requests.append(
            Request(
                prompt_ids,
                sampling.updated(seed=int(torch.randint(2**62, ())) if sampling.temperature > 0 else None),
                settings.gate,
                settings.head,
                frozenset(eos_token_ids),
                text=reply if reply.is_needed else None,
                constraint=_Processed(input_ids[row], processors) if processors else None,
            )
        )
    replies = _Driver.of(model).run(requests)
    if streamer is not None:
        if replies[0][-1] in eos_token_ids:  # followers are not told of the end-of-sequence token
            streamer.put(torch.tensor(replies[0][-1:]))
        streamer.end()
    padding = getattr(generation_config, "_pad_token_tensor", None)  # the first end-of-sequence token where none is set
    padding = 0 if padding is None else int(padding)
    longest = max(map(len, replies))
    padded = [[*reply, *[padding] * (longest - len(reply))] for reply in replies]
    sequences = torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], dim=-1)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast(LongTensor, sequences))
    return sequences


class _Reply:
    """Check the stopping criteria after each token of one reply, and pass the token to the streamer."""

    def __init__(self, prompt: Tensor, criteria: StoppingCriteriaList, streamer: Streamer | None) -> None:
        self._ids = prompt.tolist()
        self._device = prompt.device
        self._criteria = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
        self._streamer = streamer
        self.text, self.stopped = "", False
        if streamer is not None:
            streamer.put(prompt[None].cpu())

    @property
    def is_needed(self) -> bool:
        """Whether there are criteria or a streamer."""
        return bool(self._criteria) or self._streamer is not None

    def push(self, token_id: int) -> None:
        """See `TextFollower`."""
        self._ids.append(token_id)
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token_id]))
        if self._criteria:
            ids = cast(LongTensor, torch.tensor([self._ids], device=self._device))
            self.stopped = any(bool(torch.as_tensor(c(ids, cast(Any, None))).all()) for c in self._criteria)

    def finish(self) -> None:
        """See `TextFollower`."""


class _Processed(Constraint):
    """Logits processors as a constraint on one row. They see the row with its padding, as in `generate`."""

    def __init__(self, prompt: Tensor, processors: LogitsProcessorList) -> None:
        self._ids = prompt.tolist()
        self._device = prompt.device
        self._processors = processors

    def mask(self, logits: Tensor) -> None:
        """See `Constraint`."""
        ids = cast(LongTensor, torch.tensor([self._ids], device=self._device))
        logits.copy_(self._processors(ids, cast(FloatTensor, logits[None].clone()))[0])

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        self._ids.append(token_id)


def _check_call(
    config: GenerationConfig, model_kwargs: dict[str, Any], num_rows: int, streamer: Streamer | None
) -> None:
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise ConfigError(f"{mode} can't be gated", hint="greedy decoding and sampling can, without num_beams")
    for name in _OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name):
            raise ConfigError(
                f"{name}=True is not supported: candidates are scored together, so there is no per-step tensor",
                hint="`MARAEngine.generate(trace=True)` reports candidates and accept logits",
            )
    for name in _CACHES:
        cache = model_kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ConfigError(f"{name} is a filled cache; gated decoding can't continue it",
                              hint="pass the whole prompt as input_ids, without a cache")  # fmt: skip
    for name, value in model_kwargs.items():
        if value is not None and name not in _DERIVED:
            raise ConfigError(
                f"{name}=... is not supported by gated decoding: the model is fed token ids alone",
                hint="leave it out",
            )
    if streamer is not None and num_rows > 1:
        raise ConfigError(f"a streamer follows one row; the batch has {num_rows}", hint="generate row by row")


def _filters(processors: LogitsProcessorList, config: GenerationConfig, vocab_size: int) -> dict[str, Any]:
    """Return the candidate settings that these processors stand for."""
    settings: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        settings = {"temperature": 1.0, "top_k": vocab_size, "top_p": 1.0}
    for processor in processors:
        match processor:
            case TemperatureLogitsWarper() if config.do_sample:
                settings["temperature"] = processor.temperature
            case TopKLogitsWarper():
                settings["top_k"] = processor.top_k
            case TopPLogitsWarper():
                settings["top_p"] = processor.top_p
    return settings


def _processors_for(row: int, num_rows: int, processors: LogitsProcessorList) -> LogitsProcessorList:
    """Return the processors of one row, without the filters that choose candidates."""
    mine = LogitsProcessorList()
    for processor in processors:
        name = type(processor).__name__
        reason = _REFUSED_PROCESSORS.get(name) or (_WHOLE_BATCH if name in _FOR_ONE_ROW and num_rows > 1 else None)
        if reason:
            raise ConfigError(f"{name} can't be used with gated decoding: {reason}")
        if isinstance(processor, TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper):
            continue
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            lengths = getattr(processor, "prompt_ignore_length", None)  # of each row's padding
            if isinstance(lengths, Tensor):
                processor = copy.copy(processor)
                processor.prompt_ignore_length = lengths[row : row + 1]
        mine.append(processor)
    return mine


def _unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return cast(list[list[int]], input_ids.tolist())
    prompts = []
    for row, (ids, seen) in enumerate(zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)):
        start = seen.index(True) if any(seen) else len(ids)
        if start == len(ids) or not all(seen[start:]):
            raise ConfigError(
                f"row {row} of the attention mask is not a prompt padded on the left", hint="padding_side='left'"
            )
        prompts.append(ids[start:])
    return prompts


class _Driver:
    """A backend of a model, kept with the model as long as that lives; a copy of the model makes its own."""

    _making = threading.Lock()  # probing a backend replaces the model's attention for a moment

    def __init__(self, model: PreTrainedModel) -> None:
        self._backend = make_backend(model, model.name_or_path or "the model")
        self._lock = threading.Lock()
        self.version = weights_version(model)

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Driver:
        """Return the driver of a model, made anew when its weights or its attention were changed."""
        with cls._making:
            driver: _Driver | None = vars(model).get("_mara_driver")
            if driver is None or driver.version != weights_version(model):
                driver = vars(model)["_mara_driver"] = cls(model)
            return driver

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        """Decode all requests to their ends; calls from several threads take turns."""
        with self._lock:
            return [sequence.token_ids for sequence in Decoder(self._backend).run(requests)]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of the model have no driver
