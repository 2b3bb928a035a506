"""The public names, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mara_integrations

PUBLIC = {
    "ChatMARA",
    "GateParams",
    "Generation",
    "MARAEngine",
    "MARAHead",
    "MARALLM",
    "MaraError",
    "SamplingParams",
    "TrainConfig",
    "__version__",
    "evaluate",
    "gated_generate",
    "train",
}


def test_the_public_names_are_these():
    assert set(mara_integrations.__all__) == PUBLIC
    assert dir(mara_integrations) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(mara_integrations, name) is not None


def test_another_name_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'MARALM'"):
        mara_integrations.MARALM  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_a_framework():
    heavy = "{'torch', 'transformers', 'langchain_core', 'llama_index', 'pydantic'}"
    code = f"import sys, mara_integrations; assert not {heavy} & set(sys.modules); assert mara_integrations.__version__"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_models_of_transformers_are_imported_only_where_one_is_run():
    code = f"""
import sys
import mara_integrations
for name in {sorted(PUBLIC - {"gated_generate"})}:  # that one is called with a loaded model
    getattr(mara_integrations, name)
mara_integrations.MARAEngine("model.gguf", engine="llama.cpp")
mara_integrations.MARALLM("model", base_url="http://localhost:8000/v1")
assert "transformers" in sys.modules and "transformers.modeling_utils" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
