"""Options of `mara-tools`: those that several commands share, and those made of a settings class."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo

from mara_integrations.cli.config_file import ConfigFile
from mara_integrations.data import Format
from mara_integrations.errors import MissingExtraError
from mara_integrations.models.options import EngineName, Quantization, keyword_arguments
from mara_integrations.sampling import describe

if TYPE_CHECKING:
    from mara_integrations.runtime import MARAEngine

_AS_TRAINED = "as the head was trained"

BASE_MODEL, HEAD, REPLIES = "Base model", "Head", "Replies"

Model = Annotated[
    str | None,
    typer.Option(
        help="Base model: Hub id, folder, .gguf file or alias.",
        show_default="the one that the head was trained on",
        rich_help_panel=BASE_MODEL,
    ),
]
_A_HEAD = "Folder of a head, a published .pth actor, or a Hub id."
_SEVERAL = "May be repeated: corrections of several heads are added, and heads/x=0.5 weights one."
Heads = Annotated[list[str], typer.Option("--head", metavar="HEAD", help=f"{_A_HEAD} {_SEVERAL}", rich_help_panel=HEAD)]
AnyHeads = Annotated[
    list[str] | None,
    typer.Option(
        "--head",
        metavar="HEAD",
        help=f"{_A_HEAD} {_SEVERAL}",
        rich_help_panel=HEAD,
        show_default="base model alone",
    ),
]
DataFormat = Annotated[
    Format,
    typer.Option(
        help="Kind of the rows, or the platform that exported them; auto goes by the columns.", rich_help_panel="Data"
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COLUMN",
        help="Column of another name, such as prompt=question. May be repeated.",
        rich_help_panel="Data",
    ),
]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Leave out rows that can't be read, and report them.", rich_help_panel="Data"),
]
Strength = Annotated[
    float | None,
    typer.Option(
        help=describe("strength"),
        show_default="1",
        rich_help_panel=HEAD,
    ),
]
Temperature = Annotated[float, typer.Option(help=describe("temperature"), rich_help_panel=REPLIES)]
TopK = Annotated[
    int | None,
    typer.Option(help=describe("top_k"), show_default=_AS_TRAINED, rich_help_panel=REPLIES),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help=describe("top_p"),
        show_default=_AS_TRAINED,
        rich_help_panel=REPLIES,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help=describe("max_new_tokens"), rich_help_panel=REPLIES)]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help=describe("stop", "May be repeated."), rich_help_panel=REPLIES),
]
Never = Annotated[
    list[str] | None,
    typer.Option(metavar="WHAT", help=describe("never", "May be repeated."), rich_help_panel=REPLIES),
]
Seed = Annotated[int | None, typer.Option(help=describe("seed"), rich_help_panel=REPLIES)]
SystemPrompt = Annotated[
    str | None,
    typer.Option(help="System prompt for conversations that have none.", rich_help_panel=REPLIES),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device of the model, such as cpu or cuda:1; auto is CUDA, then MPS, then CPU.", rich_help_panel=BASE_MODEL
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Number format of the weights; auto is bfloat16 on GPUs that have it, float32 on the CPU, where "
        "bfloat16 is faster if the processor has instructions for it (AVX512-BF16, AMX).",
        rich_help_panel=BASE_MODEL,
    ),
]
Quantise = Annotated[
    Quantization | None,
    typer.Option(
        "--quantization",
        help="On the CPU, int8 runs linear layers faster and in a quarter of the memory.",
        rich_help_panel=BASE_MODEL,
    ),
]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Argument of from_pretrained, such as device_map=auto or quantization_config={quant_method: "
        "bitsandbytes, load_in_4bit: true}; of llama.cpp n_ctx, n_gpu_layers or n_threads; of vLLM its engine's, "
        "such as max_model_len=4096. May be repeated.",
        rich_help_panel=BASE_MODEL,
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="What runs the model; llama.cpp takes .gguf files in their own quantisation, and vllm runs vLLM in this "
        "process. auto is llama.cpp for a .gguf file where it is installed, else transformers.",
        rich_help_panel=BASE_MODEL,
    ),
]


def head_source(values: Sequence[str] | None) -> dict[str, float] | None:
    """Return the heads that `--head` names with their weights; None without one."""
    weights: dict[str, float] = {}
    for value in values or ():
        name, _, number = value.rpartition("=")
        is_weighed = name and re.fullmatch(r"-?\d*\.?\d+", number) and not Path(value).exists()
        head, weight = (name, float(number)) if is_weighed else (value, 1.0)
        weights[head] = weights.get(head, 0.0) + weight
    return weights or None


def data_flags(data: Path | str, format: str, column: Sequence[str], *, skip_bad_rows: bool) -> list[str]:
    """Return the flags by which another command reads the same rows."""
    flags = ["--data", str(data)]
    flags += [flag for each in column for flag in ("--column", each)]
    flags += [] if format == "auto" else ["--format", format]
    return flags + (["--skip-bad-rows"] if skip_bad_rows else [])


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that were given; the head and the engine decide the others."""
    return {name: value for name, value in settings.items() if value is not None}


