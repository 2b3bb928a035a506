"""Speed on an accelerator: a Llama of 8 billion random weights in bfloat16, one request, per accept rate.

Against `generate()` of transformers and against our own loop without a gate; each also as a share of the floor that the
memory sets: a token reads all weights once, and the keys and values of what came before it. Random weights do
for speed; their logits are sharpened until positions have about as many candidates as those of a trained model.

Ratios are medians over rounds in which every contender runs in turn; a token's time is that of the reply less that of
its first token.

    python benchmarks/gpu.py [--json out.json]
    python benchmarks/gpu.py --device cpu --dtype float32 --hidden 64 --layers 2 --vocab 512 --tokens 8   # smoke run
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import ACCEPT_RATES, typical_states
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.heads.head import MARAHead
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """A Llama with random weights, made on the device: 8B unless the arguments say less."""
    hidden = args.hidden
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=max(4, hidden // 128),
        num_key_value_heads=max(4, hidden // 128) // 4,
        vocab_size=args.vocab,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(args.sharpness)
    return model


def measured_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy, each byte read and written; the best of ten."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return max(2 * len(source) / seconds(lambda: target.copy_(source), device) for _ in range(10))


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long it takes until the device has finished."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def bytes_per_token(model: PreTrainedModel, length: float) -> float:
    """What one token has to read: the weights, of the embedding one row, and keys and values of `length` tokens."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight
    if embeddings.data_ptr() != model.get_output_embeddings().weight.data_ptr():
        weights -= embeddings.numel() * embeddings.element_size()
    head_width = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width * embeddings.element_size()
    return weights + cached * length


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--sharpness", type=float, default=3.0, help="factor of the output layer's weights")
    parser.add_argument("--prompt", type=int, default=128, help="its length in tokens")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=list(ACCEPT_RATES))
    parser.add_argument("--bandwidth", type=float, help="GB/s of the device's memory; measured when absent")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; a smoke run on the CPU stands in this script's help")
    model = make_model(args)
    device = model.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    bandwidth = 1e9 * args.bandwidth if args.bandwidth else measured_bandwidth(device)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(args.vocab, (args.prompt,), generator=generator).tolist()
    backend = make_backend(model, "a random Llama")
    states = typical_states(backend, args.hidden, [prompt])
    decoder = Decoder.measured(backend)

    def plain(num_tokens: int) -> None:
        ids = torch.tensor([prompt], device=device)
        model.generate(ids, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)

    def ours(head: MARAHead | None, num_tokens: int) -> None:
        decoder.prefixes.clear()
        decoder.run([Request(prompt, SamplingParams(max_new_tokens=num_tokens), head=head)])

    def token_seconds(run: Callable[[int], None]) -> float:
        first = seconds(lambda: run(1), device)
        return (seconds(lambda: run(args.tokens), device) - first) / (args.tokens - 1)

    floor = bytes_per_token(model, args.prompt + args.tokens / 2) / bandwidth
    parameters = sum(p.numel() for p in model.parameters())
    path = type(backend).__name__  # PackedBackend on a CUDA device: capturing graphs failed the probe
    print(f"{name}, {path}, {parameters / 1e9:.2f}B parameters in {args.dtype}, {bandwidth / 1e9:.0f} GB/s")
    print(f"floor {1e3 * floor:.2f} ms a token")
    rows: dict[str, dict[str, Any]] = {}
    for rate in args.rates:
        head = random_head(args.hidden, inner_sizes=(1024, 256), accept_rate=rate, states=states, seed=1).to(device)
        contenders: dict[str, Callable[[int], None]] = {
            "generate": plain,
            "ungated": lambda n: ours(None, n),
            "gated": lambda n, head=head: ours(head, n),
        }
        for run in contenders.values():  # kernels are chosen, graphs of all lengths captured
            run(args.tokens)
        times: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(args.rounds):
            for contender, run in contenders.items():
                times[contender].append(token_seconds(run))
        gated = times["gated"]
        columns = {
            "gated / generate": [other / mine for other, mine in zip(times["generate"], gated, strict=True)],
            "gated / ungated": [other / mine for other, mine in zip(times["ungated"], gated, strict=True)],
            "share of floor": [floor / mine for mine in gated],
            "generate, share of floor": [floor / mine for mine in times["generate"]],
        }
        request = Request(prompt, SamplingParams(max_new_tokens=args.tokens), GateParams(trace=True), head)
        trace = decoder.run([request])[0].trace
        visited, candidates = (
            statistics.mean(len(getattr(position, field)) for position in trace)
            for field in ("accept_logits", "token_ids")
        )
        rows[f"accept {rate:g}"] = {
            column: {"median": statistics.median(values), "range": [min(values), max(values)]}
            for column, values in columns.items()
        }
        cells = "   ".join(
            f"{column} {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
            for column, values in columns.items()
        )
        print(f"accept {rate:<5g} {visited:.1f} of {candidates:.1f} candidates visited   {cells}", flush=True)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    about = {"device": name, "backend": path, "parameters": parameters, "dtype": args.dtype, "peak_bytes": peak}
    result = {"about": {**about, "bandwidth": bandwidth, "floor_s": floor}, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
