"""The language model in two halves: who sees whom, what is relayed, and that the cache changes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_octopus import FAMILIES, OWN, NoTower, build

from fromage.config import OctopusConfig
from fromage.data.padding import pad
from fromage.errors import UserError
from fromage.models.packed_attention import additive
from fromage.models.packed_layout import PackedLayout
from fromage.models.prompts import START, Starts, Token, embed_prompts, prompt_ids, started
from fromage.octopus.branches import Known, among, query_places
from fromage.octopus.decoding import ground, read_batch
from fromage.octopus.model import Octopus
from fromage.octopus.template import fill_template, parts_of
from fromage.training.configs import find_config

ASKED = ["where is the red star?", "where are the rings by the small blue moon?", "star"]


def embedded(model, asked=ASKED):
    torch.manual_seed(1)
    prompts = embed_prompts(model, [model.prompt(torch.randn(4, 20), text) for text in asked])
    return prompts, prompts.features[[rows[-1] for rows in prompts.image_rows]]


def read(model, asked=ASKED):
    prompts, patches = embedded(model, asked)
    return read_batch(model, prompts, patches)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_prompt_of_full_size_has_one_start_token_at_its_front(stage):
    options = yaml.safe_load(Path(find_config(f"octopus_stage{stage}.yaml")).read_text())["model"]["init_args"]
    for template in (options["template"], options["template"].removeprefix("{start}")):
        parts = fill_template(parts_of(template), torch.zeros(4, 20), "where is the cat?", [Token(9)])
        parts = [part for part in started(parts, Starts.EACH) if part != ""]
        assert [i for i, part in enumerate(parts) if part is START] == [0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_reads_as_single_prompts_do(family):
    model = build(family)
    prompts, patches = embedded(model)
    together = read_batch(model, prompts, patches)
    for row, length in enumerate(prompts.mask.sum(1)):
        ids, mask, embeds = (x[row : row + 1, -length:] for x in (prompts.ids, prompts.mask, prompts.embeds))
        single = read_batch(model, replace(prompts, ids=ids, mask=mask, embeds=embeds), patches[row : row + 1])
        for name in ("boxes", "logits"):
            torch.testing.assert_close(getattr(together.found, name)[:, row], getattr(single.found, name)[:, 0])
        torch.testing.assert_close(together.hidden[row], single.hidden[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_behind_a_reading_are_those_of_one_pass_over_all(family):
    model = build(family)
    prompts, patches = embedded(model)
    answers = torch.tensor([[5, 9, model.tokenizer.trained_ids[1]], [model.tokenizer.trained_ids[0], 7, 8], [3, 4, 5]])
    prefill = read_batch(model, prompts, patches)
    first, rest = prefill.hidden, [model.next_token(prefill, some) for some in answers.T]  # (B, d) each
    lengths = prompts.mask.sum(1).tolist()
    ids = [torch.cat([row[-n:], more]) for row, more, n in zip(prompts.ids, answers, lengths, strict=True)]
    rows = zip(prompts.embeds, model.embed(answers), lengths, strict=True)
    embeds = [torch.cat([row[-n:], more]) for row, more, n in rows]
    layout = PackedLayout([len(row) for row in ids], model.device)
    queries = query_places(model.is_query(torch.cat(ids)), model.num_queries)
    whole = model.read(layout, torch.cat(embeds), patches, queries, torch.arange(3)).states.split(layout.lengths)
    for row, states in enumerate(whole):
        found = torch.stack([first[row], *(some[row] for some in rest)])
        torch.testing.assert_close(found, states[-4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_read_as_by_the_language_models_own_attention(family):
    """Hugging Face's attention, with a mask of our own, gives the same states as ours over rows without padding."""
    model = build(family)
    prompts, patches = embedded(model)
    prefill = read_batch(model, prompts, patches)
    queries, T = model.is_query(prompts.ids), prompts.ids.shape[1]
    later = torch.ones(T, T, dtype=torch.bool).tril() | queries.unsqueeze(1) & queries.unsqueeze(2)  # (B, T, T)
    sees = (later & prompts.mask.unsqueeze(1) | torch.eye(T, dtype=torch.bool)).unsqueeze(1)
    places = prompts.mask.cumsum(1) - 1
    at = queries.flatten().nonzero().view(-1, model.num_queries)

    def between(block, args):
        rows = model.recognizer(args[0].flatten(0, 1)[at], patches, torch.arange(3)).relay + model.index_tokens.input
        return args[0].flatten(0, 1).index_copy(0, at.flatten(), rows.flatten(0, 1)).view_as(args[0]), *args[1:]

    handle = model._above.register_forward_pre_hook(between)
    named = {"attention_mask": additive(sees, torch.float32), "position_ids": places.clamp(min=0), "use_cache": False}
    whole = model.lm.hf.base_model(inputs_embeds=prompts.embeds, **named).last_hidden_state
    handle.remove()
    torch.testing.assert_close(prefill.states, whole[prompts.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OWN.values(), ids=OWN)
def test_a_family_with_an_attention_of_its_own_is_refused(family):
    with pytest.raises(UserError, match="has an attention of its own"):
        read(build(family))


def seen(layout, places=(), num_queries=2):
    """(B, T, T) 0 and 1: which token sees which, the queries at `places`."""
    is_query = torch.zeros(len(layout.positions), dtype=torch.bool)
    is_query[list(places)] = True
    known = Known.of(layout)
    return (among(known.distances_to(known), query_places(is_query, num_queries), layout) >= 0).int()


def test_queries_see_each_other_both_ways_and_nothing_sees_what_comes_later():
    layout = PackedLayout([5, 2], torch.device("cpu"))
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    long, short = seen(layout, [2, 3])
    assert long.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],  # queries
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert short[:2].tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert short.any(1).all(), "padding sees something: no NaN"


