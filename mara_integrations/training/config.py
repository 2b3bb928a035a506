"""The settings of a training run. Torch-free: a command line checks them before anything heavy is imported."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from mara_integrations.data import Format
from mara_integrations.data.documents import CONTEXT, QUERY
from mara_integrations.errors import ConfigError
from mara_integrations.models.options import (
    Quantization,
    TrainingEngineName,
    keyword_arguments,
    read_yaml_settings,
)
from mara_integrations.sampling import HeadForm, Params
from mara_integrations.training.recipes import recipe_names, with_recipe

MethodName = Literal["auto", "value", "dpo", "kto", "reward-model", "rloo", "rule", "sac", "principle", "grounding"]
Contrast = Literal["neutral", "opposite", "both"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]


class TrainConfig(Params):
    """Settings of one training run, by the names of the options of `mara-tools train`."""

    model: Annotated[str, Field(description="Base model: Hub id, folder, .gguf file or alias.")] = "smollm2"
    data: Annotated[
        Path | None,
        Field(
            description="Preference pairs, labelled replies or prompts: a JSONL, JSON, CSV or Parquet file, a folder "
            "saved by datasets, a Hub name such as org/name:train, or a mixture of several in a .yaml file. With "
            "--principle or --recipe it may be left out: then prompts are used that come with the package."
        ),
    ] = None
    output: Annotated[Path, Field(description="Folder that the head is written to.")]
    overwrite: Annotated[bool, Field(description="Replace a finished head in the output folder.")] = False
    recipe: Annotated[
        str | None,
        Field(
            description=f"Settings that come with the package: {', '.join(recipe_names())}. They hold where no other "
            "option or file says otherwise; mara-tools recipes NAME shows them."
        ),
    ] = None
    method: Annotated[
        MethodName,
        Field(
            description="Training method. auto takes principle with --principle, rule with --forbid, rloo with "
            "--reward, grounding where prompts have a column context, reward-model from 300 preference pairs on, else "
            "value."
        ),
    ] = "auto"
    reward: Annotated[
        tuple[str, ...],
        Field(
            description="Function that scores replies which the model generates to the prompts: module:function with "
            "TRL's signature, hf:MODEL for a reward model, llm:PROVIDER:MODEL for a chat model that judges by a rubric "
            "(llm:openai:gpt-5-mini?rubric=rubric.md), or a built-in: length, regex, forbidden-words, json, "
            "sentiment, toxicity, language, reading-level, ifeval, answered, admitted, or a rule such as no-pii. "
            "Arguments follow as in length?words=60, a weight as in sentiment=0.5. May be repeated; the weighted sum "
            "counts."
        ),
    ] = ()
    forbid: Annotated[
        tuple[str, ...],
        Field(
            description="What must not appear in replies: a word or phrase (refund, or refund* with all its endings), "
            "re:PATTERN, or a ready rule: rule:pii, email, phone, card, iban, url, markdown, emoji, long?words=60, "
            "hard-words?syllables=4, informal, flattery, refusal or missing-answer. May be repeated."
        ),
    ] = ()
    require: Annotated[
        tuple[str, ...],
        Field(
            description="What must appear in each reply, in the same notation. It is learned as a reward, and so is "
            "--forbid beside it. May be repeated."
        ),
    ] = ()
    principle: Annotated[
        tuple[str, ...],
        Field(
            description="Sentence that says how replies should be, as a system prompt would: the head is trained "
            "from it alone. May be repeated: several are read together, or, where one has a weight as in "
            "'Be warm.=0.5', each by itself, and what they change is added by weight."
        ),
    ] = ()
    principle_file: Annotated[Path | None, Field(description="Text file with such sentences.")] = None
    against: Annotated[
        str | None,
        Field(
            description="The opposite of the principle, in the same form. --contrast opposite derives one where there "
            "is none."
        ),
    ] = None
    contrast: Annotated[
        Contrast | None,
        Field(
            description="What the model reads its replies under beside the principle; the difference is what the head "
            "learns. The opposite helps where it is a mood, as gloomy of cheerful, and harms where it says what to do, "
            "as helping with anything. Default: both with --against, else neutral."
        ),
    ] = None
    system_prompt: Annotated[
        str | None,
        Field(
            description="System prompt of your application. It is put before every prompt that has none, and recorded "
            "with the head."
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Seed of everything random.")] = 0

    format: Annotated[
        Format,
        Field(description="Kind of the rows, or the platform they were exported from. auto goes by the columns."),
    ] = "auto"
    column: Annotated[
        tuple[str, ...],
        Field(
            description="Column of another name, as prompt=question or label=stars>=4. In an export of LangSmith or "
            "Langfuse, label is the name of the feedback. May be repeated."
        ),
    ] = ()
    context_template: Annotated[
        str | None,
        Field(
            description="For grounding: the prompt of your application, with {context_str} where the documents stand "
            "and {query_str} for the question. Default: LlamaIndex's own."
        ),
    ] = None
    skip_bad_rows: Annotated[bool, Field(description="Leave out rows that can't be read, and report them.")] = False
    prompts: Annotated[
        Path | None,
        Field(
            description="Prompts that the model replies to in method reward-model, in any form of --data, where your "
            "application's prompts differ from those of the preferences."
        ),
    ] = None
    held_out: Annotated[
        float,
        Field(
            gt=0.0,
            lt=1.0,
            description="Share of the prompts that are held out: the head is not fitted on them. They decide when a "
            "fit stops, and the final evaluation uses them.",
        ),
    ] = 0.15
    eval_prompts: Annotated[
        int, Field(ge=0, description="Largest number of held-out prompts in the final evaluation; 0 skips it.")
    ] = 64

    normalise_rewards: Annotated[
        bool, Field(description="Scale each of several rewards to mean 0 and deviation 1 before they are weighted.")
    ] = False
    reward_timeout_s: Annotated[float, Field(gt=0.0, description="Seconds that a reward may take for one batch.")] = (
        600.0
    )
    max_judge_calls: Annotated[
        int,
        Field(
            ge=1,
            description="Calls that LLM judges may make before training stops. Their answers are kept: the same "
            "command goes on from there, with as many calls again.",
        ),
    ] = 5000  # more than a run of default settings makes, and few enough that a mistake does not ruin anybody
    partial_text: Annotated[
        bool | None,
        Field(
            description="Whether the reward can score unfinished replies. If so, rloo scores every beginning of a "
            "reply and every rejected candidate, some 100 texts a reply, and learns much more from each. Default: "
            "the reward's own attribute takes_partial_text, else no."
        ),
    ] = None
    judge: Annotated[
        tuple[str, ...],
        Field(
            description="Reward that is only reported, never trained on, in the notation of --reward. It shows what "
            "else changes in the replies. May be repeated."
        ),
    ] = ()

    max_reply_tokens: Annotated[
        int, Field(ge=2, le=4096, description="Length at which replies are cut, given or generated, in tokens.")
    ] = 48
    max_replies: Annotated[
        int | None,
        Field(
            ge=8,
            description="Number of replies to generate in all; prompts beyond it are left out. Default: 640 for rloo "
            "and reward-model, 320 for principle, 1152 for sac, else 384.",
        ),
    ] = None
    replies_each: Annotated[
        int | None,
        Field(
            ge=1, le=64, description="Replies to generate to each prompt. Default: up to 4, as --max-replies allows."
        ),
    ] = None
    top_k: Annotated[
        int, Field(ge=1, description="Most probable tokens that are candidates at a position; recorded with the head.")
    ] = 40
    top_p: Annotated[
        float,
        Field(
            gt=0.0,
            le=1.0,
            description="Candidates are cut to the smallest set with this share of the probability; recorded with "
            "the head.",
        ),
    ] = 0.95
    min_candidates: Annotated[
        int | None,
        Field(
            ge=1,
            description="Candidates that are kept whatever --top-p cuts. Default: 2 for rule, so that a lone candidate "
            "can be rejected, else 1.",
        ),
    ] = None

    kl_budget: Annotated[
        float | None,
        Field(
            gt=0.0,
            description="Bound on how far the head may move the model from the base model: their KL divergence, in "
            "nats a token. Default: 0.15; none for rule, which holds or does not.",
        ),
    ] = None
    form: Annotated[
        HeadForm | None,
        Field(
            description="Form of the head: q scores candidates before they are fed, the others after it. Default: the "
            "method's own."
        ),
    ] = None
    inner_size: Annotated[
        int | None,
        Field(
            ge=8,
            description="Width of the head's first hidden layer; the second is a quarter of it. Default: 1024, or 256 "
            "for heads of the q form.",
        ),
    ] = None
    epochs: Annotated[int, Field(ge=1, description="Largest number of epochs of a fit.")] = 20
    patience: Annotated[
        int, Field(ge=1, description="Epochs without a lower held-out loss before a fit stops early.")
    ] = 4
    learning_rate: Annotated[
        float | None, Field(gt=0.0, description="Learning rate of AdamW. Default: the method's own.")
    ] = None
    weight_decay: Annotated[float, Field(ge=0.0, description="Weight decay of AdamW.")] = 0.01
    batch_size: Annotated[int, Field(ge=1, description="Tokens a step of a fit.")] = 512

    rounds: Annotated[
        int | None,
        Field(
            ge=0,
            le=100,
            description="For rloo and reward-model: rounds of training on the gated model's own replies, after the "
            "base model's. They end early when one does not help on held-out prompts. Default: 0 where the reward "
            "scores partial text, else 2.",
        ),
    ] = None
    correction_rounds: Annotated[
        int, Field(ge=0, le=10, description="For rule: rounds of training on what the gated model still gets wrong.")
    ] = 1
    beta: Annotated[
        float,
        Field(
            gt=0.0,
            description="For dpo and kto: strength of the pull towards the base model; smaller lets the head move "
            "further.",
        ),
    ] = 0.3
    competitors: Annotated[
        int,
        Field(
            ge=0,
            description="For dpo and kto: better ranked candidates that are scored beside each token of a reply. 0 was "
            "as good as 8, in half the time.",
        ),
    ] = 0
    credit: Annotated[
        Literal["terminal", "postback", "prefix"] | None,
        Field(
            description="For sac: which decisions get a reply's reward: the last one (terminal), all (postback), or "
            "each the change of the reward at its token (prefix). Default: prefix where the reward scores partial "
            "text, else terminal."
        ),
    ] = None
    staleness: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="For sac: rounds of 64 replies that may be generated ahead with an older head, so that "
            "several processes on Ray stay busy.",
        ),
    ] = 0

    track: Annotated[
        tuple[TrackerName, ...],
        Field(
            description="Where metrics go beside metrics.jsonl: tensorboard (into the output folder), wandb or "
            "trackio. May be repeated."
        ),
    ] = ()
    push_to_hub: Annotated[
        str | None,
        Field(
            description="Private repository of the Hugging Face Hub that the finished head is uploaded to: weights, "
            "config, card and reward models."
        ),
    ] = None
    public: Annotated[bool, Field(description="With --push-to-hub: everybody may read the repository.")] = False
    device: Annotated[str, Field(description="auto is CUDA, then MPS, then CPU.")] = "auto"
    dtype: Annotated[str, Field(description="auto is bfloat16 on GPUs that have it, float32 on CPU.")] = "auto"
    quantization: Annotated[
        Quantization | None,
        Field(description="int8 is for the CPU: a quarter of the memory for linear layers, and faster."),
    ] = None
    model_kwargs: Annotated[
        dict[str, Any],
        Field(
            default_factory=dict,
            description="Argument of from_pretrained, as device_map=auto, tp_plan=auto (under torchrun) or "
            "quantization_config={quant_method: bitsandbytes, load_in_4bit: true}; of llama.cpp n_ctx, n_gpu_layers or "
            "n_threads. May be repeated.",
        ),
    ]
    engine: Annotated[
        TrainingEngineName,
        Field(
            description="What runs the model while the head is trained: llama.cpp takes .gguf files in their own "
            "quantisation, and trains heads of the form q. auto is transformers, or llama.cpp for a .gguf file whose "
            "float32 copy memory can't hold."
        ),
    ] = "auto"
    ray: Annotated[
        int,
        Field(
            ge=0,
            le=1024,
            description="Processes on Ray that generate replies, with a model each; the reward runs in another. 0: "
            "everything runs in this process.",
        ),
    ] = 0

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, values: Any) -> Any:
        return with_recipe(values) if isinstance(values, dict) else values

    @field_validator("reward", "judge", "principle", mode="before")
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

    @property
    def principle_contrast(self) -> Contrast:
        """`contrast`, or what stands for it where it is not given."""
        return self.contrast or ("neutral" if self.against is None else "both")

    @field_validator("principle", "against")
    @classmethod
    def _not_blank(cls, value: Any) -> Any:
        if any(not text.strip() for text in ((value,) if isinstance(value, str) else value or ())):
            raise ValueError("a sentence is needed, such as 'Be warm and brief.'")
        return value

    @field_validator("context_template")
    @classmethod
    def _has_places(cls, value: str | None) -> str | None:
        if value is not None and not (value.count(CONTEXT) == 1 and QUERY in value):
            raise ValueError(f"it needs {CONTEXT} once, and {QUERY}")
        return value

    @field_validator("system_prompt")
    @classmethod
    def _no_controls(cls, value: str | None) -> str | None:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in set(value or "") - set("\n\r\t")):
            raise ValueError("control characters are not allowed")
        return value

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.reward and self.forbid:
            raise ValueError("give either a reward or forbidden words, not both")
        has_principle = bool(self.principle) or self.principle_file is not None
        if has_principle and self.forbid:
            raise ValueError("give either a principle or forbidden words, not both")
        if self.ray and self.model_kwargs.get("tp_plan") is not None:
            raise ValueError("a process on Ray holds a whole model: give either ray or tp_plan, not both")
        if self.ray and self.engine == "llama.cpp":
            raise ValueError("engine='llama.cpp' runs in this process alone: leave ray out, or use transformers")
        return self

    def described(self) -> dict[str, Any]:
        """Return the settings that decide the head, as JSON values; without paths of this machine."""
        return self.model_dump(mode="json", exclude=_NOT_DECISIVE)

    def to_yaml(self) -> str:
        """Return the settings in the form that `--config` reads; `overwrite` is not to be repeated unasked."""
        settings = self.model_dump(mode="json", exclude={"overwrite"})
        return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


_NOT_DECISIVE = {
    "data",
    "prompts",
    "principle_file",
    "output",
    "overwrite",
    "device",
    "reward_timeout_s",
    "max_judge_calls",
    "track",
    "push_to_hub",
    "public",
    "ray",
}

# Groups of settings in the order that `--help` shows them.
GROUPS: dict[str, tuple[str, ...]] = {
    "Options": (
        "model", "data", "output", "overwrite", "recipe", "method", "reward", "forbid", "require", "principle",
        "principle_file", "against", "system_prompt", "seed",
    ),
    "Data": ("format", "column", "context_template", "skip_bad_rows", "prompts", "held_out", "eval_prompts"),
    "Rewards": ("normalise_rewards", "reward_timeout_s", "max_judge_calls", "partial_text", "judge"),
    "Replies": ("max_reply_tokens", "max_replies", "replies_each", "top_k", "top_p", "min_candidates"),
    "Head and fit": (
        "kl_budget", "form", "inner_size", "epochs", "patience", "learning_rate", "weight_decay", "batch_size",
    ),
    "One method": ("contrast", "rounds", "correction_rounds", "beta", "competitors", "credit", "staleness"),
    "Where it runs": (
        "track", "push_to_hub", "public", "device", "dtype", "quantization", "model_kwargs", "engine", "ray",
    ),
}  # fmt: skip


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of a YAML file, by the names of `TrainConfig` or by those of the options.

    Raises:
        ConfigError: If the file can't be read, or has a name that is not a setting.
    """
    return read_yaml_settings(path, TrainConfig.model_fields, "train")
