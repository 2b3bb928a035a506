"""What was computed once is found again, whole and of this version, or computed again."""

from __future__ import annotations

import os

import pytest
import torch

from mara_integrations.errors import OutputError
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.identity import model_fingerprint
from mara_integrations.training.records import store
from mara_integrations.training.records.store import load_or_compute
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.rollouts.storage import load_or_generate


def load_or_generate_cached(path, generate):
    found = load_or_generate(path, generate)
    store.mark_used(path)
    return found


def test_a_damaged_file_is_computed_again(tmp_path):
    path = tmp_path / "part.pt"
    assert load_or_compute(path, lambda: [torch.ones(3)])[1] is False
    assert load_or_compute(path, lambda: pytest.fail("it is there"))[1] is True
    for damage in (lambda data: data[:100], lambda data: data[:-40] + b"x" + data[-39:], lambda data: b""):
        path.write_bytes(damage(path.read_bytes()))
        assert load_or_compute(path, lambda: [torch.ones(3)])[1] is False, "damaged, so computed again"
        assert load_or_compute(path, lambda: pytest.fail("it is there"))[1] is True


def test_the_cache_drops_what_was_used_longest_ago(monkeypatch):
    sample = [Reply(0, "text", (1, 2), torch.zeros(3, 64).half())]
    load_or_generate_cached(store.cache_file("first"), lambda: sample)
    size = next(store.cache_dir().rglob("*.pt")).stat().st_size
    monkeypatch.setattr(store, "MAX_CACHE_BYTES", 2 * size + 10)
    load_or_generate_cached(store.cache_file("second"), lambda: sample)
    for age, name in enumerate(("second", "first")):  # written within one tick of the clock
        os.utime(store.cache_dir() / "replies" / f"{name}.pt", ns=(age, age))
    load_or_generate_cached(store.cache_file("first"), lambda: pytest.fail("it is there"))  # which makes it younger
    load_or_generate_cached(store.cache_file("third"), lambda: sample)
    assert sorted(path.stem for path in store.cache_dir().rglob("*.pt")) == ["first", "third"]
    assert load_or_generate_cached(store.cache_file("first"), lambda: pytest.fail("it is there"))[1] is True


def test_what_another_run_prunes_at_once_is_not_lost(monkeypatch):
    write = store.write_atomically

    def write_and_lose(path, data, **how):
        write(path, data, **how)
        path.unlink()

    monkeypatch.setattr(store, "write_atomically", write_and_lose)
    replies, was_stored = load_or_generate_cached(
        store.cache_file("first"), lambda: [Reply(0, "text", (1, 2), torch.ones(3, 4))]
    )
    assert replies[0].states.sum() == 12 and not was_stored


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_is_shared_under_two_names(tmp_path, monkeypatch, has_links):
    def fails(*_):
        raise OSError(18, "Invalid cross-device link")

    if not has_links:
        monkeypatch.setattr(os, "link", fails)
    one, other = tmp_path / "one.pt", tmp_path / "folder" / "other.pt"
    assert not store.share(one, other) and not other.exists()

    store.save(one, [1])
    for _ in range(2):
        assert store.share(one, other)
    assert one.samefile(other) is has_links
    one.unlink()

    assert store.load(other) == [1]
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["other.pt"], "nothing else is left"


def test_a_fine_tuned_model_has_another_bank():
    model, same, other = (load_model(ModelSpec((tiny_model(), tiny_tokenizer()))) for _ in range(3))
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    assert model_fingerprint(model) == model_fingerprint(same) != model_fingerprint(other)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        load_or_compute(tmp_path / "part.pt", lambda: [1])
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


@pytest.mark.parametrize("kind", ["folder", "loop of links", "other version", "no replies"])
def test_a_file_that_is_no_file_of_ours_counts_as_absent(tmp_path, monkeypatch, kind):
    path, replies = tmp_path / "part.pt", [Reply(0, "text", (1, 2), torch.ones(3, 4).half())]
    if kind == "folder":
        path.mkdir()
    elif kind == "loop of links":
        path.symlink_to(path)
    elif kind == "no replies":
        load_or_compute(path, lambda: [{"prompt": 0, "unknown": 1}])
    else:
        with monkeypatch.context() as older:
            older.setattr(store, "FORMAT_VERSION", store.FORMAT_VERSION - 1)
            load_or_generate(path, lambda: replies)

    if kind == "folder":
        with pytest.raises(OutputError, match=r"part\.pt.*directory"):
            load_or_generate(path, lambda: replies)
        return
    found, was_stored = load_or_generate(path, lambda: replies)
    assert not was_stored
    assert found[0].text == "text"
    assert load_or_generate(path, lambda: pytest.fail("it is there"))[1]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
def test_stored_replies_are_the_users_alone(tmp_path):
    load_or_compute(tmp_path / "part.pt", lambda: ["a user's prompt"])
    assert (tmp_path / "part.pt").stat().st_mode & 0o077 == 0


def test_storing_states_copies_none_of_them():
    reply = Reply(0, "text", (1, 2), torch.ones(3, 4).half())
    assert store.as_dict(reply)["states"] is reply.states