def test_a_branch_sees_the_shared_part_and_itself():
    branch, positions = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 3, 2, 3])
    layout = PackedLayout([6], torch.device("cpu"), positions, branch)
    assert seen(layout, [2, 3, 4, 5])[0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],  # two queries of the first branch
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],  # and of the second
        [1, 1, 0, 0, 1, 1],
    ]
    known = Known.of(
        PackedLayout([5, 1], torch.device("cpu"), torch.tensor([0, 1, 2, 1, 2, 0]), torch.tensor([0, 1, 1, 2, 2, 0]))
    )
    new = Known.of(PackedLayout([2, 0], torch.device("cpu"), torch.tensor([3, 3]), torch.tensor([2, 1])))
    assert known.distances_to(new)[0].tolist() == [[3, -1, -1, 2, 1], [3, 2, 1, -1, -1]]
    assert (known.distances_to(new)[1] >= 0).any(1).all(), "padding sees something: no NaN"
    last = known.next()
    assert (last.positions.tolist(), last.branches.tolist()) == ([3, 1], [2, 0])


def test_the_queries_hidden_states_depend_on_the_last_one_and_the_words_do_not():
    model = build("llama")
    prompts, patches = embedded(model, ASKED[:1])
    prompts.embeds.requires_grad_()
    states = {}
    block = model.lm.blocks[model.split_layer - 1]
    handle = block.register_forward_hook(
        lambda *call: states.update(hidden=call[2][0] if isinstance(call[2], tuple) else call[2])
    )
    read_batch(model, prompts, patches)
    handle.remove()
    at = model.is_query(prompts.ids)[0].nonzero().flatten().tolist()
    hidden = states["hidden"].view(1, prompts.ids.shape[1], -1)
    from_first = torch.autograd.grad(hidden[0, at[0]].sum(), prompts.embeds, retain_graph=True)[0][0]
    from_word = torch.autograd.grad(hidden[0, at[0] - 1].sum(), prompts.embeds)[0][0]
    assert from_first[at[-1]].abs().sum() > 0 and from_first[at[-1] + 1 :].abs().sum() == 0
    assert from_word[at[0] :].abs().sum() == 0 and from_word[: at[0]].abs().sum() > 0


@pytest.mark.parametrize("relay", [True, False])
def test_hidden_states_learn_of_what_was_recognised_by_the_relay_alone(relay):
    model = build(relay=relay)
    (read(model).hidden * torch.randn(32)).sum().backward()
    grads = [p.grad for p in model.recognizer.parameters() if p.grad is not None]
    assert bool(grads) == relay
    assert model.index_tokens.input.grad.abs().sum() > 0  # the names of the queries, either way


