"""The fingerprint of a model that another engine has loaded, from the few weights of its files that it samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from mara_integrations.fingerprints import fingerprint
from mara_integrations.models.gguf import is_gguf_copy

_log = logging.getLogger(__name__)
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def fingerprint_of(source: str, config: Any, revision: str | None = None) -> str | None:
    """Return the fingerprint of a model on this disk; None where its files do not tell.

    Args:
        source: Its folder, or a Hub id that is in the cache.
        config: Its configuration.
        revision: Branch, tag or commit on the Hub.
    """
    try:
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(huggingface_hub.snapshot_download(source, revision=revision, local_files_only=True))
        index = folder / _INDEX
        places = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)

        def read(name: str) -> Tensor:
            with safe_open(folder / places.get(name, _WEIGHTS), "pt") as weights:
                tensor: Tensor = weights.get_tensor(name)
            return tensor

        return fingerprint(model, is_quantised=is_gguf_copy(source), weight_of=read)
    except Exception as error:  # other files, packed weights, other names in them
        _log.info("model %s has no fingerprint: %s", source, error)
        return None
