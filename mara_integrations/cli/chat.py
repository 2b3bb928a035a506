"""`mara-tools chat`."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mara_integrations.cli.app import dim, show_error
from mara_integrations.cli.generate import ReplyPrinter, Thoughts, show_verdicts, stream_reply
from mara_integrations.cli.options import asks_a_model, engine_for
from mara_integrations.errors import ConfigError, MaraError
from mara_integrations.messages import Message
from mara_integrations.sampling import GateParams

if TYPE_CHECKING:
    from mara_integrations.engine.generation import Generation
    from mara_integrations.runtime import MARAEngine


@asks_a_model
def chat(thoughts: Thoughts = None, *, asking: dict[str, Any]) -> None:
    """Talk with the model. In the chat, /help lists the commands.

    Examples:
      mara-tools chat --head runs/house-style
      mara-tools chat --model Qwen/Qwen3-0.6B --head heads/a --head heads/b=0.5
    """
    from mara_integrations.heads.source import head_name

    strength = asking.pop("strength")
    engine = engine_for(asking, trace=True).load()
    conversation = _Chat(engine, shows_thoughts=thoughts)
    if strength is not None:
        conversation.set_strength(str(strength))
    if sys.stdin.isatty():
        with suppress(ImportError):  # not everywhere
            import readline  # noqa: F401  # gives input() a history and line editing
        name = head_name(engine.head_source)
        dim(f"{engine.model.name}{f' with {name}' if name else ''}. /help lists commands, Ctrl-D leaves.")
    conversation.run()


@dataclass
class _Chat:
    """A conversation at the console.

    Attributes:
        engine: With its model loaded.
        history: Turns so far.
        asked: The turns up to the last question.
        answer: To it; None where it was stopped.
        strength: Dial on the head; None leaves it to the head.
        shows_thoughts: See `ReplyPrinter`.
    """

    engine: MARAEngine
    history: list[Message] = field(default_factory=list)
    asked: list[Message] = field(default_factory=list)
    answer: Generation | None = None
    strength: float | None = None
    shows_thoughts: bool | None = None

    def run(self) -> None:
        """Answer until the input ends."""
        ask = "\nyou> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(ask).strip()
            except EOFError:
                print(end="\n" if ask else "")
                return
            except KeyboardInterrupt:
                dim("\n/exit or Ctrl-D leaves")
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self.obey(*line.partition(" ")[::2])
                elif line:
                    self.reply_to(line)
            except MaraError as error:
                show_error(error)

    def obey(self, command: str, argument: str) -> None:
        """Do what a command says."""
        match command:
            case "/strength":
                dim(f"strength {self.set_strength(argument):g}")
            case "/base":
                if not self.asked:
                    raise ConfigError("there is no question yet")
                self.write(self.asked, strength=0.0, system_prompt=self.engine.resolve().system_prompt or "")
            case "/gate":
                if self.answer is None or self.engine.head is None:
                    raise ConfigError("there is no gated answer yet", hint="ask something, with --head")
                show_verdicts(self.engine, self.asked, self.answer)
            case "/reset":
                self.history, self.asked, self.answer = [], [], None
                dim("a new conversation")
            case "/help":
                dim(_CHAT_HELP)
            case _:
                raise ConfigError(f"{command!r} is not a command", hint="/help lists them")

    def set_strength(self, value: str) -> float:
        """Turn the dial, and return where it stands.

        Raises:
            ConfigError: If the head has no such setting.
        """
        from mara_integrations.engine.gate import check_strength

        gate = GateParams.of(strength=value.strip())
        if self.engine.head is None:
            raise ConfigError("strength is a dial on a head, and there is none", hint="start with --head")
        check_strength(self.engine.head.config.form, gate)
        self.strength = gate.strength
        return gate.strength

    def reply_to(self, question: str) -> None:
        """Answer, and remember both."""
        turns = [*self.history, Message("user", question)]
        answer, text = self.write(turns, strength=self.strength)
        self.asked, self.answer = turns, answer
        self.history = [*turns, Message("assistant", text)]

    def write(self, turns: list[Message], **overrides: Any) -> tuple[Generation | None, str]:
        """Print an answer while it is written, and return it with its text; None and a part if Ctrl-C stopped it."""
        printer = ReplyPrinter(self.shows_thoughts)
        try:
            generation = stream_reply(self.engine, turns, printer, **overrides)
        except KeyboardInterrupt:
            dim(" (stopped)")
            return None, printer.text
        return generation, generation.text


_CHAT_HELP = """\
/strength X   dial on the head: 0 is the base model, 1 what it was trained to
/base         the base model's answer to the last question
/gate         the last answer, with the tokens that the head rejected
/reset        forget the conversation
/exit         leave, as Ctrl-D does; Ctrl-C stops an answer"""
