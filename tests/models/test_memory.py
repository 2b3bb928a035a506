"""How much memory there is, and what of it keys and values take where no limit is set."""

from __future__ import annotations

import torch

from mara_integrations.models import memory
from mara_integrations.models.memory import default_kv_bytes, free_bytes, in_mib, total_ram_bytes

CPU, MIB = torch.device("cpu"), 1 << 20


def test_the_default_is_a_share_of_the_memory_that_is_free():
    assert 0.3 * free_bytes(CPU) < default_kv_bytes(CPU) < 0.7 * free_bytes(CPU)


def test_what_is_spoken_for_is_not_free(monkeypatch):
    monkeypatch.setattr(memory, "free_ram_bytes", lambda: 100 * MIB)

    assert [default_kv_bytes(CPU, used * MIB) for used in (0, 40, 200)] == [50 * MIB, 30 * MIB, 0]


def test_no_more_is_free_than_there_is():
    total = total_ram_bytes()
    assert total is None or free_bytes(CPU) <= total


def test_sizes_are_read_as_text():
    assert in_mib(3 * MIB) == "3 MiB" and in_mib(5) == "5 bytes"
