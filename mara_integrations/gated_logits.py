"""The gate of Q-heads for a decoding loop of your own: a function of the last hidden states and the logits.

Q-heads score candidates from the state before them, so whoever has states and logits can gate, in any loop and any
engine; nothing is fed and nothing is kept between calls. Heads of the other forms need `MARAEngine` or
`custom_generate`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mara_integrations.engine.backends.forward import output_embeddings
from mara_integrations.engine.candidates import rank_candidates
from mara_integrations.engine.gate import gated_log_probs, weighted_log_probs
from mara_integrations.engine.head_stacks import HeadStacks, PositionInput
from mara_integrations.engine.settings import resolve_settings
from mara_integrations.errors import ConfigError, ShapeError
from mara_integrations.fingerprints import fingerprint
from mara_integrations.heads.compose import afterstate_parts
from mara_integrations.heads.source import HeadSource, head_name, place_heads


class GatedLogits:
    """Turns logits into those of the gate, whose softmax is what the next token is drawn from.

        gate = GatedLogits(model, head="heads/brand-voice")
        output = model(input_ids, output_hidden_states=True)
        logits = gate(output.hidden_states[-1][:, -1], output.logits[:, -1])

    Args:
        model: The base model, for its output embeddings.
        head: One or several Q-heads; see `MARAEngine`.
        strength: See `GateParams`.
        temperature: Divides the logits before candidates are chosen; above 0. For greedy decoding leave it at 1 and
            take the largest of what comes back.
        top_k: Number of candidates; None is what the head was trained with.
        top_p: Probability mass of the candidates; None is what the head was trained with.
        min_candidates: Least number of candidates; None is what the head was trained with.

    Raises:
        ConfigError: If a setting is out of bounds, no head is named, or one that needs its candidates fed.
        HeadError: If a head can't be read, or does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: HeadSource,
        *,
        strength: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_candidates: int | None = None,
    ) -> None:
        name, width = model.name_or_path or type(model).__name__, model.config.get_text_config().hidden_size
        placed = place_heads(head, model.device, width, name, fingerprint(model))
        if placed is None or afterstate_parts(placed):
            raise ConfigError(
                f"head={head_name(head)!r} can't gate logits alone: it takes heads of the 'q' form, at least one",
                hint="heads of other forms have every candidate fed: `custom_generate` and `MARAEngine` do that",
            )
        given = {"top_k": top_k, "top_p": top_p, "min_candidates": min_candidates, "temperature": temperature}
        prompt = {"system_prompt": ""}  # rendered already
        settings = resolve_settings({**given, **prompt, "head": head, "strength": strength}, {}, lambda _: placed)
        if settings.sampling.temperature == 0:
            raise ConfigError(f"temperature={temperature!r} is not allowed", hint="above 0; take argmax to be greedy")
        self._sampling, self._strength = settings.sampling, settings.gate.strength
        self._model, self._head, self._stacks = model, placed, HeadStacks()

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Return the gate's log-probabilities: those of candidates, and -inf for all other tokens.

        Args:
            hidden: Hidden states that the logits were made of, after the final norm, shape (B, d).
            logits: Next-token logits, with whatever masks or penalties apply, shape (B, V).

        Returns:
            Shape (B, V), in nats, float32, on the device of `logits`.

        Raises:
            ShapeError: If they are not rows, as many of the one as of the other.
        """
        if hidden.dim() != 2 or logits.dim() != 2 or len(hidden) != len(logits):
            raise ShapeError(
                f"hidden states of shape {tuple(hidden.shape)} and logits of shape {tuple(logits.shape)}",
                hint="shapes (B, d) and (B, V): of each sequence the last position alone, as in logits[:, -1]",
            )
        rows, s = len(logits), self._sampling
        candidates = rank_candidates(
            logits,
            top_k=[s.top_k] * rows,
            top_p=[s.top_p] * rows,
            temperature=[s.temperature] * rows,
            min_candidates=[s.min_candidates] * rows,
        )
        live = candidates.live  # (B, K)
        inputs = [PositionInput(self._head, *row) for row in zip(hidden, candidates.counts.tolist(), strict=True)]
        token_ids = candidates.token_ids[live].to(hidden.device)

        def embeddings(token_ids: Tensor) -> Tensor:
            return output_embeddings(self._model, token_ids).to(hidden.device)

        found = self._stacks.score_positions(inputs, token_ids, embeddings, logits.shape[-1])
        scores = torch.zeros(live.shape).masked_scatter_(live, found.cpu())
        log_probs = gated_log_probs(candidates.hazard_logits, live)
        gated = weighted_log_probs(log_probs, scores, self._strength, live)
        out = torch.full(logits.shape, -torch.inf)
        # dead columns repeat tokens of no meaning: the largest of what is written to a token counts
        out.scatter_reduce_(1, candidates.token_ids, gated, "amax")
        return out.to(logits.device)
