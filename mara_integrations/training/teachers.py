"""Models beside the one that a head is trained for: a teacher, and the base model that the teacher was tuned from.

Each is loaded to read replies, and given up before the next one is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.markup import escape

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.errors import ConfigError
from mara_integrations.models.adapters import (
    base_of_adapter,
    import_peft,
    is_adapter,
    load_adapted,
    tokenizer_of_adapter,
)
from mara_integrations.models.int8 import weight_bytes
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model, read_outline
from mara_integrations.models.resolve import resolve
from mara_integrations.models.spreading import spreads_model
from mara_integrations.progress import Reporter
from mara_integrations.runtime import backend_of
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.identity import model_fingerprint

Role = Literal["teacher", "teacher_base"]
NAMES: dict[Role, str] = {"teacher": "teacher", "teacher_base": "base model of the teacher"}


@dataclass(slots=True)
class Reader:
    """A loaded model that reads replies; it holds nothing any more once the model was given up.

    Attributes:
        model: The model.
        backend: A backend on it.
    """

    model: LoadedModel
    backend: Backend


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model beside the run's, as far as it has to be known while it is not loaded.

    Attributes:
        spec: How to load it.
        name: Its name, without a path of this machine.
        fingerprint: Hash of its weights, see `model_fingerprint`.
        num_bytes: Memory that it takes while it is loaded.
        eos_token_ids: Tokens that end its replies.
    """

    spec: ModelSpec
    name: str
    fingerprint: str
    num_bytes: int
    eos_token_ids: frozenset[int]

    @contextmanager
    def loaded(self) -> Iterator[Reader]:
        """Load the model, and give its memory back at the end of the block.

        Raises:
            MaraError: See `load_model` and `load_adapted`.
        """
        with _loaded(self.spec) as reader:
            yield reader


def check_teachers(config: TrainConfig, tokenizer: Any) -> None:
    """Refuse teachers that can't teach this model, before any weights are read.

    Args:
        config: Settings of the run.
        tokenizer: Tokenizer of the model that the head is trained for.

    Raises:
        MissingExtraError: If one is a LoRA adapter, and peft is not installed.
        ConfigError: If its vocabulary is another one, or the engine or the processes of the run can't run it.
        ModelError: If it is no model.
    """
    for role, spec in _specs(config).items():
        name = str(spec.model)
        if spreads_model(config.model_kwargs):
            raise ConfigError(
                f"{role}={name!r} is not allowed beside tp_plan: this process alone reads with it",
                hint="leave tp_plan out; device_map spreads a model without other processes",
            )
        if is_adapter(name):
            import_peft()
        if config.engine == "llama.cpp" and not resolve(name)[1].endswith(".gguf"):
            raise ConfigError(
                f"{role}={name!r} is not a .gguf file, and engine='llama.cpp' runs no others",
                hint="name a .gguf file, or train on engine='transformers'",
            )
        _check_vocabulary(f"{role}={name!r}", _tokenizer_of(spec), tokenizer)
    if config.teacher and config.teacher_base and resolve(config.teacher) == resolve(config.teacher_base):
        _check_has_sentence(config, f"teacher_base={config.teacher_base!r}")


def look_at_teachers(config: TrainConfig, model: LoadedModel, reporter: Reporter) -> dict[Role, Teacher]:
    """Load each teacher once, so that one that can't be loaded shows before the work, and return what to know of them.

    Raises:
        ConfigError: If its logits are narrower than the model's, or it is the model itself and no sentence differs.
        MaraError: See `Teacher.loaded`.
    """
    found: dict[Role, Teacher] = {}
    for role, spec in _specs(config).items():
        with _loaded(spec) as reader:
            if reader.model is model and role == "teacher" and config.teacher_base is None:
                _check_has_sentence(config, f"model={model.name!r}")
            found[role] = _looked_at(role, spec, reader, model)
            kind = f"{escape(reader.model.name)} on {reader.model.device}, {reader.model.number_format}"
            reporter.say(f"[bold]{'Teacher' if role == 'teacher' else 'Its base'}[/] {kind}")
    return found


