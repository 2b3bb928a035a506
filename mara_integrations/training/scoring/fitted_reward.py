"""Reward models fitted to preferences: linear in a reply's words and in its tokens' embeddings.

Preference pairs are fitted by Bradley-Terry regression: the better reply of a pair should score higher. Labelled
replies are fitted by logistic regression, with features of their prompts beside: what the prompt explains of a label
is then no merit of the reply.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, logsigmoid

from mara_integrations.models.embeddings import embeddings
from mara_integrations.models.load import LoadedModel

_MAX_FEATURES, _MIN_TEXTS = 20_000, 3  # n-grams that are in fewer texts say nothing about other texts
_STEPS, _FOLDS, _DECAYS = 50, 5, (1e-4, 1e-3, 1e-2, 1e-1)
_INTERCEPT = 10.0  # a constant feature this large has a weight so small that weight decay does not touch it
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?|[^\w\s]")

Pair: TypeAlias = tuple[str, str]  # a better and a worse reply to one prompt


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A reply labelled good or bad, with the text of its prompt."""

    prompt: str
    reply: str
    is_good: bool


Preferences: TypeAlias = "Sequence[Pair] | Sequence[LabelledText]"


class RewardModel:
    """Sum of two linear reward models, of words and of embeddings, each in standard deviations.

    Args:
        words: Model of the words.
        embeddings: Model of the embeddings.
        deviations: Standard deviation of each over the replies it was fitted to.
    """

    takes_partial_text = True
    __name__ = "reward_model"

    def __init__(self, words: NGramReward, embeddings: EmbeddingReward, deviations: tuple[float, float]) -> None:
        self.words, self.embeddings, self.deviations = words, embeddings, deviations

    @classmethod
    def fit(cls, preferences: Preferences, seed: int, model: LoadedModel) -> RewardModel:
        """Fit both models to the same preferences.

        Args:
            preferences: Pairs, or labelled replies.
            seed: Seed of the cross-validation.
            model: Base model, whose tokenizer and embeddings are used.
        """
        words, embeddings = NGramReward.fit(preferences, seed), EmbeddingReward.fit(preferences, seed, model)
        texts = _replies(preferences)
        return cls(words, embeddings, (float(np.std(words(texts))) or 1.0, float(np.std(embeddings(texts))) or 1.0))

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Return one score a completion; see `Reward`."""
        both = zip(self.words(completions), self.embeddings(completions), strict=True)
        return [words / self.deviations[0] + embedding / self.deviations[1] for words, embedding in both]


class NGramReward:
    """Reward as a linear function of a reply's words and word pairs, tf-idf with unit length.

    Args:
        weights: Weights by n-gram.
        idf: Inverse document frequencies by n-gram.
    """

    takes_partial_text = True
    __name__ = "words"

    def __init__(self, weights: dict[str, float], idf: dict[str, float]) -> None:
        self.weights, self.idf = weights, idf

    @classmethod
    def fit(cls, preferences: Preferences, seed: int) -> NGramReward:
        """Fit weights to preferences; see `RewardModel.fit`."""
        texts = _replies(preferences)
        features = _TfIdf.of(texts)
        if _are_labels(preferences):
            prompts = [example.prompt for example in preferences]
            of_prompts = _TfIdf.of(prompts)
            replies, context = features.matrix(texts), of_prompts.matrix(prompts)
            signs, size = _signs(preferences), len(features.idf)

            def logit(w: Tensor) -> Tensor:
                return signs * (replies.dot(w[:size]) + context.dot(w[size:-1]) + _INTERCEPT * w[-1])

            weights = fit_logistic(logit, size + len(of_prompts.idf) + 1, len(texts), seed)[:size]
        else:
            better, worse = (features.matrix(texts[side::2]) for side in (0, 1))
            weights = fit_logistic(lambda w: better.dot(w) - worse.dot(w), len(features.idf), len(texts) // 2, seed)
        return cls(dict(zip(features.idf, weights.tolist(), strict=True)), features.idf)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Return one score a completion; see `Reward`."""
        features = _TfIdf(self.idf)
        return [sum(v * self.weights[g] for g, v in features.values(_text(c)).items()) for c in completions]