def require_extra(extra: str, *modules: str) -> None:
    """Find out before anything slow is imported that an optional dependency is missing.

    Raises:
        MissingExtraError: If one of its modules is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(
                f"this command needs the package {module}", hint=f"pip install 'mara-integrations[{extra}]'"
            )


def asks_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `asking` of a command by the options of a request; `asking` gets their values."""
    shared = inspect.signature(_asked_model, eval_str=True).parameters
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "asking"]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        asking = {name: values.pop(name) for name in shared}
        command(**values, asking=asking)

    keyword = inspect.Parameter.KEYWORD_ONLY
    arguments = [p for p in own if _is_argument(p)]
    ordered = [*arguments, *shared.values(), *(p for p in own if p not in arguments)]
    parameters = [p.replace(kind=keyword) for p in ordered]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _is_argument(parameter: inspect.Parameter) -> bool:
    return any(isinstance(each, ArgumentInfo) for each in get_args(parameter.annotation))


def _asked_model(
    head: AnyHeads = None,
    strength: Strength = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = 512,
    stop: Stop = None,
    never: Never = None,
    seed: Seed = None,
    system_prompt: SystemPrompt = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantise = None,
    model_kwargs: ModelKwargs = None,
    engine: Engine = "auto",
    config_file: ConfigFile = None,
) -> None:
    """Declare the options of a request; never called."""


def engine_for(asking: dict[str, Any], **more: Any) -> MARAEngine:
    """Return the engine that the options of `asks_a_model` describe, with more settings."""
    from mara_integrations.runtime import MARAEngine

    settings = {name: value for name, value in asking.items() if name != "config_file"}  # it was read already
    read = {"head": head_source(asking["head"]), "model_kwargs": keyword_arguments(asking["model_kwargs"] or ())}
    return MARAEngine(**given(**{**settings, **read, **more}))


_Command = TypeVar("_Command", bound=Callable[..., None])
_METAVARS = {
    "forbid": "WHAT",
    "require": "WHAT",
    "principle": "TEXT",
    "against": "TEXT",
    "teacher": "MODEL",
    "teacher_base": "MODEL",
    "reward": "REWARD",
    "judge": "REWARD",
    "column": "NAME=COLUMN",
    "track": "TRACKER",
    "model_kwargs": "NAME=VALUE",
}


def takes(
    settings: type[BaseModel], groups: Mapping[str, Sequence[str]], required: Sequence[str] = ()
) -> Callable[[_Command], _Command]:
    """Give a command the fields of a settings class as options, with the descriptions of the fields as help.

    An option that is not given is None: then a file's setting holds, or the default of the class.

    Args:
        settings: The class; a field that is a tuple or a dict becomes an option that may be repeated.
        groups: Names of fields by the panel of the help that shows them.
        required: Names of options that the help calls required.
    """

    def option(panel: str, name: str) -> inspect.Parameter:
        declared = settings.model_fields[name]
        annotation: Any = declared.annotation
        choices = [choice for part in (annotation, *get_args(annotation)) for choice in _choices(part)]
        if get_origin(annotation) in (tuple, dict):
            annotation, choices = list[str], []  # the settings know which are allowed
        help_text = declared.description or ""
        if choices:  # in the help, not beside the name, where they take the width of a terminal
            help_text += f" One of {', '.join(choices)}."
        default = declared.default
        has_default = not declared.is_required() and default not in (None, False, (), PydanticUndefined)
        info = typer.Option(
            *([f"--{name.replace('_', '-')}"] if default is False else []),  # a flag without its opposite
            help=f"Required. {help_text}" if name in required else help_text,
            metavar=_METAVARS.get(name) or (name.rpartition("_")[2].upper() if choices else None),
            show_default=str(default) if has_default else False,
            rich_help_panel=panel,
        )
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=None, annotation=Annotated[annotation | None, info])

    def declare(command: _Command) -> _Command:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = [option(panel, name) for panel, names in groups.items() for name in names]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        return command

    return declare


def _choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()
