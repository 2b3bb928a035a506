"""Align the language model you already run: a tiny head accepts or rejects each token, in LangChain and LlamaIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mara_integrations.custom_generate import gated_generate
    from mara_integrations.engine.generation import Generation
    from mara_integrations.errors import MaraError
    from mara_integrations.evaluation.evaluate import evaluate
    from mara_integrations.frameworks.langchain import ChatMARA
    from mara_integrations.frameworks.marallm import MARALLM
    from mara_integrations.heads.head import MARAHead
    from mara_integrations.runtime import MARAEngine
    from mara_integrations.sampling import GateParams, SamplingParams
    from mara_integrations.training.config import TrainConfig
    from mara_integrations.training.run import train

__version__ = "0.1.0"
__all__ = [
    "MARALLM",
    "ChatMARA",
    "GateParams",
    "Generation",
    "MARAEngine",
    "MARAHead",
    "MaraError",
    "SamplingParams",
    "TrainConfig",
    "__version__",
    "evaluate",
    "gated_generate",
    "train",
]

# Imported on first use (PEP 562): torch and the frameworks take seconds, and a command line may need none of them.
_MODULES = {
    "MARALLM": "frameworks.marallm",
    "ChatMARA": "frameworks.langchain",
    "GateParams": "sampling",
    "Generation": "engine.generation",
    "MARAEngine": "runtime",
    "MARAHead": "heads.head",
    "MaraError": "errors",
    "SamplingParams": "sampling",
    "TrainConfig": "training.config",
    "evaluate": "evaluation.evaluate",
    "gated_generate": "custom_generate",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
