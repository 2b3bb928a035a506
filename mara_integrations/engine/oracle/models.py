"""The form of a loaded model that the slow reference computes with."""

from __future__ import annotations

from mara_integrations.engine.oracle.reference import AnyModel
from mara_integrations.errors import ConfigError
from mara_integrations.models.load import LoadedModel


def reference_model(model: LoadedModel) -> AnyModel:
    """Return a loaded model as the reference runs it.

    Raises:
        ConfigError: If the model is spread over several processes, or on vLLM.
        MissingExtraError: If it is a `.gguf` on llama.cpp, and the package `gguf` is not installed.
    """
    if model.parts is not None:
        raise ConfigError(
            "the slow reference does not run models that are spread over processes", hint="verify in one process"
        )
    if model.engine == "vllm":
        raise ConfigError("the slow reference can't read a model on vLLM", hint="verify with engine='transformers'")
    if model.engine == "llama.cpp":
        from mara_integrations.engine.oracle.llama_cpp import LlamaCppOracle  # needs the package gguf

        return LlamaCppOracle(model.model)
    plain: AnyModel = model.model
    return plain