def test_what_is_recognised_depends_on_instruction_and_image():
    model = build()
    boxes = read(model, ["where is the red star?", "where is the blue star?"]).found.boxes[-1]
    assert not torch.allclose(boxes[0], boxes[1])
    same = embed_prompts(model, [model.prompt(torch.ones(4, 20), "star")] * 2)
    boxes = read_batch(model, same, torch.stack([torch.ones(4, 20), torch.randn(4, 20)])).found.boxes[-1]
    assert not torch.allclose(boxes[0], boxes[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_index_token_is_a_word_like_any_other(dtype):
    model = build("llama")
    model.lm.hf.to(dtype)
    prompts, patches = embedded(model)
    prefill = read_batch(model, prompts, patches.to(dtype))
    logits = model.logits(prefill.hidden.unsqueeze(1), prefill)[:, 0]  # (B, V + 2 + N)
    rows = model.index_tokens.output.to(dtype)  # (N, d)
    want = (prefill.hidden @ rows.T).float()
    torch.testing.assert_close(logits[:, -3:], want)
    assert logits.dtype == torch.float32


def test_a_language_model_with_a_projection_before_its_layers_is_refused():
    lm = build().lm
    lm.hf.config.hidden_size = 48
    with pytest.raises(UserError, match="48 wide and its embeddings 32"):
        Octopus(lm, NoTower(), OctopusConfig(num_queries=3))


def test_the_sequence_is_image_instruction_queries_answer():
    model = build()
    ids = prompt_ids(model, model.prompt(torch.ones(4, 20), "star"))
    added = model.tokenizer.added
    assert ids == [*[added["<|image|>"]] * 4, *model.tokenizer.encode("star"), *[added["<|query|>"]] * 3, 2]
    assert prompt_ids(model, model.prompt(torch.ones(4, 20), "star", ask=False))[-2] != added["<|query|>"]
    vicuna = build(template="USER: {image}\n{instruction}{queries} ASSISTANT:")
    ids = prompt_ids(vicuna, vicuna.prompt(torch.ones(4, 20), "star"))
    assert ids[0] == 2 and vicuna.tokenizer.decode(ids) == "USER: \nstar ASSISTANT:"


def test_greedy_answers_do_not_depend_on_the_batch():
    model = build("qwen2")
    asked = [(torch.randn(4, 20), text) for text in ASKED]
    together = ground(model, asked, 6)
    assert [answer.text for answer in together] == [ground(model, [pair], 6)[0].text for pair in asked]
    assert all(len(answer.candidates) == 3 for answer in together)


def test_without_queries_nothing_is_pointed_at():
    model = build(num_queries=0)
    answer = ground(model, [(torch.randn(4, 20), "star")], 5)[0]
    assert answer.candidates == [] and answer.queries == [] and not hasattr(model, "recognizer")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"split_layer": 0}, "choose 1"),
        ({"split_layer": 4}, "choose 1"),
        ({"template": "{image}{instruction}"}, "once each"),
        ({"template": "{image}{instruction}{queries}{queries}"}, "once each"),
        ({"decoder_width": 12}, "multiple of 8"),
        ({"decoder_width": 16, "heads": 3}, "of heads"),
        ({"decoder_layers": 0}, "decoder_layers is 0; .* from 1 on"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        build(**options)


def test_an_answer_has_a_token_at_least():
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        ground(build(), [(torch.ones(4, 20), "star")], 0)


def test_a_prompt_beyond_the_language_models_positions_is_refused():
    with pytest.raises(UserError, match="128 of the language model"):
        ground(build(), [(torch.ones(4, 20), "star " * 150)])


def test_left_padding():
    ids, mask = pad([[5], [6, 7]], 1, "left")
    assert ids.tolist() == [[1, 5], [6, 7]] and mask.tolist() == [[False, True], [True, True]]


def test_there_is_nothing_to_point_at_where_nothing_was_recognised():
    model = build()
    prefill = read(model)
    hidden = prefill.hidden.detach().unsqueeze(1)  # (B, 1, d)
    logits, plain = model.logits(hidden, prefill), model.lm.logits(hidden)
    first = model.tokenizer.trained_ids[0]
    torch.testing.assert_close(logits[..., :first], plain[..., :first])
    unasked = replace(prefill, found=None)
    assert (model.logits(hidden, unasked)[..., first:] == -torch.inf).all()
    without = build(num_queries=0)
    torch.testing.assert_close(without.logits(hidden, unasked), without.lm.logits(hidden))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_queries_begin_where_a_sentence_ends_and_differ(family):
    model = build(family)
    rows = model.lm.hf.get_input_embeddings().frozen.weight
    apart = torch.cdist(model.queries.detach(), rows.float())  # (N, V)
    assert set(apart.argmin(1).tolist()) == {model.tokenizer.encode(".")[-1]}
    assert torch.pdist(model.queries.detach()).min() > 0
