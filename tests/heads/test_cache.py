"""Heads kept in memory: within a budget, read again when replaced, and never two versions in one."""

from __future__ import annotations

import os
import shutil
import threading

import pytest
import torch

from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.heads.cache import HeadCache
from mara_integrations.heads.folder import write_folder
from mara_integrations.heads.head import MARAHead
from mara_integrations.testing import random_head

WIDTH = 16


def head(seed=0, width=WIDTH):
    return random_head(width, "residual", seed=seed)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_all_who_name_a_head_get_one_object(tmp_path):
    folder = head().save_pretrained(tmp_path / "h")
    cache = HeadCache()

    assert cache.get(folder) is cache.get(str(folder)) is cache.get(folder, torch.device("cpu"))
    assert len(cache) == 1


def test_a_retrained_head_is_read_again_and_the_old_one_dropped(tmp_path):
    folder, cache = head(0).save_pretrained(tmp_path / "h"), HeadCache()
    old = cache.get(folder)

    new = head(1)
    new.save_pretrained(folder)

    assert cache.get(folder).fingerprint == new.fingerprint != old.fingerprint
    assert len(cache) == 1 and cache.num_bytes == new.num_bytes


def test_a_replacement_with_the_old_ones_times_is_noticed(tmp_path):
    folder, other = head(0).save_pretrained(tmp_path / "h"), head(1).save_pretrained(tmp_path / "o")
    for path in (*folder.iterdir(), *other.iterdir()):
        os.utime(path, (1, 1))
    cache = HeadCache()
    cache.get(folder)

    for path in other.iterdir():
        shutil.copy2(path, folder / path.name)

    assert cache.get(folder).fingerprint == MARAHead.from_pretrained(other).fingerprint


def test_a_link_that_is_turned_to_another_head_is_noticed(tmp_path):
    folders = [head(seed).save_pretrained(tmp_path / f"v{seed}") for seed in (0, 1)]
    current, cache = tmp_path / "current", HeadCache()
    current.symlink_to(folders[0])
    cache.get(current)

    (tmp_path / "next").symlink_to(folders[1])
    os.replace(tmp_path / "next", current)

    assert cache.get(current).fingerprint == MARAHead.from_pretrained(folders[1]).fingerprint


def test_a_head_replaced_again_and_again_is_always_one_of_them(tmp_path):
    versions = [head(seed) for seed in range(4)]
    folder, cache, is_over = versions[0].save_pretrained(tmp_path / "h"), HeadCache(), threading.Event()
    known = {version.fingerprint: version for version in versions}

    def replace():
        while not is_over.is_set():
            for version in versions:
                version.save_pretrained(folder)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(60):
            for read in (cache.get(folder), MARAHead.from_pretrained(folder)):
                same = known[read.fingerprint].state_dict()
                assert all(torch.equal(tensor, same[name]) for name, tensor in read.state_dict().items())
    finally:
        is_over.set()
        writer.join()
    assert len(cache) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "head.safetensors", "head_config.json"]


@pytest.mark.parametrize("step", range(5))
def test_a_writer_killed_at_any_step_leaves_the_old_head_or_the_new(tmp_path, monkeypatch, step):
    folder, new = head(0).save_pretrained(tmp_path / "h"), head(1)
    old = MARAHead.from_pretrained(folder).fingerprint
    steps = []

    def killed_at(function):
        def run(*arguments):
            steps.append(function)
            if len(steps) > step:
                raise KeyboardInterrupt
            return function(*arguments)

        return run

    module = "mara_integrations.heads.folder"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"{module}.write_atomically", killed_at(__import__(module, fromlist="x").write_atomically))
        patched.setattr(f"{module}.os.replace", killed_at(os.replace))
        write_folder(folder, new.config, new.state_dict())

    assert MARAHead.from_pretrained(folder).fingerprint in (old, new.fingerprint)
    new.save_pretrained(folder)
    assert MARAHead.from_pretrained(folder).fingerprint == new.fingerprint
    assert len(list(folder.iterdir())) == 3


def removed(folder):
    shutil.rmtree(folder)


def cut_short(folder):
    for name in ("head.safetensors", "head_config.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])


def dangling(folder):
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [removed, cut_short, dangling])
def test_a_damaged_head_stays_for_a_moment_then_is_refused(tmp_path, damage):
    folder, clock = head(0).save_pretrained(tmp_path / "h"), Clock()
    cache = HeadCache(grace_s=5, clock=clock)
    old = cache.get(folder)

    damage(folder)

    assert cache.get(folder) is old, "another folder may be about to take its place"
    clock.now = 6.0
    with pytest.raises(HeadError, match="h"):
        cache.get(folder)
    if folder.is_symlink():
        folder.unlink()
    new = head(1)
    new.save_pretrained(folder)
    assert cache.get(folder).fingerprint == new.fingerprint
    clock.now = 100.0
    damage(folder)
    assert cache.get(folder).fingerprint == new.fingerprint, "a new moment begins with each damage"


def test_the_least_recently_used_heads_go_first(tmp_path):
    folders = [head(seed).save_pretrained(tmp_path / str(seed)) for seed in range(3)]
    cache = HeadCache(max_bytes=2 * head().num_bytes)
    first, second = (cache.get(folder) for folder in folders[:2])
    assert cache.get(folders[0]) is first

    cache.get(folders[2])

    assert cache.get(folders[0]) is first and cache.get(folders[1]) is not second
    assert cache.num_bytes <= cache.max_bytes


def test_the_budget_can_be_set_and_a_head_beyond_it_is_refused(tmp_path):
    small, large = head().save_pretrained(tmp_path / "s"), head(width=512).save_pretrained(tmp_path / "l")
    cache = HeadCache()
    cache.get(small), cache.get(large)

    cache.max_bytes = head().num_bytes

    assert len(cache) == 1
    with pytest.raises(HeadError, match=r"l' takes [\d,]+ bytes; all heads together may take"):
        cache.get(large)
    with pytest.raises(ConfigError, match="head_cache_bytes=0"):
        cache.max_bytes = 0


def test_a_budget_of_one_version_is_enough_for_a_retrained_head(tmp_path):
    folder, cache = head(0).save_pretrained(tmp_path / "h"), HeadCache(max_bytes=head().num_bytes)
    cache.get(folder)
    head(1).save_pretrained(folder)
    assert cache.get(folder).fingerprint == MARAHead.from_pretrained(folder).fingerprint
