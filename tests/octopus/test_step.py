"""The training step: prompts that share their image give the losses and gradients of prompts on their own."""

from dataclasses import replace

import pytest
import torch
from tiny_octopus import FAMILIES, build

from fromage.models.packed_attention import MaskedAttention
from fromage.octopus.collate import Collate
from fromage.octopus.examples import Example, conversations, rows_of
from fromage.octopus.segments import read_mask
from fromage.octopus.step import octopus_step, read_prompts
from fromage.training.layers import checkpoint_blocks

BOXES = ((0.1, 0.1, 0.4, 0.5), (0.5, 0.2, 0.9, 0.6), (0.2, 0.6, 0.5, 0.9))


def example(key, answer, asked="where is the star?", image="a.jpg", dialogue=""):
    return Example(key, image, asked, answer, BOXES, dialogue)


ALONE = [
    example("1", (0,)),
    example("2", ("a star ", 1, " and a ring ", 2), "describe the image"),
    example("3", ("no",), "is there a moon?"),
    example("4", (2,), image="b.jpg"),
    example("5", ("two",), "how many are there?", "b.jpg"),
]
TALK = [
    example("1", ("a red star",), "what is there?", dialogue="x"),
    example("2", ("two of them",), "how many rings are there?", dialogue="x"),
    example("3", (1, 2), "where are they?", dialogue="x"),
]


def patches(rows):
    return [torch.randn(4, 20, generator=torch.Generator().manual_seed(len(row[0][0].image))) for row in rows]


def step(model, rows, ask=True):
    """Losses, and gradients of all parameters."""
    model.lm.hf.requires_grad_(True)
    model.zero_grad()
    batch = Collate(model, stored=True, ask=ask)(list(zip(rows, patches(rows), strict=True)))
    out = octopus_step(model, batch)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return batch, out, grads


def test_conversations_keep_their_turns_together_and_end_behind_an_answer_with_boxes():
    more = example("4", ("yes",), "are they red?", dialogue="x")
    other = example("5", ("no",), "are they red?", image="b.jpg", dialogue="x")
    found = [[turn.key for turn in turns] for turns in conversations([*ALONE[:2], *TALK, more, other])]
    assert found == [["1"], ["2"], ["1", "2", "3"], ["4"], ["5"]]
    assert list(conversations([])) == []


def test_rows_hold_conversations_about_one_image_each_once():
    examples = [example(str(number), (0,), image=f"{number % 3}.jpg") for number in range(20)]
    rows = rows_of(examples, 4, 0)
    assert sorted(turn.key for row in rows for turns in row for turn in turns) == sorted(e.key for e in examples)
    assert all(len({turn.image for turns in row for turn in turns}) == 1 for row in rows)
    assert sorted(map(len, rows)) == [3, 3, 3, 3, 4, 4]
    assert rows == rows_of(examples, 4, 0) != rows_of(examples, 4, 1)
    assert [len(row) for row in rows_of(examples, 1, 0)] == [1] * 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ask", [True, False])
def test_examples_that_share_their_image_have_the_gradients_of_examples_on_their_own(family, ask):
    model = build(family)
    examples = ALONE if ask else [one for one in ALONE if not one.meant]
    together = rows_of(examples, 8, 0)
    alone = [[turns] for row in together for turns in row]
    (batch, out, grads), (_, one_by_one, wanted) = step(model, together, ask), step(model, alone, ask)
    assert len(batch.prompts.lengths) == 2 and batch.keys == [turns[0].key for row in together for turns in row]
    torch.testing.assert_close(out.answer_loss, one_by_one.answer_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.detection_loss, one_by_one.detection_loss, rtol=1e-5, atol=1e-6)
    assert (out.detection_loss > 0) == ask
    assert grads.keys() == wanted.keys()
    largest = max(grad.abs().max() for grad in wanted.values())
    for name, grad in grads.items():
        assert (grad - wanted[name]).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_masks_of_examples_that_share_their_image_have_the_gradients_of_examples_on_their_own(family):
    model = build(family, mask_scale=4)
    outlines = [[10 * i, 2, 10 * i + 20, 2, 10 * i + 9, 30 + i] for i in range(3)]
    masks = [read_mask([outline], 60, 40) for outline in outlines]
    known = {"1": (masks[0],), "2": (None, masks[1]), "4": (masks[2],)}  # of four objects three; 3 and 5 point at none
    examples = [replace(one, masks=known.get(one.key, ())) for one in ALONE]
    together = rows_of(examples, 8, 0)
    alone = [[turns] for row in together for turns in row]
    (batch, out, grads), (_, one_by_one, wanted) = step(model, together), step(model, alone)
    assert batch.objects.masks.shape == (3, 8, 8) and batch.objects.masked.shape == (2, 3)
    assert {batch.keys[row]: place for row, place in batch.objects.masked.T.tolist()} == {"1": 0, "2": 1, "4": 0}
    torch.testing.assert_close(out.detection_loss, one_by_one.detection_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.parts["mask"], one_by_one.parts["mask"], rtol=1e-5, atol=1e-6)
    assert grads.keys() == wanted.keys() and any("recognizer.masks" in name for name in grads)
    largest = max(grad.abs().max() for grad in wanted.values())
    for name, grad in grads.items():
        assert (grad - wanted[name]).abs().max() < 1e-4 * largest, name


