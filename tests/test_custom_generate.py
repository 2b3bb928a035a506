"""`model.generate(..., custom_generate=gated_generate)`: our tokens, transformers' contract."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import LogitsProcessor, MinPLogitsWarper, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mara_integrations import MARAEngine
from mara_integrations.custom_generate import gated_generate
from mara_integrations.engine.backends.forward import cache_argument
from mara_integrations.errors import ConfigError
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

LENGTHS = (9, 4, 6)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def batch():
    """Three prompts, padded on the left."""
    ids = torch.randint(1, 256, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * (9 - length) + [1] * length for length in LENGTHS])
    return {"input_ids": ids * mask, "attention_mask": mask}


def plain(model, batch, **settings):
    return model.generate(**batch, pad_token_id=0, **{"max_new_tokens": 10, "do_sample": False, **settings})


def gated(model, batch, function=gated_generate, **settings):
    return plain(model, batch, custom_generate=function, **settings)


def test_without_a_head_it_is_plain_generate(model, batch):
    want = plain(model, batch)
    assert gated(model, batch).tolist() == want.tolist()
    assert gated(model, batch, head=random_head(32), strength=0.0).tolist() == want.tolist()


@pytest.mark.parametrize("form", ["paper", "residual", "value", "q"])
def test_under_a_head_it_gives_the_tokens_of_the_engine(model, batch, form):
    head = random_head(32, form, accept_rate=0.3)
    engine = MARAEngine((model, tiny_tokenizer()), head, max_new_tokens=10)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    got = gated(model, batch, head=head)

    assert got[:, 9:].tolist() == [list(g.token_ids) for g in engine.generate_batch(prompts)]
    assert got.tolist() != plain(model, batch).tolist()


def test_heads_are_named_and_composed_as_everywhere(model, batch, tmp_path):
    one, two = random_head(32, "residual"), random_head(32, "value", seed=1)
    composed = gated(model, batch, head={one.save_pretrained(tmp_path / "one"): 1.0, two: 0.5}).tolist()
    engine = MARAEngine((model, tiny_tokenizer()), {one: 1.0, two: 0.5}, max_new_tokens=10)
    assert composed[0][9:] == list(engine.generate(batch["input_ids"][0].tolist()).token_ids)
    with pytest.raises(ConfigError, match="'paper' head is on"):
        gated(model, batch, head=random_head(32), strength=0.5)


def test_rows_end_at_their_eos_and_are_padded(model, batch):
    free = gated(model, batch)[:, 9:].tolist()
    eos = free[1][3]
    got = gated(model, batch, eos_token_id=eos)
    assert got.tolist() == plain(model, batch, eos_token_id=eos).tolist()
    assert len({len([token for token in row if token]) for row in got[:, 9:].tolist()}) > 1


def test_without_a_padding_token_rows_are_padded_with_eos(model, batch):
    eos = gated(model, batch)[:, 9:].tolist()[1][3]
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": eos}
    got = model.generate(**batch, **settings, custom_generate=gated_generate)
    assert got.tolist() == model.generate(**batch, **settings).tolist()
    assert got[1, -1] == eos


def test_sampling_takes_the_config_and_the_seed(model, batch):
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.9}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(gated(model, batch, **settings).tolist())
    assert runs[0] == runs[1] != runs[2]
    torch.manual_seed(0)
    seed = int(torch.randint(2**62, ()))
    engine = MARAEngine((model, tiny_tokenizer()), max_new_tokens=10, seed=seed, temperature=0.8, top_k=5, top_p=0.9)
    assert runs[0][0][9:] == list(engine.generate(batch["input_ids"][0].tolist()).token_ids)


def test_sampling_has_the_distribution_of_plain_generate(model, batch):
    one = {name: tensor[:1].repeat(600, 1) for name, tensor in batch.items()}
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 4, "top_p": 0.95, "max_new_tokens": 1}
    torch.manual_seed(0)
    ours, theirs = (run(model, one, **settings)[:, -1].bincount(minlength=256) for run in (gated, plain))
    assert (ours > 0).sum() > 1
    assert ((ours - theirs).abs() < 4.5 * (ours + theirs).clamp_min(9).sqrt()).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [5, 17]},
        {"bad_words_ids": [[3]], "forced_eos_token_id": 7},
        {"min_new_tokens": 6, "eos_token_id": 201},
        {"max_length": 13, "max_new_tokens": None},
    ],
    ids=str,
)
def test_processors_and_lengths_of_the_config_are_honoured(model, batch, settings):
    assert gated(model, batch, **settings).tolist() == plain(model, batch, **settings).tolist()


def test_a_processor_of_the_caller_is_honoured(model, batch):
    class Never(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(-1, torch.tensor(favourites), -torch.inf)

    favourites = plain(model, batch)[:, 9:].flatten().unique().tolist()
    got = gated(model, batch, logits_processor=[Never()])
    assert got.tolist() == plain(model, batch, logits_processor=[Never()]).tolist()
    judged = gated(model, batch, logits_processor=[Never()], head=random_head(32, accept_rate=0.3))
    assert not set(judged[:, 9:].flatten().tolist()) & set(favourites)


def test_stopping_criteria_end_each_row_by_itself(model, batch):
    class Seen(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([len(set(row[9:].tolist()) & {third}) > 0 for row in input_ids])

    free = gated(model, batch)[:, 9:].tolist()
    third = free[0][2]
    got = gated(model, batch, stopping_criteria=StoppingCriteriaList([Seen()]))[:, 9:].tolist()
    for row, whole in zip(got, free, strict=True):
        end = whole.index(third) + 1 if third in whole else len(whole)
        assert row[:end] == whole[:end] and not any(row[end:])
    assert not any(got[0][free[0].index(third) + 1 :])


def test_a_bound_streamer_gets_prompt_and_tokens(model, batch):
    class Recorder:
        def __init__(self):
            self.heard, self.ended = [], False

        def put(self, value):
            assert not self.ended
            self.heard.append(value.tolist())

        def end(self):
            self.ended = True

    recorder, one = Recorder(), {"input_ids": batch["input_ids"][:1]}
    eos = int(plain(model, one)[0, 9 + 4])
    got = gated(model, one, partial(gated_generate, streamer=recorder), eos_token_id=eos)[0].tolist()
    assert recorder.ended and recorder.heard[0] == [got[:9]]
    assert [token for (token,) in recorder.heard[1:]] == got[9:], "the end-of-sequence token too"
    with pytest.raises(ConfigError, match="a streamer follows one row; the batch has 3"):
        gated(model, batch, partial(gated_generate, streamer=recorder))


def test_a_dict_is_returned_on_request(model, batch):
    out = gated(model, batch, return_dict_in_generate=True)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert out.sequences.tolist() == gated(model, batch).tolist()
    assert gated(model, batch, num_return_sequences=1).tolist() == out.sequences.tolist()


def filled(model):
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[1, 2]]), **{cache_argument(model): cache})
    return cache


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 2}, "beam_search can't be gated"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper .* temperature, top_k and top_p"),
        ({"logits_processor": [MinPLogitsWarper(0.1)]}, "MinPLogitsWarper"),
        ({"guidance_scale": 2.0}, "second forward"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "PrefixConstrainedLogitsProcessor .* by itself"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores=True is not supported"),
        ({"attention_mask": torch.tensor([[1] * 9, [1] * 8 + [0], [1] * 9])}, "row 1 .* padded on the left"),
        ({"fallback": "none"}, "fallback='none'"),
        ({"min_candidates": 0}, "min_candidates=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_gating_does_not_do_is_refused_by_name(model, batch, settings, said):
    with pytest.raises(ConfigError, match=said):
        gated(model, {**batch, **{k: settings[k] for k in ("attention_mask",) if k in settings}},
              **{k: v for k, v in settings.items() if k != "attention_mask"})  # fmt: skip


def test_a_filled_cache_is_refused(model, batch):
    name = cache_argument(model)
    with pytest.raises(ConfigError, match=f"{name} is a filled cache"):
        gated(model, {"input_ids": batch["input_ids"][:1], name: filled(model)})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_an_empty_cache_is_taken_under_the_new_name_and_the_old(model, batch, name):
    def generate(model, *args, **kwargs):
        kwargs.pop("cache", kwargs.pop("past_key_values", None))
        return gated_generate(model, *args, **{name: DynamicCache(config=model.config)}, **kwargs)

    assert gated(model, batch, generate).tolist() == plain(model, batch).tolist()


def test_a_model_that_was_gated_is_copied_as_before(batch):
    model = tiny_model()
    want = gated(model, batch).tolist()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert gated(twin, batch).tolist() == want


def test_a_model_first_used_by_several_threads_gives_each_its_own_tokens(batch):
    model, head = tiny_model(), random_head(32)
    with ThreadPoolExecutor(4) as pool:
        replies = list(
            pool.map(lambda strength: gated(model, batch, head=head if strength else None).tolist(), (0, 1) * 4)
        )
    assert replies == [gated(model, batch).tolist(), gated(model, batch, head=head).tolist()] * 4


def test_it_runs_beside_an_engine_on_the_same_model(batch):
    model, head = tiny_model(), random_head(32)
    engine = MARAEngine((model, tiny_tokenizer()), head, max_new_tokens=60)
    alone = engine.generate("hello", raw=True).token_ids, gated(model, batch).tolist()
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(lambda: [gated(model, batch).tolist() for _ in range(6)])
        theirs = pool.submit(lambda: [engine.generate("hello", raw=True).token_ids for _ in range(6)])
    assert (theirs.result(), ours.result()) == ([alone[0]] * 6, [alone[1]] * 6)


def test_calls_from_several_threads_take_turns(model, batch):
    want = gated(model, batch, head=random_head(32)).tolist()
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: gated(model, batch, head=random_head(32)).tolist(), range(8)))
    assert replies == [want] * 8


def test_changed_weights_are_noticed(batch):
    model = tiny_model()
    before = gated(model, batch).tolist()
    assert gated(model, batch).tolist() == before
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight.flip(0))
    assert gated(model, batch).tolist() == plain(model, batch).tolist() != before
    model.set_attn_implementation("eager")
    assert gated(model, batch).tolist() == plain(model, batch).tolist()