def plain_name(name: str) -> str:
    """Return the name of a model; of a path on this machine, the last part."""
    path = Path(name).expanduser()
    return path.name if path.exists() else name


def model_bytes(model: LoadedModel, backend: Backend) -> int:
    """Return the memory of the weights, with the second copy that fast decoding on the CPU keeps."""
    if model.engine == "llama.cpp":
        return int(model.model.num_bytes)
    from mara_integrations.engine.backends.fused import FusedBackend  # imports the models of transformers

    if not isinstance(backend, FusedBackend):
        return weight_bytes(model.model)
    copied = weight_bytes(model.model.get_decoder().layers) + weight_bytes(model.model.get_output_embeddings())
    return weight_bytes(model.model) + copied


def _specs(config: TrainConfig) -> Mapping[Role, ModelSpec]:
    """Return how to load the teachers of a run: as its own model."""
    named: dict[Role, str | None] = {"teacher": config.teacher, "teacher_base": config.teacher_base}
    return {
        role: ModelSpec(
            name,
            config.device,
            config.dtype,
            model_kwargs=config.model_kwargs,
            quantization=config.quantization,
            engine=config.engine,
        )
        for role, name in named.items()
        if name is not None
    }


@contextmanager
def _loaded(spec: ModelSpec) -> Iterator[Reader]:
    model = load_adapted(spec) if is_adapter(str(spec.model)) else load_model(spec)
    device = model.device
    reader = Reader(model, backend_of(model))
    del model
    try:
        yield reader
    finally:
        del reader.model, reader.backend  # the caller may still hold the reader
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _tokenizer_of(spec: ModelSpec) -> Any:
    name = str(spec.model)
    if not is_adapter(name):
        return read_outline(spec).tokenizer
    own, base = tokenizer_of_adapter(name), base_of_adapter(name)
    return own if own is not None else read_outline(ModelSpec(base, model_kwargs=spec.model_kwargs)).tokenizer


def _check_vocabulary(named: str, tokenizer: Any, of_model: Any) -> None:
    """Refuse a tokenizer in which a token of the model has another id; it may have more tokens."""
    theirs, ours = tokenizer.get_vocab(), of_model.get_vocab()
    differing = sorted((index, token) for token, index in ours.items() if theirs.get(token) != index)
    if not differing:
        return
    index, token = differing[0]
    other = next((repr(token) for token, place in theirs.items() if place == index), "no token")
    raise ConfigError(
        f"{named} has another vocabulary than the model: token {index} is {other} there and {token!r} here; "
        f"{len(differing)} of {len(ours)} tokens differ",
        hint="name a model of the same family, which has the same tokenizer",
    )


def _looked_at(role: Role, spec: ModelSpec, reader: Reader, model: LoadedModel) -> Teacher:
    """Return what to know of a teacher of a model."""
    teacher = reader.model
    if teacher.vocab_size < model.vocab_size:
        raise ConfigError(
            f"{role}={spec.model!r} has logits for {teacher.vocab_size} tokens, model {model.name!r} for "
            f"{model.vocab_size}",
            hint="name a model whose vocabulary is as large",
        )
    size = model_bytes(teacher, reader.backend)
    return Teacher(spec, plain_name(teacher.name), model_fingerprint(teacher), size, teacher.eos_token_ids)


def _check_has_sentence(config: TrainConfig, other: str) -> None:
    """Refuse a teacher that is the very model that it is compared with, unless they read under different sentences."""
    if not config.principle and config.principle_file is None:
        raise ConfigError(
            f"teacher={config.teacher!r} and {other} are the same model: there is no difference to learn",
            hint="name another model, or say by --principle what the teacher reads the replies under",
        )
