"""Align the language model you already run: a tiny head accepts or rejects each token, in LangChain and LlamaIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mara_integrations.frameworks.langchain import ChatMARA
    from mara_integrations.frameworks.marallm import MARALLM
    from mara_integrations.heads.head import MARAHead
    from mara_integrations.runtime import MARAEngine

__version__ = "0.1.0"
__all__ = ["MARALLM", "ChatMARA", "MARAEngine", "MARAHead", "__version__"]

# Imported on first use (PEP 562): torch and the frameworks take seconds, and a command line may need none of them.
_HOMES = {
    "MARALLM": "frameworks.marallm",
    "ChatMARA": "frameworks.langchain",
    "MARAEngine": "runtime",
    "MARAHead": "heads.head",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
