"""Compare a LoRA adapter with a head that learned from it: how much of the fine-tune does the head carry over?

The base model writes replies to training prompts. An adapter is tuned on the quarter of them that VADER likes best. It
then teaches a head, by reading plain replies of the base model. Base model, adapter and head reply to test prompts with
the same random numbers. Perplexity is that of the base model. Brackets are 95 % bootstrap intervals over the test
prompts, of the mean over seeds. A seed decides the replies, the adapter and the head.

    python benchmarks/teacher.py --data FOLDER [--seeds 0 1 2] [--set kl_budget=0.3] [--json out.json]

`pip install 'mara-integrations[peft]'` for the adapter. Rows that the json file holds are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from method_rows import Row, RowFile, against, over_seeds, row_of, shown, training_options
from method_tasks import REPLY_TOKENS, TASKS, Rows, training_prompts, written
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mara_integrations.engine.decoder import Decoder
from mara_integrations.evaluation.comparison import compare
from mara_integrations.evaluation.evaluate import evaluate
from mara_integrations.evaluation.metrics import perplexity_ratio
from mara_integrations.evaluation.results import Evaluation
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.adapters import ADAPTER_FILE, import_peft, load_adapted
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
from mara_integrations.progress import ConsoleReporter
from mara_integrations.rewards import parse_reward
from mara_integrations.runtime import MARAEngine, backend_of
from mara_integrations.sampling import SamplingParams
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.rollouts.replies import Reply, sample_replies
from mara_integrations.training.rollouts.rereading import contexts_of, reread
from mara_integrations.training.run import train

DECODINGS = {"sampled": 1.0, "greedy": 0.0}
HEAD, ADAPTER = "head", "adapter"
BEST, EPOCHS = 0.25, 3  # share of the replies that the adapter is tuned on, and how often it sees them
_IGNORED = -100  # label of tokens that have no loss


def main(arguments: list[str] | None = None) -> list[str]:
    """Tune, train, judge and print; returns the lines."""
    args = _parser().parse_args(arguments)
    model, kept = load_model(ModelSpec(args.model)), RowFile(args.json)
    changed = dict(setting.split("=", 1) for setting in args.set)
    names = {each: ", ".join([each, *(f"{key}={value}" for key, value in changed.items())]) for each in (HEAD, ADAPTER)}
    args.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in args.seeds:
        labels = [f"{name}, seed {seed}, {decoding}" for decoding in DECODINGS for name in names.values()]
        if not kept.rows.keys() >= set(labels):
            for label, row in zip(labels, _measured(args, model, changed, names[HEAD], seed), strict=True):
                kept.add(label, row)
        lines += [shown(label, kept.rows[label]) for label in labels]
    for decoding in DECODINGS:
        ours, theirs = (kept.of(name, args.seeds, decoding) for name in names.values())
        assert ours is not None and theirs is not None
        for name, found in ((names[HEAD], ours), (names[ADAPTER], theirs)):
            lines += over_seeds(f"{name}, {len(args.seeds)} seeds, {decoding}", found)
        lines += against(f"{names[HEAD]} less {ADAPTER}, {decoding}", ours, theirs)
    print("\n".join(lines), flush=True)
    return lines


def _measured(
    args: argparse.Namespace, model: LoadedModel, changed: Mapping[str, str], name: str, seed: int
) -> Iterator[Row]:
    """Tune an adapter, train a head by it, and yield the rows of head and adapter for each decoding."""
    rows, folder = training_prompts(args.data, model), args.output / f"adapter-{seed}"
    if not (folder / ADAPTER_FILE).exists():  # what is saved last
        tune(model, best_replies(model, rows, seed, args.replies), folder, seed)
    settings = {"max_reply_tokens": REPLY_TOKENS, "eval_prompts": 0, "teacher": str(folder), **changed}
    config = TrainConfig.of(
        model=args.model,
        data=written(args.output / "prompts.jsonl", rows),
        output=args.output / f"{name.replace(', ', '-')}-{seed}",
        seed=seed,
        **settings,
    )
    head = train(config, reporter=ConsoleReporter(Console())).head
    tuned = load_adapted(ModelSpec(str(folder)))
    untrained = MARAHead(HeadConfig(form="q", hidden_size=model.hidden_size))
    prompts, judges = TASKS["sentiment"].test_prompts(args.data, model), {"sentiment": parse_reward("sentiment")[0]}
    for temperature in DECODINGS.values():
        asked = {"temperature": temperature, "seed": seed, "max_new_tokens": REPLY_TOKENS}
        of_head = evaluate(MARAEngine(model, head), prompts, judges, **asked)
        yield row_of(of_head, head)
        yield adapter_row(model, of_head, evaluate(MARAEngine(tuned, untrained), prompts, judges, **asked))


def best_replies(model: LoadedModel, rows: Rows, seed: int, count: int) -> list[tuple[Conversation, Reply]]:
    """Return those of the base model's replies that VADER likes best, with their prompts."""
    texts = [row["prompt"] for row in rows[:count]]
    prompts = [Conversation((Message("user", text),)) for text in texts]
    sampling = SamplingParams.of(max_new_tokens=REPLY_TOKENS, temperature=1.0)
    replies = sample_replies(model, Decoder(backend_of(model)), prompts, sampling=sampling, seed=seed)
    scores = parse_reward("sentiment")[0](prompts=texts, completions=[reply.text for reply in replies])
    order = sorted(range(len(replies)), key=lambda i: scores[i], reverse=True)
    return [(prompts[i], replies[i]) for i in order[: max(1, round(BEST * len(order)))]]


