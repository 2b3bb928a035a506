"""The head: a three-layer perceptron on a candidate's hidden state; its folder on disk; published checkpoints."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from mara_integrations.errors import HeadError, OutputError
from mara_integrations.files import write_atomically
from mara_integrations.sampling import HeadForm

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "head.safetensors", "head_config.json", "README.md"
REWARDS_FOLDER = "rewards"  # in a head's folder: reward models that its training fitted


class HeadConfig(BaseModel):
    """What a head is and how it was made; the `head_config.json` of its folder.

    Attributes:
        format_version: Of this file.
        form: `paper`: two classes, accept where class 1 wins. `residual`: f corrects the base model's hazard.
            `value`: f = V(candidate) - V(last token).
        hidden_size: Width d of the base model's hidden states.
        inner_sizes: Widths of the two hidden layers.
        base_model: Name of the model it was trained on; None when unknown, as in published checkpoints.
        strength: What strength 1 multiplies f by; found by calibration to a KL budget.
        top_k: Candidate setting it was trained with, the default of requests that name none.
        top_p: As `top_k`.
        min_candidates: As `top_k`.
        method: How it was trained.
        rewards: Descriptions of what it was trained for.
        data_fingerprint: Of the training data.
        training: Settings of the run.
        metrics: Final figures of the run.
        weights_sha256: Of the weights file beside this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    form: HeadForm = "residual"
    hidden_size: int = Field(ge=1)
    inner_sizes: tuple[int, int] = (1024, 256)
    base_model: str | None = None
    strength: float = Field(1.0, gt=0.0)
    top_k: int = Field(40, ge=1)
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    min_candidates: int = Field(1, ge=1)
    method: str | None = None
    rewards: tuple[dict[str, Any], ...] = ()
    data_fingerprint: str | None = None
    training: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    weights_sha256: str | None = None


class MARAHead(nn.Module):
    """LayerNorm(d), Linear(d, h), ReLU, Linear(h, h/4), ReLU, Linear(h/4, out); out is 2 for `paper`, else 1.

    A new `residual` or `value` head scores 0 everywhere, which is exactly the base model.

    Source: Zhang et al. 2025 (arXiv 2505.19743), section 3; layer names of its published checkpoints.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        wide, narrow = config.inner_sizes
        self.ln = nn.LayerNorm(config.hidden_size)
        self.linear1 = nn.Linear(config.hidden_size, wide)
        self.linear2 = nn.Linear(wide, narrow)
        self.output_linear = nn.Linear(narrow, 2 if config.form == "paper" else 1)
        if config.form != "paper":
            nn.init.zeros_(self.output_linear.weight)
            nn.init.zeros_(self.output_linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores of hidden states: (..., d) to (..., 2) class logits (`paper`), (..., 1) f or V (the other forms)."""
        x = torch.relu(self.linear1(self.ln(hidden)))
        out: Tensor = self.output_linear(torch.relu(self.linear2(x)))
        return out

    def score(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """What the gate needs of each candidate, see `gate.accept_logit`.

        Args:
            hidden: State of the candidate, after the final norm, shape (N, d).
            previous: State of the last token before it, shape (N, d); only the `value` form looks at it.

        Returns:
            Shape (N,), float32.
        """
        out: Tensor = self(hidden.to(self.ln.weight.dtype))
        if self.config.form == "paper":
            return (out[:, 1] - out[:, 0]).float()
        if self.config.form == "value":
            out = out - self(previous.to(self.ln.weight.dtype))
        return out[:, 0].float()

    @property
    def parts(self) -> dict[MARAHead, float]:
        """Itself, and the factor of its score at strength 1; see `heads.ComposedHead`."""
        return {self: 1.0 if self.config.form == "paper" else self.config.strength}

    @property
    def num_bytes(self) -> int:
        """Memory held by the weights."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    @property
    def fingerprint(self) -> str:
        """Hash of form and weights: two heads that can answer differently differ here."""
        return self.config.weights_sha256 or _sha256(_dump(self))

    def check_fits(self, hidden_size: int, model_name: str, source: str | Path | None = None) -> None:
        """Refuse a head of another width, and warn where it was trained on another model of the same width.

        Raises:
            HeadError: If the widths differ; names both.
        """
        name = f"head {str(source)!r}" if source is not None else "the head"
        if self.config.hidden_size != hidden_size:
            raise HeadError(
                f"{name} expects hidden size {self.config.hidden_size}; model {model_name!r} has {hidden_size}",
                hint="train a head for this model, or name the model the head was trained on"
                + (f" ({self.config.base_model})" if self.config.base_model else ""),
            )
        trained_on = self.config.base_model
        if trained_on is not None and Path(trained_on).resolve() != Path(model_name).resolve():  # `./m` is `m`
            warnings.warn(
                f"{name} was trained on {trained_on!r} and now judges {model_name!r}: "
                "heads do transfer between models of one width, but check it with `mara-tools eval`",
                stacklevel=3,
            )

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Write the head's folder; each file appears whole or not at all.

        Args:
            folder: Made if absent; a head already there is replaced.
            card: Text of its README.md; a short one is written when None and none is there.

        Raises:
            OutputError: If the folder can't be written.
        """
        folder = Path(folder)
        if folder.is_file():
            raise OutputError(f"can't write a head to {str(folder)!r}: it is a file", hint="name a folder")
        weights = _dump(self)
        config = self.config.model_copy(update={"weights_sha256": _sha256(weights)})
        write_atomically(folder / WEIGHTS_FILE, weights)
        if card is not None or not (folder / CARD_FILE).exists():
            write_atomically(folder / CARD_FILE, card or default_card(config))
        write_atomically(folder / CONFIG_FILE, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
        self.config = config
        return folder

    @classmethod
    def from_pretrained(cls, source: str | Path) -> MARAHead:
        """Read a head: a folder, a published `.pth` actor, or a Hub id.

        Raises:
            HeadError: If it is missing, damaged, or not a head; the message names the file and what was wrong.
        """
        path = Path(source).expanduser()
        if path.suffix in (".pth", ".pt") or path.is_file():
            return _read_published(path)
        return _read_folder(head_folder(source))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the folder to the Hugging Face Hub, as `head=repo_id` reads it; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            return push_folder(self.save_pretrained(folder), repo_id, private=private, token=token)


def head_folder(source: str | Path) -> Path:
    """A head's folder: the one that is named, or the local copy of a Hub id.

    Raises:
        HeadError: If it is neither.
    """
    path = Path(source).expanduser()
    return path if path.is_dir() else _download(str(source))


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a head's folder with all that the trainer wrote beside it; see `MARAHead.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload MARA head", ignore_patterns=[".*", ".*/**"]
        )
    )


