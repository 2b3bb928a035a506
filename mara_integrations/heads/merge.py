"""Several heads as one head on disk: their weighted sum, exactly, in one wider perceptron.

Composition adds scores. Each head's own scale and shift of the normalised state go into its first layer, so
that all share the bare normalisation; hidden layers stand side by side, and the last one adds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead


def merge_heads(
    weighted: Sequence[tuple[MARAHead, float]], *, top_k: int | None = None, top_p: float | None = None
) -> MARAHead:
    """One head that scores every state as the weighted sum of several at their own scales.

    Args:
        weighted: The heads and their weights, at least two heads. A weight below 0 reverses a head.
        top_k: Candidate setting of the result, where the heads differ in it.
        top_p: Candidate setting of the result, where the heads differ in it.

    Raises:
        ConfigError: If a weight is 0 or no number, there is one head alone, or the heads differ in a candidate setting
            that is not given.
        HeadError: If the sum is not a head: for the `paper` form, or for different forms, widths or base models.
    """
    if len(weighted) < 2:
        raise ConfigError("there is nothing to merge", hint="name at least two heads")
    for _, weight in weighted:
        if not math.isfinite(weight) or weight == 0:
            raise ConfigError(f"weight {weight!r} is not allowed", hint="any number but 0")
    configs = [head.config for head, _ in weighted]
    first = configs[0]
    if any(config.form == "paper" for config in configs):
        raise HeadError(
            "a head of the 'paper' form can't be merged: its accept probability replaces the base model's instead of "
            "correcting it, so there is nothing to add",
            hint="heads of the 'residual', 'value' and 'q' form add",
        )
    for name, why in (
        ("form", "each form scores something else (a state, a step between two, a state and a token)"),
        ("hidden_size", "they judge states of different widths"),
    ):
        values = list(dict.fromkeys(getattr(config, name) for config in configs))
        if len(values) > 1:
            raise HeadError(f"heads of different {name} can't be merged ({', '.join(map(str, values))}): {why}")
    for config in configs:
        if not first.is_for_model(config.base_model, config.base_model_fingerprint):
            raise HeadError(
                f"heads of different base_model can't be merged ({first.base_model}, {config.base_model}): they were "
                "trained on the states of different models"
            )
    wide = [config.inner_sizes[0] for config in configs]
    narrow = [config.inner_sizes[1] for config in configs]
    merged = MARAHead(
        HeadConfig(
            form=first.form,
            hidden_size=first.hidden_size,
            inner_sizes=(sum(wide), sum(narrow)),
            base_model=first.base_model,
            base_model_fingerprint=first.base_model_fingerprint,
            top_k=_agreed("top_k", configs, top_k),
            top_p=_agreed("top_p", configs, top_p),
            min_candidates=max(config.min_candidates for config in configs),
            greedy_strength=min(config.greedy_strength for config in configs),
            greedy_top_p=min((config.greedy_top_p for config in configs if config.greedy_top_p), default=None),
            system_prompt=_shared_prompt(configs),
            method="merge",
            rewards=tuple(reward for config in configs for reward in config.rewards),
            training={"merged": [{"weight": weight, "head": head.fingerprint} for head, weight in weighted]},
        )
    )
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
        at_wide = at_narrow = 0
        for (head, weight), w, n in zip(weighted, wide, narrow, strict=True):
            rows, columns = slice(at_wide, at_wide + w), slice(at_narrow, at_narrow + n)
            _place(head, weight * head.config.scale, merged, rows, columns)
            at_wide, at_narrow = at_wide + w, at_narrow + n
    return merged.eval().requires_grad_(False)


def _place(head: MARAHead, factor: float, merged: MARAHead, rows: slice, columns: slice) -> None:
    """Write a head's layers into its places of the hidden layers of the merged head, its scores times a factor."""
    assert isinstance(head, AfterstateHead | QHead) and isinstance(merged, AfterstateHead | QHead)
    merged.ln.weight.fill_(1.0)
    merged.linear1.weight[rows] = head.linear1.weight * head.ln.weight
    merged.linear1.bias[rows] = head.linear1.bias + head.linear1.weight @ head.ln.bias
    if isinstance(head, QHead):
        assert isinstance(merged, QHead)
        merged.linear2.weight[columns, rows] = factor * head.linear2.weight
        merged.linear2.bias[columns] = factor * head.linear2.bias
        merged.candidate_linear.weight[columns] = head.candidate_linear.weight
        merged.candidate_linear.bias[columns] = head.candidate_linear.bias
    else:
        assert isinstance(merged, AfterstateHead)
        merged.linear2.weight[columns, rows] = head.linear2.weight
        merged.linear2.bias[columns] = head.linear2.bias
        merged.output_linear.weight[:, columns] = factor * head.output_linear.weight
        merged.output_linear.bias.add_(head.output_linear.bias, alpha=factor)


def _shared_prompt(configs: Sequence[HeadConfig]) -> str | None:
    """The one system prompt that the heads were trained with; None, and a warning, where there are several."""
    prompts = sorted({config.system_prompt for config in configs if config.system_prompt is not None})
    if len(prompts) > 1:
        warnings.warn(
            f"the heads were trained with different system prompts ({', '.join(map(repr, prompts))}): the result "
            "records none, so give it one where it is used",
            stacklevel=3,
        )
        return None
    return prompts[0] if prompts else None


def _agreed(name: str, configs: Sequence[HeadConfig], given: float | None) -> float:
    values = list(dict.fromkeys(getattr(config, name) for config in configs))
    if given is None and len(values) > 1:
        raise ConfigError(
            f"the heads were trained with different {name}: {' and '.join(map(str, values))}",
            hint=f"give one for the result: --{name.replace('_', '-')} {values[0]}",
        )
    return float(values[0] if given is None else given)
