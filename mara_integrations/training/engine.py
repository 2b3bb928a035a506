"""Choose the engine and the number format of a training run where its settings leave them open."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from mara_integrations.engine.choose_engine import choose_engine, is_gguf_file
from mara_integrations.models.devices import choose_device, has_fast_bfloat16
from mara_integrations.models.gguf_outline import float32_bytes
from mara_integrations.models.load import ModelSpec
from mara_integrations.models.memory import in_mib, total_ram_bytes
from mara_integrations.progress import Reporter
from mara_integrations.training.config import TrainConfig

# The rest is for activations, replies, the head and everybody else.
_MAX_SHARE_OF_RAM = 0.75
_MOST_TIMES_AS_LARGE = 32  # is a float32 copy of a file with a bit a weight


def with_choices(config: TrainConfig, reporter: Reporter) -> TrainConfig:
    """Return the settings of a run with what `auto` leaves open resolved, and report what is not the default."""
    return with_number_format(with_engine(config, reporter), reporter)


def with_engine(config: TrainConfig, reporter: Reporter) -> TrainConfig:
    """Return the settings of a run with `engine="auto"` resolved.

    Training takes transformers, which has all methods. It takes llama.cpp where the float32 copy of a `.gguf` file
    would need more than three quarters of the main memory, if `choose_engine` takes it too. How much memory is free at
    the time decides nothing, so that an interrupted run continues on its engine.
    """
    if config.engine != "auto" or config.ray or not is_gguf_file(config.model):
        return config
    path, ram = Path(config.model).expanduser(), total_ram_bytes()
    if ram is None or path.stat().st_size * _MOST_TIMES_AS_LARGE <= ram * _MAX_SHARE_OF_RAM:
        return config
    needed = float32_bytes(path)
    if needed <= ram * _MAX_SHARE_OF_RAM:
        return config
    spec = ModelSpec(
        config.model, config.device, config.dtype, model_kwargs=config.model_kwargs, quantization=config.quantization
    )
    if choose_engine(spec).name != "llama.cpp":
        return config
    reporter.say(
        f"[bold]Engine[/] llama.cpp: a float32 copy of {escape(path.name)} takes {in_mib(needed)} of the "
        f"{in_mib(ram)} of main memory"
    )
    return config.updated(engine="llama.cpp")


def with_number_format(config: TrainConfig, reporter: Reporter) -> TrainConfig:
    """Return the settings of a run with `dtype="auto"` resolved to bfloat16 on processors that multiply it.

    Replies to learn from are generated faster then, in half the memory. The head is as good, and runs on the model in
    any format. Generation stays in float32, whose tokens are those of the reference. Ray's workers take the same
    format, so that they write the same replies.
    """
    is_open = config.dtype == "auto" and config.quantization is None and config.engine != "llama.cpp"
    if not is_open or choose_device(config.device).type != "cpu" or not has_fast_bfloat16():
        return config
    reporter.say("[bold]Format[/] bfloat16, which is faster on this processor; --dtype float32 changes it")
    return config.updated(dtype="bfloat16")
