"""Load without the messages and progress bars of transformers and the Hub."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import huggingface_hub
import transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence all but errors of transformers and the Hub inside the block; earlier settings come back after it."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bar = transformers.logging.is_progress_bar_enabled()
    had_hub_bars = not huggingface_hub.utils.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bar:
            transformers.logging.enable_progress_bar()
        if had_hub_bars:
            huggingface_hub.utils.enable_progress_bars()
        else:
            huggingface_hub.utils.disable_progress_bars()
