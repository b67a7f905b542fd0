"""The template: the text around image, instruction and object queries in a prompt of Octopus.

A template is a text with slots, such as "{start}USER: {image}\\n{instruction}{queries} ASSISTANT:"; {start} is the language
model's start token. Its parts are the slots and the texts between them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fromage.errors import UserError
from fromage.models.prompts import START, ImageInput, Part, joined

SLOTS = re.compile(r"(\{\w+\})")


def parts_of(template: str) -> list[str]:
    """The slots of a template and the texts between them, in order; {picture} is read as {image}, as in version 0.1."""
    return [part for part in SLOTS.split(template.replace("{picture}", "{image}")) if part]


def check_template(template: Sequence[str]) -> None:
    """Raise UserError unless image, instruction and queries stand in it once each."""
    named = sorted(part for part in template if SLOTS.match(part) and part != "{start}")
    if named != ["{image}", "{instruction}", "{queries}"]:
        raise UserError(f"model.template {''.join(template)!r}: name {{image}}, {{instruction}} and {{queries}} once each")


def fill_template(
    template: Sequence[str], image: ImageInput | None, instruction: str, queries: Sequence[Part]
) -> list[Part]:
    """The parts of a template -> a prompt; with START in front where it names none. queries: the object queries' tokens."""
    return _fill(([] if "{start}" in template else ["{start}"]) + list(template), image, instruction, queries)


def fill_further_turn(template: Sequence[str], instruction: str, queries: Sequence[Part]) -> list[Part]:
    """The prompt of a later turn: as fill_template, without the image, the white space after it, and START before it.

    Of "{start}USER: {image}\\n{instruction} ASSISTANT:" that is "USER: {instruction} ASSISTANT:", as LLaVA has it.
    """
    place = template.index("{image}")
    before, after = [part for part in template[:place] if part != "{start}"], list(template[place + 1 :])
    if after and not SLOTS.match(after[0]):
        after[0] = after[0].lstrip()
    return _fill([*before, *after], None, instruction, queries)


def _fill(template: Sequence[str], image: ImageInput | None, instruction: str, queries: Sequence[Part]) -> list[Part]:
    slots: dict[str, Sequence[Part]] = {"{image}": [] if image is None else [image], "{instruction}": [instruction]}
    slots |= {"{start}": [START], "{queries}": queries}
    return joined([part for slot in template for part in slots.get(slot, [slot])])


def image_first(template: Sequence[str]) -> bool:
    """Whether instruction and queries stand after the image, so that prompts can share it."""
    return all(template.index("{image}") < template.index(slot) for slot in ("{instruction}", "{queries}"))
