"""The base class of all heads: a config, weights, a folder on disk, a place on the Hub."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import cast

import torch
from torch import nn
from typing_extensions import Self

from mara_integrations.errors import HeadError
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.folder import (
    as_float32,
    check_shapes,
    check_size,
    dump_weights,
    read_folder,
    sha256,
    write_folder,
)
from mara_integrations.heads.hub import Location, locate, push_folder
from mara_integrations.heads.published import read_published
from mara_integrations.sampling import HeadForm

__all__ = ["HeadConfig", "MARAHead"]


class MARAHead(nn.Module):
    """A head: its config, its folder on disk, and where its weights are.

    The networks are subclasses: `MARAHead(config)` is an `AfterstateHead` or, for the form `q`, a `QHead`.
    """

    def __new__(cls, config: HeadConfig | None = None) -> Self:
        """Choose the network; without a config, as copies are made, it is the class itself."""
        if cls is MARAHead and config is not None:
            cls = cast(type[Self], head_class(config.form))
        return super().__new__(cls)

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def parts(self) -> dict[MARAHead, float]:
        """The head itself with the factor of its score at strength 1; a composition has several, see `ComposedHead`."""
        return {self: 1.0 if self.config.form == "paper" else self.config.scale}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def num_bytes(self) -> int:
        """Memory held by the weights."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    @property
    def fingerprint(self) -> str:
        """Hash of form and weights: two heads that can answer differently differ here."""
        return self.config.weights_sha256 or sha256(dump_weights(self.config, self.state_dict()))

    def check_fits(
        self, hidden_size: int, model_name: str, source: str | Path | None = None, *, fingerprint: str | None = None
    ) -> None:
        """Refuse a head of another width, and warn where it was trained on another model of the same width.

        Fingerprints tell models apart; where one is missing, names do, as far as they can.

        Raises:
            HeadError: If the widths differ; names both.
        """
        name = f"head {str(source)!r}" if source is not None else "the head"
        if self.config.hidden_size != hidden_size:
            raise HeadError(
                f"{name} expects hidden size {self.config.hidden_size}; model {model_name!r} has {hidden_size}",
                hint="train a head for this model, or name the model the head was trained on"
                + (f" ({self.config.base_model!r})" if self.config.base_model else ""),
            )
        if not self.config.is_for_model(model_name, fingerprint):
            trained_on = self.config.base_model
            warnings.warn(
                f"{name} was trained on {trained_on!r} and now judges {model_name!r}: "
                "heads do transfer between models of one width, but check it with `mara-tools eval`",
                stacklevel=3,
            )

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Write the head's folder; see `folder.write_folder` for arguments and errors."""
        self.config = write_folder(folder, self.config, self.state_dict(), card)
        return Path(folder)

    @classmethod
    def from_pretrained(cls, source: str | Path | Location) -> MARAHead:
        """Read a head: a folder, a published `.pth` actor, or a Hub id; see `hub.locate`.

        Raises:
            HeadError: If it is missing, damaged, or not a head; the message names the file and what is wrong.
        """
        location = source if isinstance(source, Location) else locate(source)
        if location.is_folder:
            config, weights = read_folder(location.path, _shapes)
        else:
            config, tensors = read_published(location.path)
            shapes, name = _shapes(config), str(location.path)
            check_size(name, shapes)
            check_shapes(name, config, tensors, shapes)
            weights = as_float32(name, tensors)
        with torch.device("meta"):  # takes no memory
            head = MARAHead(config)
        head.load_state_dict(weights, assign=True)
        return head.eval().requires_grad_(False)

    def push_to_hub(self, repo_id: str, *, public: bool = False, token: str | None = None) -> str:
        """Upload the head to the Hugging Face Hub, as `head=repo_id` reads it; see `hub.push_folder`."""
        with tempfile.TemporaryDirectory() as folder:
            return push_folder(self.save_pretrained(folder), repo_id, public=public, token=token)


def head_class(form: HeadForm) -> type[MARAHead]:
    """Return the network of a form."""
    from mara_integrations.heads.afterstate import AfterstateHead  # both build on this module
    from mara_integrations.heads.q import QHead

    return QHead if form == "q" else AfterstateHead


def _shapes(config: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a head of this config."""
    with torch.device("meta"):  # takes no memory
        return {name: tuple(tensor.shape) for name, tensor in MARAHead(config).state_dict().items()}
