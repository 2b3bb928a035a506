"""Heads on disk: what is written is read back, published actors load, damage is named."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from mara_integrations.errors import HeadError, OutputError
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.testing import random_head


@pytest.fixture
def saved(tmp_path):
    head = random_head(16, "residual", base_model="tiny", scale=2.5, method="value")
    return head, head.save_pretrained(tmp_path / "head")


def published_actor(path, hidden_size=16):
    """A state dict as the paper's authors publish theirs."""
    torch.manual_seed(0)
    layers = {
        "ln": torch.nn.LayerNorm(hidden_size),
        "linear1": torch.nn.Linear(hidden_size, 1024),
        "linear2": torch.nn.Linear(1024, 256),
        "output_linear": torch.nn.Linear(256, 2),
    }
    torch.save(torch.nn.ModuleDict(layers).state_dict(), path)
    return layers


@pytest.mark.parametrize("form", ["paper", "residual", "value", "q"])
def test_a_saved_head_scores_as_before(tmp_path, form):
    head = random_head(16, form)
    loaded = MARAHead.from_pretrained(head.save_pretrained(tmp_path / "h"))
    hidden, previous = torch.randn(2, 7, 16)
    assert torch.equal(loaded.score(hidden, previous), head.score(hidden, previous))
    assert loaded.config == head.config and loaded.fingerprint == head.fingerprint


def test_forms_score_as_defined():
    hidden, previous = torch.randn(2, 5, 16)
    paper, residual, value = (random_head(16, form) for form in ("paper", "residual", "value"))
    torch.testing.assert_close(paper.score(hidden, previous), paper(hidden)[:, 1] - paper(hidden)[:, 0])
    torch.testing.assert_close(residual.score(hidden, previous), residual(hidden)[:, 0])
    torch.testing.assert_close(value.score(hidden, previous), (value(hidden) - value(previous))[:, 0])


def test_a_q_head_compares_a_state_with_an_output_embedding():
    hidden, embeddings = torch.randn(2, 5, 16)
    q = random_head(16, "q")
    of_state = q.linear2(q.linear1(q.ln(hidden)).relu())
    centred = embeddings - embeddings.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(q.score(hidden, embeddings), (of_state * q.candidate_linear(normalised).relu()).sum(-1))
    torch.testing.assert_close(
        q.score(hidden, 7.0 * embeddings + 1.0), q.score(hidden, embeddings), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize(("hidden_size", "most"), [(576, 1e6), (4096, 8e6)])
def test_a_q_head_of_the_default_size_is_small(hidden_size, most):
    head = MARAHead(HeadConfig(form="q", hidden_size=hidden_size))
    assert isinstance(head, QHead) and head.num_bytes < most and head.config.inner_sizes == (256, 64)


def test_a_config_chooses_the_network():
    assert isinstance(MARAHead(HeadConfig(form="value", hidden_size=16)), AfterstateHead)
    assert isinstance(copy.deepcopy(random_head(16, "q")), QHead)


@pytest.mark.parametrize("form", ["residual", "value", "q"])
def test_a_new_head_scores_nothing(form):
    head = MARAHead(HeadConfig(form=form, hidden_size=16))
    assert head.score(torch.randn(4, 16), torch.randn(4, 16)).abs().max() == 0


def test_a_published_actor_loads_with_its_parameters(tmp_path):
    layers = published_actor(tmp_path / "actor.pth", hidden_size=4096)
    head = MARAHead.from_pretrained(tmp_path / "actor.pth")
    assert sum(p.numel() for p in head.parameters()) == 4_466_434  # the paper's number at width 4096
    x = torch.randn(3, 4096)
    want = layers["output_linear"](layers["linear2"](layers["linear1"](layers["ln"](x)).relu()).relu())
    torch.testing.assert_close(head(x), want)
    assert (head.score(x, x) > 0).tolist() == (want[:, 1] > want[:, 0]).tolist()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("pwned",)

    torch.save({"ln.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(HeadError, match="not a checkpoint that loads safely"):
        MARAHead.from_pretrained(tmp_path / "evil.pth")


def test_a_critic_is_no_actor(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "critic.pth")
    with pytest.raises(HeadError, match=r"fc\.weight.*not ln"):
        MARAHead.from_pretrained(tmp_path / "critic.pth")


def test_another_width_is_refused_with_both_widths(saved):
    with pytest.raises(HeadError, match=r"'heads/x' expects hidden size 16; model 'smollm2' has 576"):
        saved[0].check_fits(576, "smollm2", "heads/x")


def test_another_model_of_the_same_width_is_a_warning(saved):
    head = random_head(16, "residual", base_model="org/tiny")
    with pytest.warns(UserWarning, match="trained on 'org/tiny'"):
        head.check_fits(16, "org/other")
    head.check_fits(16, "org/tiny")


def test_without_fingerprints_a_folder_may_hold_a_copy_of_any_model(tmp_path):
    head = random_head(16, "residual", base_model="org/tiny")
    head.check_fits(16, str(tmp_path))
    head.check_fits(16, "LlamaForCausalLM")


def test_damage_is_named(saved):
    _, folder = saved
    weights, config = folder / "head.safetensors", folder / "head_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HeadError, match=r"head\.safetensors' is damaged"):
        MARAHead.from_pretrained(folder)
    weights.write_bytes(whole[:-4] + b"\x00\x01\x02\x03")  # still a safetensors file
    with pytest.raises(HeadError, match="sha256 differs"):
        MARAHead.from_pretrained(folder)
    weights.write_bytes(whole)
    config.write_text(text[:-20])
    with pytest.raises(HeadError, match=r"head_config\.json' is damaged"):
        MARAHead.from_pretrained(folder)
    config.write_text(json.dumps({**json.loads(text), "hidden_size": 17, "weights_sha256": None}))
    with pytest.raises(HeadError, match=r"shape \(16,\), expected \(17,\)"):
        MARAHead.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(HeadError, match=r"has no head\.safetensors"):
        MARAHead.from_pretrained(folder)


def test_a_missing_head_says_what_would_do(tmp_path):
    with pytest.raises(HeadError, match=r"nowhere\.pth'.*no such file"):
        MARAHead.from_pretrained(tmp_path / "nowhere.pth")
    with pytest.raises(HeadError, match=r"no head at '/no/such/folder'"):
        MARAHead.from_pretrained("/no/such/folder")


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "h").write_text("mine")
    with pytest.raises(OutputError, match="it is a file"):
        random_head(16).save_pretrained(tmp_path / "h")
    assert (tmp_path / "h").read_text() == "mine"


def test_the_folder_has_a_card_and_a_readable_config(saved):
    _, folder = saved
    assert "base_model: tiny" in (folder / "README.md").read_text()
    config = json.loads((folder / "head_config.json").read_text())
    assert config["form"] == "residual" and config["scale"] == 2.5 and config["format_version"] == 2
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "head.safetensors", "head_config.json"]


def test_a_head_of_the_first_format_still_loads(saved):
    head, folder = saved
    config = json.loads((folder / "head_config.json").read_text())
    config["strength"] = config.pop("scale")  # its name then
    (folder / "head_config.json").write_text(json.dumps({**config, "format_version": 1}))

    loaded = MARAHead.from_pretrained(folder)

    assert loaded.config == head.config and loaded.config.scale == 2.5
