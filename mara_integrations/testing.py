"""Test doubles, shipped: for our tests, the docs, and users who test chains and agents without a real model.

`tiny_model` is a real transformer with random weights; `ScriptedBackend` answers from a script, so that logic can be
tested with chosen probabilities; `random_head` is a head that really disagrees with its model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mara_integrations.engine.backends.protocol import RowSize, Segment
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.sampling import HeadForm

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def tiny_model(family: str = "llama", *, vocab_size: int = 256, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A two-layer model with random weights on the CPU, no download.

    Args:
        family: A `model_type` of transformers; `gpt2` has its own size names, the others take Llama's.
        vocab_size: Rows of its embedding.
        seed: Seed of its weights.
        **config: More of the family's configuration.
    """
    sizes: dict[str, Any] = {**_SMALL, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family in ("gpt2", "bloom"):
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        sizes = {names.get(name, name): value for name, value in sizes.items()}
        sizes["hidden_size" if family == "bloom" else "n_positions"] = 32 if family == "bloom" else 512
    if family == "falcon":
        del sizes["head_dim"]  # derived, and refused when given
    settings = AutoConfig.for_model(family, **{**sizes, "vocab_size": vocab_size, **config})
    generator_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than a fresh model's, so that contexts matter
                torch.nn.init.normal_(parameter, std=0.2)
    finally:
        torch.set_rng_state(generator_state)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 tokens and `<eos>` at 0, with a small chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{character: i for i, character in enumerate(alphabet[:255], start=1)}}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return tokenizer


def random_head(
    hidden_size: int,
    form: HeadForm = "paper",
    *,
    accept_rate: float = 0.5,
    states: Tensor | None = None,
    seed: int = 0,
    **config: Any,
) -> MARAHead:
    """A head with random weights that accepts about `accept_rate` of typical states.

    Args:
        hidden_size: Width of the states it scores.
        form: See `HeadConfig`.
        accept_rate: For the `paper` form, set by the output bias on `states`.
        states: Typical hidden states, (N, d); standard normal ones when None.
        seed: Seed of its weights.
        **config: More of its `HeadConfig`.
    """
    settings = HeadConfig(form=form, hidden_size=hidden_size, **{"inner_sizes": (64, 16), **config})
    if form == "q":
        return _random_q_head(settings, seed)
    generator = torch.Generator().manual_seed(seed)
    head = AfterstateHead(settings)
    if states is None:
        states = torch.randn(512, hidden_size, generator=generator)
    with torch.no_grad():
        for layer in (head.linear1, head.linear2, head.output_linear):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
        head.output_linear.weight.mul_(30.0)
        if form == "paper":
            out = head(states.float())
            head.output_linear.bias[1] -= (out[:, 1] - out[:, 0]).quantile(1.0 - accept_rate)
    return head.eval().requires_grad_(False)


def _random_q_head(config: HeadConfig, seed: int) -> QHead:
    generator, head = torch.Generator().manual_seed(seed), QHead(config)
    with torch.no_grad():
        for layer in (head.linear1, head.linear2, head.candidate_linear):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
        head.linear2.weight.mul_(10.0)
    return head.eval().requires_grad_(False)


class ScriptedBackend:
    """A backend whose next-token logits are a function of the tokens so far.

    A token's hidden state is a one-hot vector of the token itself and a number that names its context, so that a head
    can be written that knows exactly what it is shown.

    Args:
        script: From the tokens of a row to logits over the vocabulary.
        vocab_size: Number of tokens.
        can_retract: Take drafts: the script is then also asked what comes after tokens that it did not want.
    """

    def __init__(
        self, script: Callable[[Sequence[int]], Sequence[float]], vocab_size: int, *, can_retract: bool = False
    ) -> None:
        self.can_retract = can_retract
        self._script = script
        self._vocab_size = vocab_size
        self._rows: dict[int, list[int]] = {}
        self._branches: dict[int, list[int]] = {}
        self._contexts: list[tuple[int, ...]] = []
        self._next_row = 0
        self.fed: list[list[Segment]] = []

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def reserve(self) -> None:
        """Nothing is set aside."""

    @property
    def open_rows(self) -> int:
        """Rows not closed yet."""
        return len(self._rows)

    def open(self, kept: Any = None, length: int = 0) -> int:
        """A new row, empty: no prefix is ever kept."""
        row, self._next_row = self._next_row, self._next_row + 1
        self._rows[row], self._branches[row] = [], []
        return row

    def keep(self, row: int, length: int) -> None:
        """Keep nothing, so that `fed` shows every token."""

    def fork(self, row: int) -> int:
        """A new row with the same tokens."""
        copied = self.open()
        self._rows[copied] = list(self._rows[row])
        return copied

    def close(self, row: int) -> None:
        """Forget a row."""
        del self._rows[row], self._branches[row]

    def feed(self, segments: Sequence[Segment]) -> Tensor:
        """Record what is fed; the states of all tokens, (T, vocab_size + 1)."""
        self.fed.append(list(segments))
        states = []
        for segment in segments:
            tokens = self._rows[segment.row]
            for token_id in segment.token_ids:
                context = (*tokens, token_id)
                if segment.siblings:
                    self._branches[segment.row].append(token_id)
                else:
                    tokens.append(token_id)
                state = torch.zeros(self._vocab_size + 1)
                state[token_id] = 1.0
                state[-1] = len(self._contexts)  # names its context, for `logits`
                self._contexts.append(context)
                states.append(state)
        return torch.stack(states)

    def commit(self, rows: Sequence[int], branches: Sequence[int]) -> None:
        """Keep one branch of each row."""
        for row, branch in zip(rows, branches, strict=True):
            self._rows[row].append(self._branches[row][branch])
            self._branches[row] = []

    def retract(self, row: int, count: int, *, held: bool) -> None:
        """Take back the last tokens of a row."""
        tokens = self._rows[row]
        self._branches[row] = tokens[-count:][:1] if held else []
        del tokens[-count:]

    @property
    def max_siblings(self) -> int:
        """As many as the packed backend."""
        return 64

    def drop_siblings(self, row: int) -> None:
        """Forget a row's siblings."""
        self._branches[row] = []

    def bytes_for(self, sizes: Sequence[RowSize]) -> int:
        """A byte for each token and each sibling."""
        return sum(size.num_tokens + size.num_siblings for size in sizes)

    def kept_bytes(self, num_tokens: int) -> int | None:
        """Nothing is kept."""
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """What the script says after each state's tokens."""
        return torch.tensor([list(self._script(self._contexts[int(state[-1])])) for state in hidden])

    def next_logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """See `logits`."""
        return self.logits(hidden)

    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        """One-hot vectors of the tokens, as wide as the states."""
        return torch.nn.functional.one_hot(token_ids, self._vocab_size + 1).float()
