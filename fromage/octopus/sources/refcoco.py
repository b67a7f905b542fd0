"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al., ECCV 2016; Mao et al., CVPR 2016): references in pickles, boxes of COCO."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fromage.data.annotations import TEXT, WHOLE, Schema
from fromage.errors import UserError, reason
from fromage.octopus.examples import Example
from fromage.octopus.segments import Mask, OddMask, read_mask
from fromage.octopus.sources.file_source import HELD_OUT, LOST_ANSWERS, NO_MASK, ODD_MASK, check_question
from fromage.octopus.sources.instances import AnnotatedImage, Instances
from fromage.octopus.sources.references import held_out, read_refs

CATEGORY: Schema = {"id": WHOLE}  # of instances.json
EXPRESSION: Schema = {"sent": TEXT, "sent_id": WHOLE}
NUMBERS = dict.fromkeys(("ref_id", "image_id", "category_id", "ann_id"), WHOLE)
REFERENCE: Schema = {**NUMBERS, "split": TEXT, "sentences": [EXPRESSION]}


class RefCOCO(Instances):
    """RefCOCO, RefCOCO+ and RefCOCOg: one example per referring expression; known boxes are the image's instances.

    Where masks are read (fromage.octopus.sources.file_source.with_masks), each example has that of its object.
    """

    def __init__(
        self,
        refs: str,
        instances: str,
        images: str,
        *,
        split: str = "train",
        question: str = "where is {}?",
        match: str | None = None,
        apart_from: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        """Set the files; nothing is read yet. Raises UserError for an invalid question or pattern.

        Args:
            refs: refs(unc).p, refs(google).p or refs(umd).p.
            instances: instances.json of the same data set.
            images: folder of the images that instances.json names, COCO's train2014.
            split: train, val and, depending on the file, testA, testB or test.
            question: the instruction; {} stands for the expression.
            match: regular expression; only expressions that contain it are used; null for all.
            apart_from: files of references, such as refs(unc).p of the other data sets, which split the same images of COCO
                in other ways; images of their splits other than train are left out.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(Path(refs), instances, images, limit)
        self.split, self.question, self.apart_from = split, check_question(question), tuple(apart_from)
        try:
            self.match = re.compile(match or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"match {match!r}: is no regular expression ({reason(error)}); correct it") from error

    def read(self) -> Iterator[Example]:
        """One example per sentence; its answer is the box alone."""
        refs, barred, content = self._refs(), held_out(self.apart_from), self.content()
        self.drop(HELD_OUT, len({ref["image_id"] for ref in refs} & barred))
        refs = [ref for ref in refs if ref["image_id"] not in barred]
        listed = self.fitting(self.instances, "categories", content.get("categories"), CATEGORY)
        categories = {category["id"] for category in listed}
        images = self.annotated(content, {ref["image_id"] for ref in refs})
        for ref in refs:
            self.seen += 1
            if what := self._foreign(ref, images, categories):
                self.odd.append(what)
            else:
                yield from self._examples(ref, images[ref["image_id"]])

    def _refs(self) -> list[dict[str, Any]]:
        refs = self.fitting(self.file, "references", read_refs(self.file), REFERENCE)
        splits = sorted({ref["split"] for ref in refs})
        if self.split not in splits:
            raise UserError(f"{self.file}: has no split {self.split}; there are {', '.join(splits)}")
        return [ref for ref in refs if ref["split"] == self.split]

    def _foreign(self, ref: dict[str, Any], images: dict[int, AnnotatedImage], categories: set[int]) -> str:
        """What of a reference instances.json does not hold, for messages; '' where it holds all."""
        if ref["image_id"] not in images:
            what = f"image {ref['image_id']}"
        elif ref["category_id"] not in categories:
            what = f"category {ref['category_id']}"
        elif ref["ann_id"] not in images[ref["image_id"]].numbers:
            what = f"annotation {ref['ann_id']} of image {ref['image_id']}"
        else:
            return ""
        return (
            f"reference {ref['ref_id']} is of {what}, which {self.instances} does not hold: is it the one that came with it?"
        )

    def _examples(self, ref: dict[str, Any], image: AnnotatedImage) -> Iterator[Example]:
        masks: tuple[Mask, ...] = ()
        if self.masks and (segmentation := image.segments.get(ref["ann_id"])) is None:
            self.drop(NO_MASK)
        elif self.masks:
            try:
                masks = (read_mask(segmentation, *image.size),)
            except OddMask:
                self.drop(ODD_MASK)
        yield from self._sentences(ref, image, masks)

    def _sentences(self, ref: dict[str, Any], image: AnnotatedImage, masks: tuple[Mask, ...]) -> Iterator[Example]:
        number = image.numbers[ref["ann_id"]]
        for said in ref["sentences"]:
            if number is None:
                self.drop(LOST_ANSWERS)
            elif not (text := said["sent"].strip()):
                self.drop("expressions without words")
            elif not self.match.search(text):
                self.drop("expressions that do not match")
            else:
                key = f"{ref['ref_id']}.{said['sent_id']}"
                yield Example(key, image.path, self.question.replace("{}", text), (number,), image.boxes, masks=masks)
