"""Reward models fitted to preferences: n-grams or embeddings of a reply, weighed by Bradley-Terry regression."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, logsigmoid

from mara_integrations.engine.backends.tensor_parallel import embeddings
from mara_integrations.models.load import LoadedModel

Preference = tuple[str, str]  # a better and a worse reply
_MAX_FEATURES, _MIN_TEXTS = 20_000, 3  # n-grams that are in fewer replies say nothing of others
_STEPS, _FOLDS, _DECAYS = 50, 5, (1e-4, 1e-3, 1e-2, 1e-1)
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?|[^\w\s]")


class RewardModel:
    """Worth of a reply: what its words and what its embeddings say, each in standard deviations.

    Args:
        words: The one.
        embeddings: The other.
        spreads: Of each, over the replies it was fitted to.
    """

    takes_partial_text = True
    __name__ = "reward_model"

    def __init__(self, words: NGramReward, embeddings: EmbeddingReward, spreads: tuple[float, float]) -> None:
        self.words, self.embeddings, self.spreads = words, embeddings, spreads

    @classmethod
    def fit(cls, pairs: Sequence[Preference], seed: int, model: LoadedModel) -> RewardModel:
        """Each view to the same pairs of texts."""
        words, embeddings = NGramReward.fit(pairs, seed), EmbeddingReward.fit(pairs, seed, model)
        texts = [text for pair in pairs for text in pair]
        return cls(words, embeddings, (float(np.std(words(texts))) or 1.0, float(np.std(embeddings(texts))) or 1.0))

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """See `Reward`."""
        said = zip(self.words(completions), self.embeddings(completions), strict=True)
        return [by_words / self.spreads[0] + by_embeddings / self.spreads[1] for by_words, by_embeddings in said]


class NGramReward:
    """Worth of a reply as the sum of the weights of its words and word pairs, tf-idf with unit length.

    Args:
        weights: By n-gram; its inverse document frequency is part of its tf-idf value.
        idf: By n-gram.
    """

    takes_partial_text = True
    __name__ = "words"

    def __init__(self, weights: dict[str, float], idf: dict[str, float]) -> None:
        self.weights, self.idf = weights, idf

    @classmethod
    def fit(cls, pairs: Sequence[Preference], seed: int) -> NGramReward:
        """Bradley-Terry on pairs of texts."""
        # dict.fromkeys, not set(): the order of a set changes from process to process, and with it the order of sums
        counts = Counter(gram for pair in pairs for text in pair for gram in dict.fromkeys(_grams(text)))
        known = [gram for gram, count in counts.most_common(_MAX_FEATURES) if count >= _MIN_TEXTS]
        idf = {gram: float(np.log(2 * len(pairs) / counts[gram])) for gram in known}
        index = {gram: i for i, gram in enumerate(known)}
        sides = []
        for side in (0, 1):
            values = [_tf_idf(pair[side], idf) for pair in pairs]
            sides.append(_Sparse([{index[gram]: v for gram, v in value.items()} for value in values]))
        weights = fit_bradley_terry(lambda w: sides[0].dot(w) - sides[1].dot(w), len(known), len(pairs), seed)
        return cls(dict(zip(known, weights.tolist(), strict=True)), idf)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """See `Reward`."""
        return [sum(v * self.weights[g] for g, v in _tf_idf(_text(c), self.idf).items()) for c in completions]


class EmbeddingReward:
    """Worth of a reply as a linear function of the mean of its tokens' embeddings in the base model.

    Args:
        model: Whose tokenizer and embeddings.
        weights: (d,).
        mean: Of the features, (d,).
        spread: Of the features, (d,).
    """

    takes_partial_text = True
    __name__ = "embeddings"

    def __init__(self, model: LoadedModel, weights: Tensor, mean: Tensor, spread: Tensor) -> None:
        self.model, self.weights, self.mean, self.spread = model, weights, mean, spread

    @classmethod
    def fit(cls, pairs: Sequence[Preference], seed: int, model: LoadedModel) -> EmbeddingReward:
        """Bradley-Terry on pairs of texts."""
        sides = [_embedded(model, [pair[side] for pair in pairs]) for side in (0, 1)]
        mean, spread = torch.cat(sides).mean(0), torch.cat(sides).std(0) + 1e-6
        gaps = (sides[0] - sides[1]) / spread / sides[0].shape[1] ** 0.5
        weights = fit_bradley_terry(lambda w: gaps @ w, gaps.shape[1], len(pairs), seed)
        return cls(model, weights, mean, spread)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """See `Reward`."""
        features = (_embedded(self.model, [_text(c) for c in completions]) - self.mean) / self.spread
        values: list[float] = (features @ self.weights / features.shape[1] ** 0.5).tolist()
        return values


def fit_bradley_terry(gap: Callable[[Tensor], Tensor], num_features: int, num_pairs: int, seed: int) -> Tensor:
    """Weights w that make better replies win: least -log sigmoid of the gap, and a decay chosen by cross-validation.

    The strongest decay counts that is within a standard error of the best: what a weaker one adds on noisy preferences
    is mostly noise, and shows less in the replies of another model.

    Args:
        gap: Of weights, how much the better reply of each pair scores above the worse one, (N,).
        num_features: Length of w.
        num_pairs: How many there are.
        seed: Of what is held out.

    Source: Bradley and Terry 1952; Hastie, Tibshirani and Friedman 2009, section 7.10 (the one-standard-error rule).
    """
    order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed))
    folds = order.chunk(_FOLDS)

    def fitted(rows: Tensor, decay: float) -> Tensor:
        w = torch.zeros(num_features, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            value = -logsigmoid(gap(w)[rows]).mean() + decay * w.square().sum()
            value.backward()
            return float(value.detach())

        optimizer.step(loss)
        return w.detach()

    def held_out_losses(decay: float) -> Tensor:
        others = [torch.cat([*folds[:i], *folds[i + 1 :]]) for i in range(len(folds))]
        return torch.stack(
            [-logsigmoid(gap(fitted(rows, decay))[fold]).mean() for rows, fold in zip(others, folds, strict=True)]
        )

    losses = torch.stack([held_out_losses(decay) for decay in _DECAYS])  # (decays, folds)
    means, errors = losses.mean(1), losses.std(1) / len(folds) ** 0.5
    best = int(means.argmin())
    good = (means <= means[best] + errors[best]).nonzero()[:, 0]
    return fitted(order, _DECAYS[int(good[-1])])


class _Sparse:
    """Rows of few features each, for a fast product with weights."""

    def __init__(self, rows: Sequence[dict[int, float]]) -> None:
        counts = torch.tensor([0, *map(len, rows)])
        self._starts = counts.cumsum(0)[:-1]
        self._index = torch.tensor([feature for row in rows for feature in row], dtype=torch.long)
        self._value = torch.tensor([value for row in rows for value in row.values()])

    def dot(self, weights: Tensor) -> Tensor:
        """Of every row, (N,)."""
        return embedding_bag(self._index, weights[:, None], self._starts, mode="sum", per_sample_weights=self._value)[
            :, 0
        ]


def _grams(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [" ".join(pair) for pair in itertools.pairwise(words)]


def _tf_idf(text: str, idf: dict[str, float]) -> dict[str, float]:
    """Of unit length, so that a long reply is not worth more for being long."""
    counts = Counter(gram for gram in _grams(text) if gram in idf)
    values = {gram: float(np.log1p(count)) * idf[gram] for gram, count in counts.items()}
    length = sum(value * value for value in values.values()) ** 0.5
    return {gram: value / length for gram, value in values.items()} if length else {}


@torch.inference_mode()
def _embedded(model: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Mean embedding of each text's tokens, (N, d)."""
    token_ids = [model.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    rows = (embeddings(model.parts or model.model, ids).float() for ids in token_ids)
    means = [own.mean(0) if len(own) else own.new_zeros(own.shape[1]) for own in rows]
    return torch.stack(means).cpu().clone()


def _text(completion: Any) -> str:
    """Of TRL's two forms."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