def tune(model: LoadedModel, replies: Sequence[tuple[Conversation, Reply]], folder: Path, seed: int) -> None:
    """Tune a LoRA adapter on replies, and save it."""
    peft = import_peft()
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses what transformers will drop
        tuned = peft.get_peft_model(copy.deepcopy(model.model).float().requires_grad_(False), settings)
    tuned.peft_config["default"].base_model_name_or_path = model.name
    examples = [(model.encoder.encode(prompt), list(reply.token_ids)) for prompt, reply in replies]
    rows = [{"input_ids": ids + reply_ids, "labels": [_IGNORED] * len(ids) + reply_ids} for ids, reply_ids in examples]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder.with_suffix(".run")),
        per_device_train_batch_size=8,
        num_train_epochs=EPOCHS,
        learning_rate=2e-4,
        warmup_steps=5,
        seed=seed,
        report_to="none",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=20,
    )
    transformers.Trainer(tuned, arguments, train_dataset=rows, data_collator=_padded).train()
    tuned.save_pretrained(str(folder))


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Return a batch; nothing attends to padding, which comes after every token."""
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in (("input_ids", 0), ("labels", _IGNORED))
    }


def adapter_row(model: LoadedModel, of_head: Evaluation, of_adapter: Evaluation) -> Row:
    """Return the row of an adapter's own replies against the base model's, whose perplexity counts for both."""
    base, tuned = ([example.base for example in evaluation.examples] for evaluation in (of_head, of_adapter))
    prompts = [Conversation(example.prompt) for example in of_head.examples]
    replies = [Reply(i, each.text, tuple(each.token_ids), torch.zeros(0)) for i, each in enumerate(tuned)]
    read = reread(backend_of(model), contexts_of(model, prompts, replies), replies).tokens
    log_probs = [part.tolist() for part in read.split([len(reply.token_ids) for reply in replies])]
    scores = {
        name: {"base": [each.scores[name] for each in base], "gated": [each.scores[name] for each in tuned]}
        for name in of_head.rewards
    }
    preferred = {
        name: compare(of["base"], of["gated"], [True] * len(tuned), 0).preference for name, of in scores.items()
    }
    return {
        "scores": scores,
        "preferred": {name: asdict(found) if found else None for name, found in preferred.items()},
        "perplexity": asdict(perplexity_ratio([each.log_probs for each in base], log_probs)),
        "distinct_2": of_adapter.base.distinct_2 / of_head.base.distinct_2,
        "forwards": 1.0,
    }


def _parser() -> argparse.ArgumentParser:
    parser = training_options(__doc__, "runs/teacher")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--replies", type=int, default=640, help="of the base model, to choose the best quarter from")
    return parser


if __name__ == "__main__":
    main()
