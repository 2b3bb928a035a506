"""Read a `.gguf` file without its weights: tokenizer, configuration, fingerprint, places of the embeddings.

It is read once, which takes up to a minute, and kept in the cache.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mara_integrations.errors import ModelError
from mara_integrations.files import make_folder_once
from mara_integrations.fingerprints import fingerprint
from mara_integrations.models import gguf as converted_copies

_log = logging.getLogger(__name__)

_FILE, _FORMAT = "outline.json", 2
_OUTPUT, _INPUT = "output.weight", "token_embd.weight"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A matrix in a file.

    Attributes:
        offset: Where it begins, in bytes.
        kind: Number of its quantisation, see `gguf.GGMLQuantizationType`.
        num_rows: Rows.
        width: Numbers of a row.
        row_bytes: Bytes of a row.
    """

    offset: int
    kind: int
    num_rows: int
    width: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class GgufOutline:
    """The facts about a file that are known without its weights.

    Attributes:
        folder: Holds `config.json`, `generation_config.json` and the tokenizer, as transformers reads them.
        output: Its output embeddings.
        input: Its input embeddings; in many files the same.
        file_format: Quantisation of most matrices, such as `Q4_K`.
        fingerprint: Fingerprint of the model; None where transformers does not know how its weights are named.
    """

    folder: Path
    output: TensorPlace
    input: TensorPlace
    file_format: str
    fingerprint: str | None


def outline_of(gguf: Path) -> GgufOutline:
    """Return the outline of a file, which is made on first use; of two processes that want it, the second waits.

    Raises:
        MissingExtraError: If the packages for `.gguf` files are not installed.
        ModelError: If it can't be read, or transformers does not know its tokenizer.
    """
    folder = outline_folder(gguf)
    if not folder.is_dir():
        converted_copies.require_packages(gguf)
        try:
            make_folder_once(folder, functools.partial(_write, gguf))
        except OSError as error:
            raise ModelError(
                f"the outline of {gguf.name!r} can't be kept in {str(folder.parent)!r}: {error}",
                hint="MARA_CACHE_DIR names another folder",
            ) from error
    found = json.loads((folder / _FILE).read_text())
    output, inputs = (TensorPlace(**found[side]) for side in ("output", "input"))
    return GgufOutline(folder, output, inputs, found["file_format"], found["fingerprint"])


def float32_bytes(gguf: Path) -> int:
    """Return the size of the float32 copy that transformers runs, in bytes; only the names of tensors are read.

    Raises:
        MissingExtraError: If the packages for `.gguf` files are not installed.
        ModelError: If the file can't be read.
    """
    converted_copies.require_packages(gguf)
    return 4 * sum(int(tensor.n_elements) for tensor in _reader(gguf).tensors)


def outline_folder(gguf: Path) -> Path:
    """Return the folder of a file's outline, whether it exists or not."""
    copy = converted_copies.copy_of(gguf)
    return copy.with_name(f"{copy.name}-outline-{_FORMAT}")


def _write(gguf: Path, folder: Path) -> None:
    _log.info("reading the tokenizer of %s, once: up to a minute", gguf.name)
    reader = _reader(gguf)
    copy = converted_copies.copy_of(gguf)
    source, settings = (str(copy), {}) if copy.is_dir() else (str(gguf.parent), {"gguf_file": gguf.name})
    config = transformers.AutoConfig.from_pretrained(source, **settings)
    tokenizer = converted_copies.tokenizer_of(gguf) if settings else transformers.AutoTokenizer.from_pretrained(source)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {
        "output": asdict(_place(tensors, (_OUTPUT, _INPUT), gguf)),
        "input": asdict(_place(tensors, (_INPUT,), gguf)),
        "file_format": _file_format(reader.tensors),
        "fingerprint": _fingerprint(tensors, config),
    }
    (folder / _FILE).write_text(json.dumps(found))


def _reader(gguf: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(str(gguf))
    except Exception as error:  # it checks little, so that any error may come of a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{gguf.name!r} is not a complete .gguf file: {reason}", hint="fetch it again") from error


def _place(tensors: dict[str, Any], names: Sequence[str], gguf: Path) -> TensorPlace:
    """Return the place of the first of these tensors that the file has."""
    found = next((tensors[name] for name in names if name in tensors), None)
    if found is None:
        raise ModelError(f"{gguf.name!r} has no {names[0]}", hint="files in parts have to be joined first")
    width, num_rows = (int(size) for size in found.shape)
    return TensorPlace(int(found.data_offset), int(found.tensor_type), num_rows, width, int(found.n_bytes) // num_rows)


def _file_format(tensors: list[Any]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=sizes.__getitem__)


def _fingerprint(tensors: dict[str, Any], config: Any) -> str | None:
    """The same fingerprint as that of the model that transformers makes of the file, of the few weights it samples."""
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return fingerprint(model, is_quantised=True, weight_of=_weights(tensors, model))
    except Exception as error:  # what names a file's weights is inside of transformers, and not for all models
        _log.warning("%s has no fingerprint: %s", type(config).__name__, error)
        return None


def _weights(tensors: dict[str, Any], model: Any) -> Callable[[str], Tensor]:
    """Return a function from the name of a parameter to its dequantised values."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    sizes = model.config.to_dict()
    processor: Any = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)
    processor = processor(config=sizes)
    ours = {theirs: name for name, theirs in get_gguf_hf_weights_map(model, processor).items()}

    def read(name: str) -> Tensor:
        tensor = tensors[ours[name]]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(processor.process(weights=values, name=tensor.name).weights.copy())

    return read
