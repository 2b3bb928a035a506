"""Reward models of Hugging Face: a sequence classifier that reads the conversation and the reply.

It has its own tokenizer, chat template, device and dtype, and is loaded on the first call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mara_integrations.errors import RewardError
from mara_integrations.rewards.protocol import reply_text

_SAMPLE_BYTES = 1 << 16  # of each end of a file
_ARGUMENTS = ("label", "text", "device", "dtype", "batch")


class ModelReward:
    """A sequence classifier that scores replies.

    The score of a classifier with one output is its logit. With several outputs, `label` names the one to use, and its
    probability is the score: by softmax, or by sigmoid if the classifier was trained on several labels a text.

    Args:
        source: Hub id or folder.
        label: Name or number of the output.
        text: Text to classify. `conversation` is the prompt and the reply, in the tokenizer's chat template, or as a
            pair of texts if it has none. `reply` is the reply alone, as for classifiers of sentiment.
        device: Device of the model; `auto` is CUDA if there is one, else the CPU.
        dtype: Type of the weights, as torch names it; `auto` is the type they were saved in.
        batch: Number of texts in one forward pass.

    Raises:
        RewardError: If an argument is not allowed.
    """

    takes_partial_text = False  # they are fitted on finished replies

    def __init__(
        self,
        source: str,
        *,
        label: str | None = None,
        text: str = "conversation",
        device: str = "auto",
        dtype: str = "auto",
        batch: str = "16",
    ) -> None:
        if text not in ("conversation", "reply"):
            raise RewardError(f"reward {source!r}: text={text} is not allowed", hint="conversation or reply")
        if not batch.isdigit() or int(batch) < 1:
            raise RewardError(f"reward {source!r}: batch={batch} is not allowed", hint="a number of texts, at least 1")
        self.source, self._label, self._text = source, label, text
        self._device, self._dtype, self._batch = device, dtype, int(batch)
        self._arguments = {"label": label, "text": text, "device": device, "dtype": dtype, "batch": batch}
        name = source.rstrip("/").rpartition("/")[2]
        self.__name__ = f"{name}:{label}" if label is not None else name

    @classmethod
    def of(cls, source: str, arguments: Mapping[str, str]) -> ModelReward:
        """Return a reward from the arguments of a command line.

        Raises:
            RewardError: If one is unknown.
        """
        unknown = [name for name in arguments if name not in _ARGUMENTS]
        if unknown:
            raise RewardError(
                f"reward {source!r}: {unknown[0]!r} is not an argument", hint=f"arguments are {', '.join(_ARGUMENTS)}"
            )
        return cls(source, **arguments)

    def fingerprint(self) -> dict[str, Any]:
        """Return the description with the revision of the model: its commit on the Hub, or a hash of its folder.

        Raises:
            RewardError: If the model can't be found.
        """
        return {**self.spec(), "revision": self._revision()}

    def _revision(self) -> str:
        folder = Path(self.source).expanduser()
        if folder.is_dir():
            digest = hashlib.sha256()
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                with file.open("rb") as content:  # the ends tell: files of weights differ all over
                    first = content.read(_SAMPLE_BYTES)
                    content.seek(max(0, file.stat().st_size - _SAMPLE_BYTES))
                    last = content.read()
                digest.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode() + first + last)
            return digest.hexdigest()
        import huggingface_hub

        try:
            return Path(huggingface_hub.hf_hub_download(self.source, "config.json")).parent.name
        except Exception as error:  # not found, gated, offline: a sentence each
            raise RewardError(
                f"reward model {self.source!r} can't be found: {str(error).strip().splitlines()[0]}",
                hint="name a folder or a Hub id of a sequence classifier",
            ) from error

    def spec(self) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` builds an equal reward from."""
        arguments = {name: value for name, value in self._arguments.items() if value is not None and name != "device"}
        return {"kind": "model", "source": self.source, "arguments": arguments}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Return one score a completion; see `Reward`."""
        import torch

        model, tokenizer, output = self._loaded
        texts = [self._texts(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
        shortest_first = sorted(range(len(texts)), key=lambda i: len(" ".join(texts[i])))  # little padding
        scores: list[float | None] = [None] * len(texts)
        for start in range(0, len(texts), self._batch):
            rows = shortest_first[start : start + self._batch]
            columns = list(zip(*(texts[i] for i in rows), strict=True))
            encoded = tokenizer(
                *(list(column) for column in columns),
                # a template writes special tokens itself
                add_special_tokens=not self._uses_template(tokenizer),
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(model.device)
            with torch.inference_mode():
                logits = model(**encoded).logits.float()
            if output is None:
                values = logits[:, 0]
            elif model.config.problem_type == "multi_label_classification":
                values = logits.sigmoid()[:, output]
            else:
                values = logits.softmax(-1)[:, output]
            for row, value in zip(rows, values.tolist(), strict=True):
                scores[row] = value
        return scores

    def _uses_template(self, tokenizer: Any) -> bool:
        return self._text == "conversation" and bool(getattr(tokenizer, "chat_template", None))

    def _texts(self, tokenizer: Any, prompt: Any, completion: Any) -> tuple[str, ...]:
        """Return the text, or the pair of texts, that the classifier reads."""
        reply = reply_text(completion)
        if self._text == "reply":
            return (reply,)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self._uses_template(tokenizer):
            turns = [*turns, {"role": "assistant", "content": reply}]
            return (str(tokenizer.apply_chat_template(turns, tokenize=False)),)
        return "\n\n".join(turn["content"] for turn in turns), reply

    @cached_property
    def _loaded(self) -> tuple[Any, Any, int | None]:
        """Load the classifier and its tokenizer; return them and the index of the output to use."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = ("cuda" if torch.cuda.is_available() else "cpu") if self._device == "auto" else self._device
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.source, truncation_side="left")  # the reply stands last
            model: Any = AutoModelForSequenceClassification.from_pretrained(self.source, dtype=self._dtype).to(device)
        except Exception as error:  # not found, gated, damaged, no such dtype or device: a sentence each
            reason = str(error).strip().split("\n")[0]
            raise RewardError(
                f"reward model {self.source!r} can't be loaded: {reason}",
                hint="name a folder or a Hub id of a sequence classifier",
            ) from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        return model.eval(), tokenizer, self._output(model.config)

    def _output(self, config: Any) -> int | None:
        names = {int(number): str(name) for number, name in config.id2label.items()}
        if config.num_labels == 1:
            return None
        for number, name in names.items():
            if self._label is not None and self._label.casefold() in (name.casefold(), str(number)):
                return number
        raise RewardError(
            f"reward model {self.source!r} has {config.num_labels} outputs, and "
            + ("none was chosen" if self._label is None else f"none is called {self._label!r}"),
            hint=f"add ?label= and one of {', '.join(names.values())}",
        )
