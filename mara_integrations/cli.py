"""`mara-tools`: read the command line, call the library, print. What is heavy is imported inside the commands."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from mara_integrations import __version__
from mara_integrations.errors import ConfigError, DataError, MaraError
from mara_integrations.messages import Message, Prompt
from mara_integrations.progress import ConsoleReporter
from mara_integrations.sampling import GateParams
from mara_integrations.training.config import TrainConfig

if TYPE_CHECKING:
    from mara_integrations.data import Dataset
    from mara_integrations.engine.head import HeadConfig
    from mara_integrations.engine.sequence import Generation
    from mara_integrations.rewards import Reward
    from mara_integrations.runtime import MARAEngine

_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class _Commands(TyperGroup):
    """Tells what goes wrong in any command: one line and a hint on stderr, no traceback without `--debug`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Understand `--debug` behind a command too."""
        if "--debug" in (args[: args.index("--")] if "--" in args else args):
            args = args.copy()
            args.remove("--debug")
            args = ["--debug", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise typer.Exit(_INTERRUPTED) from None
            except Exception as error:
                # typer's own errors say how to exit; it also knows what to do when nobody reads our output any more
                is_typers = hasattr(error, "exit_code") or isinstance(error, typer.Abort | BrokenPipeError)
                if is_typers or ctx.params.get("debug"):
                    raise
                _show_error(error)
                raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `mara-tools`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, __import__("io").TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"mara-tools {__version__}")
        raise typer.Exit


@app.callback()
def _mara_tools(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Align the model you already run: train a tiny head that accepts or rejects each token, see what it does, use it."""


# --- train: its options are the fields of TrainConfig ---

_Command = TypeVar("_Command", bound=Callable[..., None])
_METAVARS = {"forbid": "WORD", "reward": "MODULE:FUNCTION"}


def _takes(settings: type[BaseModel], common: Sequence[str]) -> Callable[[_Command], _Command]:
    """Give a command the fields of a settings class as options, with the help texts of its docstring.

    Args:
        settings: The class; a tuple becomes an option that may be repeated.
        common: Fields to show first; the others are shown in a panel of their own.
    """
    helps = _attributes(settings)

    def option(name: str) -> inspect.Parameter:
        field = settings.model_fields[name]
        annotation: Any = field.annotation
        default = inspect.Parameter.empty if field.is_required() else field.default
        if get_origin(annotation) is tuple:
            annotation, default = list[get_args(annotation)[0]], []  # type: ignore[misc]  # a type made at run time
        info = typer.Option(
            help=helps[name],
            metavar=_METAVARS.get(name),
            show_default=default not in (None, [], inspect.Parameter.empty),
            rich_help_panel="Options" if name in common else "Fine tuning",
        )
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=default, annotation=Annotated[annotation, info])

    def declare(command: _Command) -> _Command:
        names = [*common, *(name for name in settings.model_fields if name not in common)]
        command.__signature__ = inspect.Signature([option(name) for name in names])  # type: ignore[attr-defined]
        return command

    return declare


def _attributes(documented: type) -> dict[str, str]:
    """The texts of a docstring's `Attributes:` section by name, each in one line."""
    section = (inspect.getdoc(documented) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.+(?:\n     .+)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


@app.command()
@_takes(
    TrainConfig,
    common=("model", "data", "output", "reward", "forbid", "system_prompt", "method", "seed", "device", "dtype"),
)
def train(**options: Any) -> None:
    """Train a head on preference pairs, on labelled replies, or on prompts with a reward or forbidden words."""
    config = TrainConfig.of(**options)
    print(f"Training a head for {config.model} on {config.data}, into {config.output}", flush=True)
    from mara_integrations.evaluation.report import print_summary
    from mara_integrations.training import run

    console = Console()
    try:
        result = run.train(config, ConsoleReporter(console))
    except KeyboardInterrupt:
        _print_err("interrupted: the replies gathered so far are kept, and the same command goes on from there")
        raise typer.Exit(_INTERRUPTED) from None
    if result.evaluation is not None:
        print_summary(console, result.evaluation)
    _say(console, "Head", f"{result.output}: strength {result.head.config.strength:.3g}")
    _show_next_steps(console, config)


def _show_next_steps(console: Console, config: TrainConfig) -> None:
    used = {"model": config.model, "head": str(config.output), "system_prompt": config.system_prompt}
    if config.device != "auto":
        used["device"] = config.device
    if config.dtype != "auto":
        used["dtype"] = config.dtype
    used = {name: value for name, value in used.items() if value is not None}
    flags = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in used.items())
    keywords = ", ".join(f"{name}={value!r}" for name, value in used.items())
    print(
        "\nTry it\n"
        f"  mara-tools chat {flags}\n"
        f"  mara-tools eval {flags} --data {shlex.quote(str(config.data))} --report report.html\n"
        "\n"
        "  from mara_integrations import MARALLM\n"
        f"  llm = MARALLM({keywords})\n"
        '  print(llm.complete("What can you do?").text)  # or prompt | llm | parser, index.as_query_engine(llm=llm)'
    )


