"""Compare the engines, with a Q-head and without, in speed, time to the first token and memory.

One model on each engine, with a head and without, beside `generate()` of transformers, which is in float32 on a CPU;
1, 4, 16 and 64 requests at once. Decoding is greedy, and no reply ends early. An engine and a number of requests are a
row. Its three contenders are processes of their own, so that the peak of the resident memory is that of one of them.
They run in turn, round by round, with as many threads; a ratio is of one round. With `--threads 1` CPU seconds are
taken, which other work disturbs less. The first token is timed as replies of one token to all requests, their prompts
included.

    python benchmarks/engines.py [--model smollm2] [--engines llama.cpp transformers] [--requests 1 4 16 64]
        [--tokens 48] [--rounds 3] [--threads 1] [--json benchmarks/results/engines.json]
    python benchmarks/plot.py benchmarks/results/engines.json --output benchmarks/results

Rows that the json file holds are not measured again. The whole can be taken in parts, a row each:

    python benchmarks/engines.py --engines llama.cpp --requests 64 --threads 1 --json benchmarks/results/engines.json

An engine may be installed in another environment: `--engines vllm --python vllm=venv-vllm/bin/python`. `generate()`
runs in this one. vLLM runs the float32 copy of a `.gguf` file, and holds 2 GiB for keys and values from its start.

"hidden states" comes with llama.cpp and transformers, and stands beside the rows. It says how far the hidden states of
llama.cpp lie from those of transformers on the dequantised weights, as a share of their size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from engine_worker import GENERATE, prompts_of, states
from measure import Ratios, Rows, add_options
from typing_extensions import Self

from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.models.gguf import converted
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.models.resolve import resolve

ENGINES = ("llama.cpp", "transformers", "vllm")
SIDES = ("ungated", "Q-head", GENERATE)
STATES = "hidden states"
# vLLM in the contender's process, where its CPU seconds are counted, and on the cores that the caller leaves it.
_VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


class Contender:
    """A process that answers prompts: starts at once, and loads its model meanwhile.

    Args:
        python: The interpreter.
        settings: Arguments of `engine_worker.contender`, and `threads`.
    """

    def __init__(self, python: str, settings: Mapping[str, Any]) -> None:
        self._name = settings["engine"]
        worker = Path(__file__).with_name("engine_worker.py")
        threads = {"OMP_NUM_THREADS": str(settings["threads"])} if settings["threads"] else {}
        self._process = subprocess.Popen(
            [python, str(worker), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_VLLM, **threads},
        )
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=30)  # the end of its input is the end of its work
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def facts(self) -> dict[str, Any]:
        """Wait until it is ready; what it says about itself.

        Raises:
            ModelError: If the process has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ModelError(
                f"the process of {self._name} ended with exit code {self._process.wait()}",
                hint="what it wrote stands above; --python names the interpreter of an engine",
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def answer(self, num_tokens: int) -> float:
        """Decode that many tokens for every prompt; the seconds that it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num_tokens}\n")
        self._process.stdin.flush()
        taken = self.facts()
        self.peak_bytes = taken["peak_bytes"]
        return float(taken["seconds"])


def measure_row(args: argparse.Namespace, ratios: Ratios, engine: str, count: int) -> dict[str, Any]:
    """Measure one engine and number of requests; returns what the contender with the head says about itself."""
    row = row_of(engine, count)
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for side in SIDES:
            runs = GENERATE if side == GENERATE else engine
            settings = {
                "model": args.sources.get(runs, args.model),
                "engine": runs,
                "requests": count,
                "is_gated": side == "Q-head",
                "threads": args.threads,
            }
            python = dict(args.python).get(runs, sys.executable)
            contenders[side] = stack.enter_context(Contender(python, settings))
        facts = {side: one.facts() for side, one in contenders.items()}
        for _ in range(args.rounds):
            first, whole = ({side: one.answer(n) for side, one in contenders.items()} for n in (1, args.tokens))
            ratios.add(row, "Q-head / ungated", whole["ungated"] / whole["Q-head"])
            for side in SIDES[:2]:
                ratios.add(row, f"against generate(), {side}", whole[GENERATE] / whole[side])
            for side in SIDES:
                ratios.add(row, f"tokens/s, {side}", count * args.tokens / whole[side])
                ratios.add(row, f"first token in s, {side}", first[side])
        for side, one in contenders.items():
            ratios.add(row, f"peak memory in MB, {side}", one.peak_bytes / 1e6)
        ungated, gated = (contenders[side].peak_bytes for side in SIDES[:2])
        ratios.add(row, "peak memory of Q-head / ungated", gated / ungated)
    return facts["Q-head"]


def measure_states(args: argparse.Namespace) -> dict[str, Any]:
    """Compare hidden states of llama.cpp and transformers, one prompt after the other; returns median and range."""
    ratios = Ratios()
    models = [load_model(ModelSpec(args.model, device="cpu", engine=name)) for name in ("llama.cpp", "transformers")]
    prompts = prompts_of(models[0], 8)
    for found, expected in zip(*(states(model, prompts) for model in models), strict=True):
        ratios.add(STATES, "difference / size", float((found - expected).norm() / expected.norm()))
    ratios.show(STATES)
    return ratios.rows()[STATES]["difference / size"]


def row_of(engine: str, count: int) -> str:
    """Name of a row."""
    return f"{engine}, {count} request{'s' * (count > 1)}"


def main(arguments: list[str] | None = None) -> Rows:
    """Measure what the file does not hold, print it and write it row by row; returns the table."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    about: dict[str, Any] = {"model": Path(args.model).name, "tokens": args.tokens, "threads": torch.get_num_threads()}
    before, kept = _before(args.json, about)
    args.sources = _sources(args.model)
    about["engines"] = before.get("engines", {})
    ratios = Ratios()
    for engine in args.engines:
        for count in args.requests:
            if (row := row_of(engine, count)) in kept:
                print(f"{row}: {args.json} holds it", flush=True)
                continue
            facts = measure_row(args, ratios, engine, count)
            about["engines"][engine], about["head_bytes"] = facts["version"], facts["head_bytes"]
            ratios.show(row)
            ratios.write(args.json, facts={**before, **about})
    if {"llama.cpp", "transformers"} <= set(args.engines) and STATES not in before:
        about[STATES] = measure_states(args)
        ratios.write(args.json, facts={**before, **about})
    return {**kept, **ratios.rows()}


def _before(path: Path | None, about: Mapping[str, Any]) -> tuple[dict[str, Any], Rows]:
    """Return what the file says about its rows, and the rows.

    Raises:
        ConfigError: If they were measured with other settings.
    """
    if path is None or not path.exists():
        return {}, {}
    content = json.loads(path.read_text())
    for name, value in about.items():
        if (there := content["about"].get(name)) != value:
            raise ConfigError(
                f"the rows of {path} were measured with {name}={there!r}, and {name}={value!r} is asked for",
                hint="name another file with --json",
            )
    return content["about"], content["rows"]


def _sources(model: str) -> dict[str, str]:
    """Return what engines in other environments are given in place of a model's name.

    The float32 copy of a `.gguf` file is made here, once: that takes more memory than any contender.
    """
    source = resolve(model)[1]
    return {"vllm": str(converted(Path(source))) if source.endswith(".gguf") else source}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 64], help="decoded at once")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES[:2]))
    parser.add_argument(
        "--python",
        type=_interpreter,
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="interpreter of an engine in another environment",
    )
    return parser


def _interpreter(text: str) -> tuple[str, str]:
    engine, _, path = text.partition("=")
    if engine not in ENGINES or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not ENGINE=PATH, with one of {', '.join(ENGINES)}")
    return engine, path


if __name__ == "__main__":
    main()