class EmbeddingReward:
    """Reward as a linear function of the mean of a reply's token embeddings in the base model.

    Args:
        model: Base model, whose tokenizer and embeddings are used.
        weights: Weights, (d,).
        mean: Mean of the features, (d,).
        deviation: Standard deviation of the features, (d,).
    """

    takes_partial_text = True
    __name__ = "embeddings"

    def __init__(self, model: LoadedModel, weights: Tensor, mean: Tensor, deviation: Tensor) -> None:
        self.model, self.weights, self.mean, self.deviation = model, weights, mean, deviation

    @classmethod
    def fit(cls, preferences: Preferences, seed: int, model: LoadedModel) -> EmbeddingReward:
        """Fit weights to preferences; see `RewardModel.fit`."""
        texts = _replies(preferences)
        if _are_labels(preferences):
            replies = mean_embeddings(model, texts)
            context = mean_embeddings(model, [example.prompt for example in preferences])
            mean, deviation = replies.mean(0), replies.std(0) + 1e-6
            scaled = [(x - x.mean(0)) / (x.std(0) + 1e-6) / x.shape[1] ** 0.5 for x in (replies, context)]
            features = torch.cat([*scaled, torch.full((len(texts), 1), _INTERCEPT)], dim=1)
            signs = _signs(preferences)
            weights = fit_logistic(lambda w: signs * (features @ w), features.shape[1], len(texts), seed)
            return cls(model, weights[: len(mean)], mean, deviation)
        sides = [mean_embeddings(model, texts[side::2]) for side in (0, 1)]
        mean, deviation = torch.cat(sides).mean(0), torch.cat(sides).std(0) + 1e-6
        gaps = (sides[0] - sides[1]) / deviation / sides[0].shape[1] ** 0.5
        return cls(model, fit_logistic(lambda w: gaps @ w, gaps.shape[1], len(gaps), seed), mean, deviation)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Return one score a completion; see `Reward`."""
        features = (mean_embeddings(self.model, [_text(c) for c in completions]) - self.mean) / self.deviation
        scores: list[float] = (features @ self.weights / features.shape[1] ** 0.5).tolist()
        return scores


def fit_logistic(logit: Callable[[Tensor], Tensor], num_features: int, num_examples: int, seed: int) -> Tensor:
    """Return weights w that minimise the mean of -log sigmoid(logit(w)), with weight decay by cross-validation.

    The decay is the strongest one within a standard error of the best: on noisy preferences, what weaker ones add is
    mostly noise, which shows less in the replies of another model.

    Args:
        logit: Returns the log-odds of each example as it was observed, (N,), from weights. For a pair, the score of the
            better reply less that of the worse one (Bradley-Terry). For a label, the score, negated if it is bad.
        num_features: Length of w.
        num_examples: Number of examples, N.
        seed: Seed of the folds of the cross-validation.

    Source: Bradley and Terry 1952; Hastie, Tibshirani and Friedman 2009, section 7.10 (the one-standard-error rule).
    """
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    folds = order.chunk(_FOLDS)

    def fitted(rows: Tensor, decay: float) -> Tensor:
        w = torch.zeros(num_features, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            value = -logsigmoid(logit(w)[rows]).mean() + decay * w.square().sum()
            value.backward()
            return float(value.detach())

        optimizer.step(loss)
        return w.detach()

    def held_out_losses(decay: float) -> Tensor:
        others = [torch.cat([*folds[:i], *folds[i + 1 :]]) for i in range(len(folds))]
        return torch.stack(
            [-logsigmoid(logit(fitted(rows, decay))[fold]).mean() for rows, fold in zip(others, folds, strict=True)]
        )

    losses = torch.stack([held_out_losses(decay) for decay in _DECAYS])  # (decays, folds)
    means, errors = losses.mean(1), losses.std(1) / len(folds) ** 0.5
    best = int(means.argmin())
    good = (means <= means[best] + errors[best]).nonzero()[:, 0]
    return fitted(order, _DECAYS[int(good[-1])])


class _TfIdf:
    """Words and word pairs of texts as tf-idf values of unit length, so that a long text counts for no more."""

    def __init__(self, idf: dict[str, float]) -> None:
        self.idf = idf

    @classmethod
    def of(cls, texts: Sequence[str]) -> _TfIdf:
        """Find the n-grams of texts and their inverse document frequencies."""
        # dict.fromkeys, not set(): the order of a set changes from process to process, and with it the order of sums
        counts = Counter(gram for text in texts for gram in dict.fromkeys(_grams(text)))
        known = [gram for gram, count in counts.most_common(_MAX_FEATURES) if count >= _MIN_TEXTS]
        return cls({gram: float(np.log(len(texts) / counts[gram])) for gram in known})

    def values(self, text: str) -> dict[str, float]:
        """Return the values of a text by n-gram."""
        counts = Counter(gram for gram in _grams(text) if gram in self.idf)
        values = {gram: float(np.log1p(count)) * self.idf[gram] for gram, count in counts.items()}
        length = sum(value * value for value in values.values()) ** 0.5
        return {gram: value / length for gram, value in values.items()} if length else {}

    def matrix(self, texts: Sequence[str]) -> _SparseMatrix:
        """Return the values of texts, a row a text."""
        index = {gram: i for i, gram in enumerate(self.idf)}
        return _SparseMatrix([{index[gram]: v for gram, v in self.values(text).items()} for text in texts])


class _SparseMatrix:
    """Rows of few features each, for a fast product with weights."""

    def __init__(self, rows: Sequence[dict[int, float]]) -> None:
        counts = torch.tensor([0, *map(len, rows)])
        self._starts = counts.cumsum(0)[:-1]
        self._index = torch.tensor([feature for row in rows for feature in row], dtype=torch.long)
        self._value = torch.tensor([value for row in rows for value in row.values()])

    def dot(self, weights: Tensor) -> Tensor:
        """Return the product of every row with weights, (N,)."""
        if not len(self._index):  # no text has a known n-gram; embedding_bag refuses a table without rows
            return weights.new_zeros(len(self._starts))
        return embedding_bag(self._index, weights[:, None], self._starts, mode="sum", per_sample_weights=self._value)[
            :, 0
        ]


@torch.inference_mode()
def mean_embeddings(model: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Return the mean embedding of each text's tokens, (N, d)."""
    token_ids = model.tokenizer(list(texts), add_special_tokens=False).input_ids  # at once, which is much faster
    rows = (_embeddings(model, ids) for ids in token_ids)
    means = [own.mean(0) if len(own) else own.new_zeros(own.shape[1]) for own in rows]
    return torch.stack(means).cpu().clone()


def _embeddings(model: LoadedModel, token_ids: Sequence[int]) -> Tensor:
    """Return the input embeddings of tokens, (N,) to float32 (N, d)."""
    if model.engine == "llama.cpp":
        rows: Tensor = model.model.input_embeddings(torch.tensor(token_ids, dtype=torch.long))
        return rows
    return embeddings(model.parts or model.model, token_ids).float()


def _are_labels(preferences: Preferences) -> TypeGuard[Sequence[LabelledText]]:
    return isinstance(preferences[0], LabelledText)


def _replies(preferences: Preferences) -> list[str]:
    """Return the texts of replies: of pairs, the better one and the worse one in turn."""
    texts: list[str] = []
    for each in preferences:
        texts += [each.reply] if isinstance(each, LabelledText) else each
    return texts


def _signs(examples: Sequence[LabelledText]) -> Tensor:
    return torch.tensor([1.0 if example.is_good else -1.0 for example in examples])


def _grams(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [" ".join(pair) for pair in itertools.pairwise(words)]


def _text(completion: Any) -> str:
    """Return the text of a completion in either of TRL's forms."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
