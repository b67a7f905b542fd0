"""COCO's instances (Lin et al., ECCV 2014): every annotated object of an image, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fromage.checks import check_whole
from fromage.octopus.boxes import reading_order
from fromage.octopus.examples import Example
from fromage.octopus.sources.instances import Instances
from fromage.octopus.sources.references import held_out


class CocoObjects(Instances):
    """COCO's instances: one example per image; the answer points at every object, and says nothing else.

    With its one instruction it makes Octopus a class-agnostic detector (section 3.2). Images without an object are left out.
    """

    def __init__(
        self,
        instances: str,
        images: str,
        *,
        instruction: str = "Detect all objects.",
        max_objects: int | None = None,
        apart_from: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        """Set the files; nothing is read yet.

        Args:
            instances: instances_train2014.json or the like.
            images: folder of the images that it names.
            instruction: what is asked of every image.
            max_objects: images with more objects are left out; null for none. A model points at num_queries at most.
            apart_from: files of references, such as refs(unc).p; images of their splits other than train are left out.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(Path(instances), instances, images, limit)
        if max_objects is not None:
            check_whole("max_objects", max_objects, 1)
        self.instruction, self.max_objects, self.apart_from = instruction, max_objects, tuple(apart_from)

    def read(self) -> Iterator[Example]:
        """One example per image; its boxes are in reading order."""
        for number, image in self.annotated(self.content(), held_out=held_out(self.apart_from)).items():
            if not image.boxes:
                self.drop("images without an object")
            elif self.max_objects is not None and len(image.boxes) > self.max_objects:
                self.drop(f"images of more than {self.max_objects} objects")
            else:
                answer = tuple(reading_order(image.boxes))
                yield Example(str(number), image.path, self.instruction, answer, image.boxes)