def test_devices_with_other_numbers_of_targets_objects_and_masks_have_the_mean_of_all(monkeypatch):
    model, masks = build(mask_scale=4), [read_mask([[10 * i, 2, 10 * i + 20, 2, 10 * i + 9, 30]], 60, 40) for i in range(2)]
    examples = [replace(ALONE[0], masks=(masks[0],)), replace(ALONE[1], masks=tuple(masks)), *ALONE[2:]]
    rows = rows_of(examples, 8, 0)
    _, whole, wanted = step(model, rows)

    def run(row, weight):
        for module in ("step", "matching"):
            monkeypatch.setattr(f"fromage.octopus.{module}.device_weight", lambda count, device: weight(count))
        return step(model, [row])[1:]

    counts = [[], []]
    for device, row in zip(counts, rows, strict=True):
        run(row, lambda count, device=device: device.append(count) or 1.0)
    totals = list(map(sum, zip(*counts, strict=True)))
    assert len(totals) == 3 and all(here != there for here, there in zip(*counts, strict=True))
    left = [iter(totals), iter(totals)]
    found = [run(row, lambda count, left=left: 2 * count / next(left)) for row, left in zip(rows, left, strict=True)]
    (one, ours), (other, theirs) = found
    torch.testing.assert_close((one.answer_loss + other.answer_loss) / 2, whole.answer_loss)
    torch.testing.assert_close((one.detection_loss + other.detection_loss) / 2, whole.detection_loss)
    largest = max(grad.abs().max() for grad in wanted.values())
    for name, grad in wanted.items():
        assert ((ours[name] + theirs[name]) / 2 - grad).abs().max() < 1e-4 * largest, name


def test_masks_are_asked_for_by_a_model_that_has_them_alone():
    examples = [replace(ALONE[0], masks=(read_mask([[1, 2, 20, 2, 9, 30]], 60, 40),))]
    batch, out, _ = step(build(), [[examples]])
    assert batch.objects.masks is None and out.parts.keys() == {"score", "l1", "giou"}
    _, nothing, grads = step(build(mask_scale=4), [[[ALONE[0]]]])
    assert float(nothing.parts["mask"].detach()) == float(nothing.parts["dice"].detach()) == 0
    heads = [grad for name, grad in grads.items() if "recognizer.masks" in name]
    assert heads and not any(grad.any() for grad in heads), "a zero gradient, since DDP waits for one"


def test_a_sliding_window_counts_positions_and_not_places_of_the_row():
    kind, sizes = FAMILIES["mistral"]
    model = build((kind, sizes | {"sliding_window": 6}))
    together, alone = [[[ALONE[0]], [ALONE[2]]]], [[[ALONE[0]]], [[ALONE[2]]]]
    (_, out, grads), (_, single, wanted) = step(model, together), step(model, alone)
    torch.testing.assert_close(out.answer_loss, single.answer_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads["queries"], wanted["queries"], rtol=1e-4, atol=1e-6)
    wide = build("mistral")
    assert (step(wide, alone)[1].answer_loss - single.answer_loss).abs() > 1e-3, "it matters"


