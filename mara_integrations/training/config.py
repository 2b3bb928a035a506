"""What a training run may say; torch-free, so that a command line can check it before anything heavy is imported."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from mara_integrations.data import Format
from mara_integrations.errors import ConfigError
from mara_integrations.models.options import Quantization, keyword_arguments
from mara_integrations.sampling import HeadForm, Params
from mara_integrations.training.records.trackers import TrackerName

Method = Literal["auto", "value", "dpo", "kto", "reward-model", "rloo", "rule", "sac", "sac-published"]


class TrainConfig(Params):
    """Settings of one run of `mara-tools train`.

    Attributes:
        model: Base model: Hub id, folder, `.gguf` file or alias.
        model_kwargs: For `from_pretrained`, by name: `device_map=auto`, `tp_plan=auto` (under torchrun),
            `attn_implementation=eager`, or `quantization_config={quant_method: bitsandbytes, load_in_4bit: true}`. May
            be repeated.
        data: Preference pairs, labelled replies or prompts: a JSONL, JSON, CSV or Parquet file, a folder saved by
            `datasets`, a Hub name as `org/name:train`, or a mixture of several in a .yaml file.
        prompts: Of `reward-model`: what replies are written to, in any form of `data`, where the prompts of the
            preferences are not what the head will meet.
        output: Folder of the head.
        format: What the rows are, or whose export; `auto` goes by the columns.
        column: Where the data has other names: `prompt=question`, `label=stars>=4`; in an export of LangSmith or
            Langfuse, `label` is the name of the feedback. May be repeated.
        skip_bad_rows: Go on without the rows that can't be read, and tell of them.
        method: `auto` chooses by what the data and the other settings say, and how much of it there is.
        reward: What scores the model's own replies to the prompts: `module:function` with TRL's signature,
            `hf:MODEL` for a reward model, or one by name: length, regex, forbidden-words, json, sentiment, toxicity.
            Arguments as in `length?words=60`, a weight as in `sentiment=0.5`. May be repeated; the sum counts.
        normalise_rewards: Give each of several rewards mean 0 and deviation 1 before they are weighed.
        reward_timeout_s: How long a reward may take for one batch.
        judge: Rewards that training never sees, in the notation of `reward`: what else they find in the replies to
            held-out prompts is reported beside it. May be repeated.
        forbid: Words or phrases that must not appear; on a command line one at a time, repeated.
        system_prompt: Put before every prompt that brings none, as the application will.
        max_reply_tokens: Replies are written, and read, up to this many tokens.
        replies_each: Replies sampled for each prompt; left out, as many as `max_replies` allows, at most 4.
        max_replies: Replies sampled in all; further prompts are left out. Left out, what suits the method: 640 for
            `rloo` and `reward-model`, more for `sac`, else 384.
        held_out: Share of the prompts that the head is not fitted on, for early stopping and the final evaluation.
        eval_prompts: Held-out prompts of the final evaluation, at most; 0 leaves it out.
        kl_budget: How far from the base model the head may go, in nats a token; left out, 0.15 for `value`, whose
            scale is calibrated to it, and no bound for `rule`, which holds or does not.
        rounds: Of `rloo` and `reward-model`: times that they learn from what the gated model writes, after the base
            model's own replies, while that helps on held-out prompts. Left out, none where the reward takes partial
            text, which no round improved on, else 2.
        partial_text: Of `rloo`: whether the reward can judge unfinished replies. Then every beginning of a reply, and
            every candidate passed over, is judged too, some 100 texts a reply, which teaches far more than one number a
            reply. Left out, as the reward itself says (`takes_partial_text`), else not.
        correction_rounds: Times that `rule` learns from what the gated model still writes.
        form: Of the head; left out, the method's own.
        beta: Of `dpo` and `kto`: what a nat between head and base model is worth; a small one lets the head go far.
        competitors: Of `dpo` and `kto`: better ranked candidates looked at beside each token of a reply. None was as
            good as 8, for half the reading.
        credit: Of `sac`: who gets a reply's worth, its last decision (`terminal`), every decision (`postback`), or each
            what the text gained by it (`prefix`); left out, `prefix` where the reward takes partial text, else
            `terminal`.
        staleness: Of `sac`: rounds of 64 replies written before the head has learned from the round before, so that as
            many more writers on Ray are busy.
        ray: Processes on Ray that write replies, with a model each, beside one for the reward; 0 is none but this one.
        top_k: Candidates kept by probability; recorded with the head.
        top_p: Of those, the smallest set with this share of the probability; recorded with the head.
        min_candidates: Candidates kept whatever `top_p` says; left out, 2 for `rule`, so that a lone survivor can be
            refused, else 1.
        inner_size: Width of the head's first hidden layer; the second has a quarter.
        epochs: Of each fit, at most.
        patience: Epochs without a better held-out loss before a fit stops.
        learning_rate: Of AdamW; left out, what suits the method.
        weight_decay: Of AdamW.
        batch_size: Tokens a step of a fit.
        track: Where the figures go beside metrics.jsonl: tensorboard (into the head's folder), wandb, trackio. May be
            repeated.
        push_to_hub: Upload the head to this repository of the Hub when it is finished: weights, config, card and reward
            models, in a private repository.
        public: With `push_to_hub`: everybody may read the head.
        seed: Of everything random.
        device: `auto` is CUDA, then MPS, then CPU.
        dtype: `auto` is bfloat16 on GPUs that have it, float32 on CPU.
        quantization: `int8` is for the CPU: a quarter of the memory for linear layers, and faster.
    """

    model: str = "smollm2"
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    data: Path
    prompts: Path | None = None
    output: Path
    format: Format = "auto"
    column: tuple[str, ...] = ()
    skip_bad_rows: bool = False
    method: Method = "auto"
    reward: tuple[str, ...] = ()
    normalise_rewards: bool = False
    reward_timeout_s: float = Field(600.0, gt=0.0)
    judge: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    system_prompt: str | None = None
    max_reply_tokens: int = Field(48, ge=2, le=4096)
    replies_each: int | None = Field(None, ge=1, le=64)
    max_replies: int | None = Field(None, ge=8)
    held_out: float = Field(0.15, gt=0.0, lt=1.0)
    eval_prompts: int = Field(64, ge=0)
    kl_budget: float | None = Field(None, gt=0.0)
    rounds: int | None = Field(None, ge=0, le=100)
    partial_text: bool | None = None
    correction_rounds: int = Field(1, ge=0, le=10)
    form: HeadForm | None = None
    beta: float = Field(0.3, gt=0.0)
    competitors: int = Field(0, ge=0)
    credit: Literal["terminal", "postback", "prefix"] | None = None
    staleness: int = Field(0, ge=0, le=64)
    ray: int = Field(0, ge=0, le=1024)
    top_k: int = Field(40, ge=1)
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    min_candidates: int | None = Field(None, ge=1)
    inner_size: int = Field(1024, ge=8)
    epochs: int = Field(20, ge=1)
    patience: int = Field(4, ge=1)
    learning_rate: float | None = Field(None, gt=0.0)
    weight_decay: float = Field(0.01, ge=0.0)
    batch_size: int = Field(512, ge=1)
    track: tuple[TrackerName, ...] = ()
    push_to_hub: str | None = None
    public: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = "auto"
    dtype: str = "auto"
    quantization: Quantization | None = None

    @field_validator("reward", "judge", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()

    @field_validator("model_kwargs", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        try:
            return keyword_arguments(value or {})
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        if self.reward and self.forbid:
            raise ValueError("give either a reward or forbidden words, not both")
        if self.ray and self.model_kwargs.get("tp_plan") is not None:
            raise ValueError("a process on Ray holds a whole model: give either ray or tp_plan, not both")
        return self

    def described(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON can hold it; paths of this machine left out."""
        elsewhere = {"data", "prompts", "output", "device", "reward_timeout_s", "track", "push_to_hub", "public", "ray"}
        return self.model_dump(mode="json", exclude=elsewhere)

    def to_yaml(self) -> str:
        """All settings, as `--config` reads them."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file, by the names of `TrainConfig`, or by those of the flags.

    Raises:
        ConfigError: If the file can't be read, or has a name that is no setting.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} can't be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} holds no settings", hint="a line each, as `data: prefs.jsonl`")
    settings = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name in settings:
        if name not in TrainConfig.model_fields:
            near = difflib.get_close_matches(name, TrainConfig.model_fields)
            raise ConfigError(
                f"{str(path)!r}: {name!r} is no setting",
                hint=f"did you mean {' or '.join(near)}?" if near else "`mara-tools train --help` lists them",
            )
    return settings
