"""The logits processor: which request is in which row, for both of vLLM's model runners.

The two have interfaces of their own and load processors from one entry point, where a class of the wrong one is
refused; so this class has both. Only the runner in use calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.sample.logits_processor import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from mara_integrations.vllm.requests import gated_request
from mara_integrations.vllm.served import is_active, served_models

if TYPE_CHECKING:
    from mara_integrations.vllm.batch import Admitted


class GateProcessor(V1Processor, V2Processor):  # type: ignore[misc]  # vLLM is optional
    """Gates the rows of requests that name a head.

    Args:
        vllm_config: Config of the engine.
        place: The device (V1), or the states of requests, which know it (V2).
        is_pin_memory: Whether to use pinned memory (V1).
    """

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool | None = None) -> None:
        from mara_integrations.vllm.batch import BatchGate  # the front end loads this class, and gates nothing

        device = place if isinstance(place, torch.device) else place.device
        self._requests: dict[int, Admitted] = {}  # by row (V1) or by slot (V2)
        self._gate = BatchGate(vllm_config, device) if is_active() else None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose heads can't run; vLLM answers with status 400.

        Raises:
            ConfigError: See `gated_request`.
            HeadError: See `gated_request`.
        """
        cpu = torch.device("cpu")
        gated_request(sampling_params.extra_args, sampling_params.temperature, cpu, served_models())

    def is_argmax_invariant(self) -> bool:
        """Return False: heads change what greedy decoding takes (V1)."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that come, go and move (V1)."""
        if self._gate is not None:
            process_dict_updates(self._requests, batch_update, lambda params, _, __: self._admitted(params))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Note the request of a slot (V2); whether it is gated."""
        request = self._admitted(sampling_params)
        self._requests.pop(req_idx, None)
        if request is not None:
            self._requests[req_idx] = request
        return request is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Gate the logits of a step, in place: (B, V) float32."""
        if self._gate is None:
            return logits
        rows: Sequence[int] = range(len(logits)) if ctx is None else ctx.idx_mapping_np.tolist()
        requests = [self._requests.get(row) for row in rows] if self._requests else []
        return self._gate.apply(logits, requests)

    def _admitted(self, params: Any) -> Admitted | None:
        return None if self._gate is None else self._gate.admit(params)