def test_a_step_keeps_one_mask_for_all_layers_and_no_keys_of_its_last_pass(monkeypatch):
    made = []
    monkeypatch.setattr(
        "fromage.octopus.model.MaskedAttention",
        lambda *args, **named: made.append(MaskedAttention(*args, **named)) or made[-1],
    )
    step(build("gemma2, eager"), rows_of(ALONE, 8, 0))
    prompts, answers = made
    assert len(prompts._masks) == len(answers._masks) == 2, "with and without a window"
    assert prompts.kept.keys() == {0, 1, 2, 3} and not answers.kept


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_run_again_in_the_backward_give_the_same_gradients(family):
    rows = rows_of(ALONE, 8, 0)
    (_, out, grads), model = step(build(family), rows), build(family)
    runs = []
    for block in model.lm.blocks:
        block.register_forward_hook(lambda *_: runs.append("forward"))
        attention = getattr(block, "attention" if family == "pythia" else "self_attn")
        attention.register_forward_hook(lambda *_: runs.append("attention"))
    checkpoint_blocks(model.lm)
    _, again, same = step(model, rows)
    assert (runs.count("forward"), runs.count("attention")) == (8, 16)  # of four layers: prompts, answers, and both again
    torch.testing.assert_close(again.loss, out.loss, rtol=0, atol=0)
    assert grads.keys() == same.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_turn_sees_those_before_it_and_each_answer_has_its_loss():
    model = build()
    batch, out, _ = step(model, [[TALK]])
    assert batch.keys == ["1", "2", "3"]
    # the same turns, each as the last of its conversation
    counts, losses = [], []
    for turn in range(3):
        part, alone, _ = step(model, [[TALK[: turn + 1]]])
        counts.append(len(part.answers))
        losses.append(float(alone.answer_loss) * counts[-1])
    assert counts[0] < counts[1] < counts[2] == len(batch.answers)
    first = [step(model, [[[turn]]])[1].answer_loss for turn in TALK]
    own = counts[0], counts[1] - counts[0]
    assert abs(losses[0] - float(first[0]) * own[0]) < 1e-3  # nothing stands before the first
    assert abs(losses[1] - losses[0] - float(first[1]) * own[1]) > 1e-2  # the second reads the first
    assert abs(float(out.answer_loss) * counts[2] - losses[2]) < 1e-3


def test_an_earlier_turn_does_not_depend_on_later_ones():
    model = build("llama")
    early, late = (step(model, [[turns]])[0] for turns in (TALK[:2], [TALK[0], example("9", ("no",), "why?", dialogue="x")]))
    hidden = []
    for batch in (early, late):
        prefill = read_prompts(model, batch, batch.patches)
        hidden.append(prefill.states[batch.at[batch.owners == 0]])
        assert len(prefill.found.boxes[-1]) == 2  # queries of each turn
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)


def test_later_turns_have_the_template_without_image_and_start():
    model = build("llama", template="{start}USER: {image}\n{instruction}{queries} ASSISTANT:")
    batch = Collate(model, stored=True, ask=True)(list(zip([[TALK]], patches([[TALK]]), strict=True)))
    shown = model.tokenizer.decode([i for i in batch.prompts.ids.tolist() if i != model.tokenizer.image_id])
    assert shown.count("USER: ") == 3 and shown.count("ASSISTANT:") == 3
    for turn in TALK[1:]:
        assert f"USER: {turn.instruction}" in shown, "no line break, which is the image's"
    assert batch.prompts.ids.tolist().count(model.tokenizer.bos_id) == 3, "at the beginning, and as </s> of two answers"


def test_a_conversation_is_cut_behind_the_last_turn_that_has_positions():
    model = build()
    collate = Collate(model, stored=True, ask=True)
    ends = [len(laid.prompts.ids) + len(laid.fed.ids) for laid in (collate._lay([TALK[:n]]) for n in (1, 2, 3))]
    for longest, turns in ((ends[0] - 1, 0), (ends[0], 1), (ends[1] - 1, 1), (ends[1], 2), (ends[2], 3), (10**6, 3)):
        assert collate.fitting(TALK, longest) == TALK[:turns]