# --- options that several commands share ---

_AS_TRAINED = "as the head was trained"

_Model = Annotated[str, typer.Option(help="Base model: Hub id, folder, .gguf file or alias.")]
_AnyHead = Annotated[
    str | None, typer.Option(help="Head: its folder, a published .pth actor, or a Hub id; without one, the base model.")
]
_Strength = Annotated[
    float | None, typer.Option(help="Dial on the head: 0 is the base model, 1 what it was trained to.", show_default="1")
]
_Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
_TopK = Annotated[int | None, typer.Option(help="Candidates kept by probability.", show_default=_AS_TRAINED)]
_TopP = Annotated[
    float | None,
    typer.Option(help="Of those, the smallest set with this share of the probability.", show_default=_AS_TRAINED),
]
_MaxNewTokens = Annotated[int, typer.Option(help="Upper bound of a reply, in tokens.")]
_Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="A text that ends the reply; may be repeated.")
]
_Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
_SystemPrompt = Annotated[str | None, typer.Option(help="Put before every conversation that brings none.")]
_Device = Annotated[str, typer.Option(help="auto is CUDA, then MPS, then CPU.")]
_Dtype = Annotated[str, typer.Option(help="auto is bfloat16 on GPUs that have it, float32 on CPU.")]


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that were given; the others are left to the head and the engine."""
    return {name: value for name, value in settings.items() if value is not None}


# --- eval ---


@app.command("eval")
def evaluate_head(
    head: Annotated[str, typer.Option(help="Head: its folder, a published .pth actor, or a Hub id.")],
    data: Annotated[Path, typer.Option(help="Prompts, or pairs or labelled replies, whose prompts are taken.")],
    model: _Model = "smollm2",
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="A reward with TRL's signature; may be repeated.", show_default="the head's own"
        ),
    ] = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD",
            help="A word or phrase that must not appear; may be repeated.",
            show_default="the head's own",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="A page to look at (.html), or everything for other programs (.json).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first prompts only.", show_default="all")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Pairs of replies to show.")] = 3,
    strength: _Strength = None,
    temperature: _Temperature = 0.0,
    max_new_tokens: _MaxNewTokens = 128,
    seed: Annotated[int, typer.Option(help="Of sampling and of the intervals.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 16,
    system_prompt: _SystemPrompt = None,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
) -> None:
    """Compare base model and head on the same prompts with the same random numbers."""
    from mara_integrations.data import read_prompts
    from mara_integrations.rewards import ForbiddenWords, load_reward, reward_name

    prompts = read_prompts(data)
    rewards: list[Reward] = [load_reward(path) for path in reward or ()]
    if forbid:
        rewards.append(ForbiddenWords(forbid))

    from mara_integrations.evaluation import report as reports
    from mara_integrations.evaluation.evaluate import evaluate
    from mara_integrations.runtime import MARAEngine

    if report is not None:
        reports.check_report_path(report)
    settings = _given(strength=strength)
    engine = MARAEngine(model, head, device=device, dtype=dtype, system_prompt=system_prompt, **settings).load()
    assert engine.head is not None, "load() refuses to go without the head it was given"
    console, why = Console(), ""
    held_out = _held_out(data, engine.head.config)
    if held_out is not None:
        prompts, why = held_out, "; the head was trained on this file, so only those held out then"
    if limit is not None:
        prompts = replace(prompts, rows=prompts.rows[:limit])
    _say(console, "Prompts", f"{len(prompts)} of {data}{why}")
    whose = ""
    if not rewards:
        rewards, whose = list(_recorded_rewards(engine.head.config)), " (recorded with the head)"
    named = {reward_name(item): item for item in rewards}
    words = [word for item in rewards if isinstance(item, ForbiddenWords) for word in item.words]
    told = [f"forbidden {', '.join(map(repr, words))}"] if words else []
    told += [name for name, item in named.items() if not isinstance(item, ForbiddenWords)]
    _say(console, "Rewards", f"{'; '.join(told)}{whose}" if told else "none; the head records none that can be used")
    _say(console, "Model", f"{engine.model.name} on {engine.model.device}, {str(engine.model.dtype)[6:]}")
    with ConsoleReporter(console).stage("base and gated replies", 2 * len(prompts)) as advance:
        done = 0

        def on_progress(count: int, _: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        evaluation = evaluate(
            engine,
            prompts,
            named,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    if report is not None:
        reports.write_report(evaluation, report)
    if examples:
        reports.print_examples(console, evaluation, examples)
    reports.print_summary(console, evaluation)
    if report is not None:
        _say(console, "Report", str(report))


def _held_out(path: Path, config: HeadConfig) -> Dataset | None:
    """Where a file is the one that a head was trained on: the prompts that it was not fitted on."""
    from mara_integrations.data import read_dataset, split

    share, seed = config.training.get("held_out"), config.training.get("seed")
    if share is None or seed is None:
        return None
    try:
        fitted, held_out = split(read_dataset(path), share, seed)
    except DataError:  # one prompt alone can't be split: another file
        return None
    if fitted.fingerprint != config.data_fingerprint:
        return None
    return replace(held_out, rows=tuple({row.prompt: row for row in held_out.rows}.values()))


def _recorded_rewards(config: HeadConfig) -> Iterator[Reward]:
    """What a head was trained for, as far as it can be built here."""
    from mara_integrations.rewards import reward_from_spec

    for spec in config.rewards:
        try:
            yield reward_from_spec(spec)
        except MaraError as error:
            warnings.warn(
                f"a reward that the head was trained for is left out: {error.message}; --reward names another place",
                stacklevel=2,
            )


# --- generate ---


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads it from standard input.")],
    model: _Model = "smollm2",
    head: _AnyHead = None,
    strength: _Strength = None,
    temperature: _Temperature = 0.0,
    top_k: _TopK = None,
    top_p: _TopP = None,
    max_new_tokens: _MaxNewTokens = 512,
    stop: _Stop = None,
    seed: _Seed = None,
    system_prompt: _SystemPrompt = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    stream: Annotated[bool, typer.Option(help="Print each token as soon as it is certain.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, tokens, and what the gate did.")
    ] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Add to it what the gate saw and did at each position.")] = False,
    show_gate: Annotated[
        bool, typer.Option("--show-gate", help="Print the reply with the rejected candidates struck through.")
    ] = False,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
) -> None:
    """Write one reply to standard output."""
    if show_gate and head is None:
        raise typer.BadParameter("without --head there is no gate to show", param_hint="--show-gate")
    if prompt == "-":
        prompt = sys.stdin.read()
        prompt = prompt if raw else prompt.strip()
    from mara_integrations.runtime import MARAEngine
    from mara_integrations.settings import answer_report

    settings = _given(strength=strength, top_k=top_k, top_p=top_p, stop=stop, seed=seed)
    settings |= {"temperature": temperature, "max_new_tokens": max_new_tokens}
    engine = MARAEngine(
        model, head, device=device, dtype=dtype, system_prompt=system_prompt, trace=trace or show_gate, **settings
    )
    said: Prompt = prompt if raw else [Message("user", prompt)]
    if as_json or trace:
        generation = engine.generate(said)
        answer = answer_report(generation, engine.model)
        print(json.dumps({"text": generation.text, "prompt_tokens": generation.prompt_tokens, **answer}, ensure_ascii=False))
    elif show_gate:
        _show_gate(engine, said, engine.generate(said))
    elif stream:
        _stream(engine, said)
    else:
        print(engine.generate(said).text)


def _stream(engine: MARAEngine, prompt: Prompt, heard: list[str] | None = None, **overrides: Any) -> Generation:
    """Print a reply while it is written; `heard` gets its pieces."""
    from mara_integrations.evaluation.report import visible

    shown: Callable[[str], str] = visible if sys.stdout.isatty() else str  # a terminal obeys control characters
    with closing(engine.stream(prompt, **overrides)) as updates:
        for update in updates:
            if heard is not None:
                heard.append(update.text)
            print(shown(update.text), end="", flush=True)
            if update.generation is not None:
                print("" if update.generation.text.endswith("\n") else "\n", end="", flush=True)
                return update.generation
    raise AssertionError("a stream ends with its generation")


def _show_gate(engine: MARAEngine, prompt: Prompt, generation: Generation) -> None:
    """Print a traced reply with what the head rejected, and how often it did."""
    from mara_integrations.evaluation.evaluate import token_marks
    from mara_integrations.evaluation.report import gated_text, stats_line

    console = Console(soft_wrap=True)
    marks = token_marks(engine.model.tokenizer, engine.request(prompt), generation)
    console.print(gated_text(marks, is_styled=console.color_system is not None))
    console.print(Text(stats_line(generation.stats, len(generation.token_ids)), style="dim"))


# --- chat ---


@app.command()
def chat(
    model: _Model = "smollm2",
    head: _AnyHead = None,
    strength: _Strength = None,
    temperature: _Temperature = 0.0,
    top_k: _TopK = None,
    top_p: _TopP = None,
    max_new_tokens: _MaxNewTokens = 512,
    stop: _Stop = None,
    seed: _Seed = None,
    system_prompt: _SystemPrompt = None,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
) -> None:
    """Talk with the model; /help lists what can be asked of the chat itself."""
    from mara_integrations.runtime import MARAEngine

    settings = _given(top_k=top_k, top_p=top_p, stop=stop, seed=seed)
    settings |= {"temperature": temperature, "max_new_tokens": max_new_tokens, "trace": True}
    engine = MARAEngine(model, head, device=device, dtype=dtype, system_prompt=system_prompt, **settings).load()
    conversation = _Chat(engine)
    if strength is not None:
        conversation.set_strength(str(strength))
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() a history and line editing

        _dim(f"{engine.model.name}{f' with {head}' if head else ''}. /help lists commands, Ctrl-D leaves.")
    conversation.run()


@dataclass
class _Chat:
    """A conversation at the console.

    Attributes:
        engine: With its model loaded.
        history: Turns so far.
        asked: The turns up to the last question.
        answer: To it; None where it was stopped.
        strength: Dial on the head.
    """

    engine: MARAEngine
    history: list[Message] = field(default_factory=list)
    asked: list[Message] = field(default_factory=list)
    answer: Generation | None = None
    strength: float = 1.0

    def run(self) -> None:
        """Answer until the input ends."""
        ask = "\nyou> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(ask).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                _dim("\n/exit or Ctrl-D leaves")
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self.obey(*line.partition(" ")[::2])
                elif line:
                    self.reply_to(line)
            except MaraError as error:
                _show_error(error)

    def obey(self, command: str, argument: str) -> None:
        """Do what a command says."""
        match command:
            case "/strength":
                self.set_strength(argument)
                _dim(f"strength {self.strength:g}")
            case "/base":
                if not self.asked:
                    raise ConfigError("there is no question yet")
                self.write(self.asked, strength=0.0)
            case "/gate":
                if self.answer is None or self.engine.head is None:
                    raise ConfigError("there is no gated answer yet", hint="ask something, with --head")
                _show_gate(self.engine, self.asked, self.answer)
            case "/reset":
                self.history, self.asked, self.answer = [], [], None
                _dim("a new conversation")
            case "/help":
                _dim(_CHAT_HELP)
            case _:
                raise ConfigError(f"{command!r} is no command", hint="/help lists them")

    def set_strength(self, value: str) -> None:
        """Turn the dial.

        Raises:
            ConfigError: If the head has no such setting.
        """
        from mara_integrations.engine.gate import check_strength

        gate = GateParams.of(strength=value.strip())
        if self.engine.head is None:
            raise ConfigError("strength is a dial on a head, and there is none", hint="start with --head")
        check_strength(self.engine.head.config.form, gate)
        self.strength = gate.strength

    def reply_to(self, question: str) -> None:
        """Answer, and remember both."""
        turns = [*self.history, Message("user", question)]
        answer, text = self.write(turns, strength=self.strength)
        self.asked, self.answer = turns, answer
        self.history = [*turns, Message("assistant", text)]

    def write(self, turns: list[Message], **overrides: Any) -> tuple[Generation | None, str]:
        """Stream an answer; None and what there is of it when it was stopped."""
        heard: list[str] = []
        try:
            generation = _stream(self.engine, turns, heard, **overrides)
        except KeyboardInterrupt:
            _dim(" (stopped)")
            return None, "".join(heard)
        return generation, generation.text


_CHAT_HELP = """\
/strength X   dial on the head: 0 is the base model, 1 what it was trained to
/base         the base model's answer to the last question
/gate         the last answer, with the tokens that the head rejected
/reset        forget the conversation
/exit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


# --- what goes to the console ---


def _say(console: Console, label: str, text: str) -> None:
    console.print(Text.assemble((f"{label:<8}", "bold"), text), soft_wrap=True)


def _dim(text: str) -> None:
    Console(soft_wrap=True).print(Text(text, style="dim"))


def _print_err(text: str, style: str = "") -> None:
    Console(stderr=True, soft_wrap=True).print(Text(" ".join(text.splitlines()), style=style))


def _show_error(error: Exception) -> None:
    if isinstance(error, MaraError):
        message, hint = error.message, error.hint
    else:
        message, hint = f"unexpected {type(error).__name__}: {error}", "run again with --debug to see where"
    _print_err(f"error: {message}", "bold red")
    if hint:
        _print_err(f"hint: {hint}", "dim")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _print_err(f"warning: {message}", "yellow")