def check_can_push(repo_id: str) -> None:
    """Find out before the work whether the Hub would take its result.

    Raises:
        OutputError: If nobody is logged in, or there is no way to the Hub.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network: a sentence each
        reason = str(error).strip().split("\n")[0]
        raise OutputError(
            f"can't push to {repo_id!r}: {reason}", hint="log in with `hf auth login`, or set HF_TOKEN"
        ) from None


def default_card(config: HeadConfig) -> str:
    """A model card that says what is known and how to use the head."""
    base = config.base_model or "unknown"
    return (
        f"---\nlibrary_name: mara_integrations\nbase_model: {base}\ntags: [mara, alignment]\n---\n\n# MARA head\n\n"
        f"A `{config.form}` head for hidden states of width {config.hidden_size}, trained on `{base}`"
        f"{f' by `{config.method}`' if config.method else ''}.\n\n"
        '```python\nfrom mara_integrations import MARALLM\n\nllm = MARALLM(model="'
        + base
        + '", head="this-folder")\n```\n'
    )


def _dump(head: MARAHead) -> bytes:
    """Weights as one contiguous safetensors blob on the CPU, with the form so that it is part of the fingerprint."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    return dump_tensors(tensors, metadata={"form": head.config.form})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_folder(folder: Path) -> MARAHead:
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise HeadError(
                f"{str(folder)!r} is not a head: it has no {path.name}",
                hint=f"a head's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}; `mara-tools train` writes one",
            )
    try:
        config = HeadConfig.model_validate_json(config_path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "json"
        raise HeadError(
            f"{str(config_path)!r} is damaged: {place}: {first['msg']}", hint="save the head again"
        ) from None
    weights = weights_path.read_bytes()
    try:
        tensors = load_tensors(weights)
    except SafetensorError as error:
        raise HeadError(f"{str(weights_path)!r} is damaged: {error}", hint="copy or train the head again") from None
    if config.weights_sha256 not in (None, _sha256(weights)):
        raise HeadError(
            f"{str(weights_path)!r} is not the file that {CONFIG_FILE} describes: its sha256 differs",
            hint="copy both files together, or train the head again",
        )
    return _build(config, tensors, weights_path)


def _read_published(path: Path) -> MARAHead:
    """A bare state dict, as the paper's authors publish their actors."""
    if not path.is_file():
        raise HeadError(f"no head at {str(path)!r}: there is no such file", hint="name a .pth file or a head's folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and attribute errors alike for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise HeadError(f"{str(path)!r} is not a checkpoint that loads safely: {reason}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise HeadError(f"{str(path)!r} holds {type(state).__name__}, not a state dict of tensors")
    tensors = {str(name).removeprefix("module."): value.float() for name, value in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        (wide, hidden_size), (narrow, _) = shapes["linear1.weight"], shapes["linear2.weight"]
    except (KeyError, ValueError):
        raise HeadError(
            f"{str(path)!r} has the keys {sorted(shapes)[:6]}, not ln.*, linear1.*, linear2.*, output_linear.*",
            hint="only actors of the published layout load; critics do not",
        ) from None
    config = HeadConfig(form="paper", hidden_size=hidden_size, inner_sizes=(wide, narrow), method="published")
    return _build(config, tensors, path)


def _build(config: HeadConfig, tensors: Mapping[str, Tensor], path: Path) -> MARAHead:
    head = MARAHead(config)
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        name = next(key for key in expected | found if expected.get(key) != found.get(key))
        raise HeadError(
            f"{str(path)!r} does not hold a {config.form!r} head of hidden size {config.hidden_size}: "
            f"{name} has shape {found.get(name)}, expected {expected.get(name)}"
        )
    head.load_state_dict(dict(tensors))
    return head.eval().requires_grad_(False)


def _download(source: str) -> Path:
    """The folder of a head on the Hub, from the local cache when there is no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(source, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, f"{REWARDS_FOLDER}/*"])
        )
    except HFValidationError:
        reason = "there is no such folder, and it is not a Hub id"
    except Exception as error:  # not found, gated, offline: one sentence each, all meaning that there is no head
        reason = f"there is no such folder, and the Hub gave none ({type(error).__name__})"
    raise HeadError(
        f"no head at {source!r}: {reason}", hint="name a head's folder, a published .pth actor, or a Hub id"
    )
