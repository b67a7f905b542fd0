"""An instances.json of one image."""

import pytest
from source_files import write


@pytest.fixture
def one(tmp_path):
    """An image of 200 x 100 pixels with the boxes given: the file of instances, and the notes."""

    def make(*boxes, crowds=()):
        notes = [{"id": n, "image_id": 7, "category_id": 1, "bbox": list(b), "iscrowd": 0} for n, b in enumerate(boxes)]
        for n in crowds:
            notes[n]["iscrowd"] = 1
        images = [{"id": 7, "file_name": "seven.jpg", "width": 200, "height": 100}]
        content = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "thing"}]}
        return write(tmp_path / "instances.json", content), notes

    return make
