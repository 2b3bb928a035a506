"""Limits on the memory and work of one engine. Torch-free, so that a command line can check them early."""

from __future__ import annotations

from pydantic import Field

from mara_integrations.sampling import Params


class EngineLimits(Params):
    """Limits of the engine that serves one loaded model.

    Attributes:
        max_live: Most replies decoded together in one batch; other requests wait.
        max_waiting: Most requests that wait to be decoded; whoever submits one more waits for room.
        prefill_chunk: Most prompt tokens in one forward, over all sequences; a quarter of it while others decode.
        kv_bytes: Most memory for keys and values of running replies, in bytes. A request starts only when all that it
            may need is free: its prompt, `max_new_tokens`, and the candidates of one position. None takes a share of
            the memory that is free once the model is loaded.
        prefix_cache_bytes: Most memory for keys and values that are kept for later prompts with the same beginning, in
            bytes; 0 keeps none. None makes room for some 8,000 tokens.
        head_cache_bytes: Most memory for the heads that are kept in memory, in bytes. All engines of the process share
            them, and the value given last holds; None leaves it as it is, at first 4 GiB.
    """

    max_live: int = Field(64, ge=1, le=4096)
    max_waiting: int = Field(1024, ge=1, le=1_000_000)
    prefill_chunk: int = Field(512, ge=1, le=65_536)
    kv_bytes: int | None = Field(None, ge=1 << 20, le=1 << 50)
    prefix_cache_bytes: int | None = Field(None, ge=0, le=1 << 50)
    head_cache_bytes: int | None = Field(None, ge=1, le=1 << 50)
