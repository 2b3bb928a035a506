"""The plug-in for vLLM: `vllm serve` and `LLM` gate replies by Q-heads, a head of its own for every request.

vLLM finds it by its entry points, and it does nothing unless `MARA_HEADS` names a folder of heads:

    MARA_HEADS=heads vllm serve MODEL
    LLM(MODEL).generate(prompt, SamplingParams(extra_args={"mara": {"head": "brand-voice", "strength": 0.8}}))

Over HTTP the same are `vllm_xargs={"mara_head": "brand-voice", "mara_strength": 0.8}`. Settings are `head`, one name or
a list of names, `weights` of these, `strength`, and of candidates `top_k`, `top_p` and `min_candidates`. vLLM's own
sampling settings apply to what the gate leaves.

`logits_layer` sees the hidden states, `processor` the requests; `kernel` is the gate. Nothing here is imported before
vLLM asks for it.
"""

from __future__ import annotations

import logging

from mara_integrations.vllm.served import heads_folder, is_active, prepare

# Versions of vLLM that the tests ran on.
TESTED_VERSIONS = ("0.32",)

_log = logging.getLogger(__name__)


def register() -> None:
    """Set the plug-in up in a process of vLLM; the entry point `vllm.general_plugins`.

    Raises:
        ConfigError: If `MARA_HEADS` names no folder.
        ModelError: If this version of vLLM has no place where hidden states are seen.
    """
    if not is_active():
        return
    heads_folder()
    prepare()

    from mara_integrations.vllm.logits_layer import replace_logits_layer

    replace_logits_layer()
    _warn_of_other_versions()


def _warn_of_other_versions() -> None:
    import vllm

    version = str(vllm.__version__)
    if not any(version == tested or version.startswith(f"{tested}.") for tested in TESTED_VERSIONS):
        _log.warning(
            "vLLM %s was never tested with mara_integrations, which knows %s: check replies with a head against "
            "those of `MARAEngine` before you rely on them",
            version,
            " and ".join(TESTED_VERSIONS),
        )
