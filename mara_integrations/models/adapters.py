"""LoRA adapters in the format of PEFT: a base model with the weights of an adapter merged into its own."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from mara_integrations.errors import MissingExtraError, ModelError
from mara_integrations.models.int8 import check_int8, quantize
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
from mara_integrations.models.quiet import quiet
from mara_integrations.models.resolve import alias_of, first_line, is_cached

ADAPTER_FILE = "adapter_config.json"


def import_peft() -> Any:
    """Return the module `peft`.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MissingExtraError("a LoRA adapter needs peft", hint="pip install 'mara-integrations[peft]'") from None
    return peft


def is_adapter(name: str) -> bool:
    """Return whether a name is that of a folder with an adapter, and not with a whole model."""
    folder = Path(name).expanduser()
    return (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file()


def base_of_adapter(folder: str) -> str:
    """Return the name of the model that an adapter belongs to.

    Raises:
        ModelError: If the adapter can't be read, names no base model, or is no LoRA adapter.
    """
    file = Path(folder).expanduser() / ADAPTER_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind, base = settings["peft_type"], settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"adapter {folder!r} can't be read", hint=f"{ADAPTER_FILE}: {first_line(error)}") from error
    if kind != "LORA":
        raise ModelError(f"adapter {folder!r} is of the type {kind!r}", hint="allowed: LORA")
    if not base or not isinstance(base, str):
        raise ModelError(
            f"adapter {folder!r} names no base model",
            hint=f"base_model_name_or_path in {ADAPTER_FILE} is its folder or Hub id",
        )
    alias = alias_of(base)
    return base if alias == base or is_cached(base, {}) else alias


def load_adapted(spec: ModelSpec) -> LoadedModel:
    """Load the base model of an adapter, and merge the adapter into a copy of it.

    Its tokenizer is that of the adapter's folder where one lies there.

    Raises:
        MissingExtraError: If peft is not installed.
        ModelError: If the adapter can't be read, or does not fit its base model.
        MaraError: See `load_model`.
    """
    peft = import_peft()
    folder = str(spec.model)
    base = load_model(replace(spec, model=base_of_adapter(folder), quantization=None))
    if spec.quantization is not None:
        check_int8(spec.quantization, base.device, base.dtype, spec.model_kwargs)
    model = copy.deepcopy(base.model)  # others may use the base model, and merging changes it in place
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses what transformers will drop
            merged = peft.PeftModel.from_pretrained(model, str(Path(folder).expanduser())).merge_and_unload()
    except Exception as error:  # peft and the files may raise anything; the cause stays chained
        raise ModelError(f"adapter {folder!r} can't be merged into model {base.name!r}: {first_line(error)}") from error
    if spec.quantization is not None:
        quantize(merged)
    tokenizer = tokenizer_of_adapter(folder) or base.tokenizer
    loaded = load_model(ModelSpec((merged.requires_grad_(False), tokenizer)))
    return replace(loaded, name=folder, quantization=spec.quantization)


def tokenizer_of_adapter(folder: str) -> Any | None:
    """Return the tokenizer in an adapter's folder; None where there is none, and that of the base model counts.

    Raises:
        ModelError: If it can't be read.
    """
    path = Path(folder).expanduser()
    if not (path / "tokenizer_config.json").is_file():
        return None
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers and the files may raise anything; the cause stays chained
        raise ModelError(f"the tokenizer of adapter {folder!r} can't be read: {first_line(error)}") from error
