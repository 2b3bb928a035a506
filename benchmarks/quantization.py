"""Speed of smaller weights on the CPU: our loop on a model in int8, and in bfloat16, against the same in float32.

Ratios of tokens/s, higher is faster: medians over rounds in which all take turns. One request at a time, 16 at once,
and replies written to train on, with the states of their candidates. Beside them, what they cost: perplexity of texts,
and the share of their places with another most probable token. Each model writes its own replies, of the same length.

    python benchmarks/quantization.py [--model smollm2] [--tokens 40] [--rounds 3] [--threads 1] [--json out.json]

bfloat16 is fast on processors that have instructions for it (AVX512-BF16, AMX), and slower than float32 on others.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from decode import PROMPTS, typical_states
from measure import Ratios, add_options, seconds
from serve import QUESTIONS

from mara_integrations import demo
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.int8 import weight_bytes
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head
from mara_integrations.training.rollouts.workers import RolloutBatch

TEXTS = demo.TRAIN
SMALLER: dict[str, dict[str, str]] = {"int8": {"quantization": "int8"}, "bfloat16": {"dtype": "bfloat16"}}


class Contender:
    """A model with all that runs on it."""

    def __init__(self, name: str, dtype: str = "float32", quantization: str | None = None) -> None:
        self.model = load_model(ModelSpec(name, device="cpu", dtype=dtype, quantization=quantization))
        self.backend = make_backend(self.model.model)
        self.decoder = Decoder.measured(self.backend)

    def answer(self, texts: tuple[str, ...], num_tokens: int, head: MARAHead | None) -> float:
        """Seconds for replies to prompts at once."""
        self.decoder.prefixes.clear()
        sampling = SamplingParams(max_new_tokens=num_tokens)
        ids = [self.model.encoder.encode([Message("user", text)]) for text in texts]
        return seconds(lambda: self.decoder.run([Request(one, sampling, head=head) for one in ids]))[0]

    def write(self, texts: tuple[str, ...], num_tokens: int, head: MARAHead, seed: int) -> float:
        """Tokens/s of replies that training learns from."""
        prompts = [Conversation((Message("user", text),)) for text in texts]
        batch = RolloutBatch(prompts, SamplingParams(max_new_tokens=num_tokens, temperature=1.0), seed, 2, head)
        taken_s, replies = seconds(lambda: batch.generate(self.model, self.backend))
        return sum(len(reply.token_ids) for reply in replies) / taken_s


@torch.inference_mode()
def losses(model: LoadedModel, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-probability of each token, in nats, and the most probable one in its place."""
    loss, best = [], []
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        logits = model.model(input_ids=ids).logits[0, :-1].float()
        loss.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(loss), torch.cat(best)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--texts", type=int, default=48, help="whose perplexity is taken")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    float32 = Contender(args.model)
    smaller = {f"{name} / float32": Contender(args.model, **settings) for name, settings in SMALLER.items()}
    ids = [float32.model.encoder.encode([Message("user", text)]) for text in PROMPTS]
    width = float32.model.hidden_size
    states = typical_states(float32.backend, width, ids)
    head = random_head(width, inner_sizes=(1024, 256), accept_rate=0.95, states=states, seed=1)
    untrained = random_head(width, "residual", inner_sizes=(1024, 256))
    ratios = Ratios()
    for number in range(args.rounds):
        batches = [("one request", (text,)) for text in PROMPTS] + [(f"{len(QUESTIONS)} requests", QUESTIONS)]
        for row, texts in batches:
            for judged, judge in (("ungated", None), ("accept 0.95", head)):
                base_s = float32.answer(texts, args.tokens, judge)
                for column, one in smaller.items():
                    ratios.add(f"{row}, {judged}", column, base_s / one.answer(texts, args.tokens, judge))
        base = float32.write(QUESTIONS[:8], args.tokens, untrained, 16 * number)
        for column, one in smaller.items():
            written = one.write(QUESTIONS[:8], args.tokens, untrained, 16 * number)
            ratios.add("replies to train on", column, written / base)
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()[: args.texts]]
    texts = [f"{row['prompt']} {row['chosen']}" for row in rows]
    base_loss, base_best = losses(float32.model, texts)
    for column, one in smaller.items():
        loss, best = losses(one.model, texts)
        ratios.add("perplexity", column, float((loss.mean() - base_loss.mean()).exp()))
        ratios.add("other most probable tokens, share", column, float((best != base_best).double().mean()))
        weights = weight_bytes(one.model.model) / weight_bytes(float32.model.model)
        ratios.add("memory of weights", column, weights)
    for row in ratios.rows():
        ratios.show(row)
    ratios.write(args.json, float32.model.name)
    return ratios.rows()


if __name__ == "__main__":
    main()
