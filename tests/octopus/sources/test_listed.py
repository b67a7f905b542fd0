"""What all readers have in common."""

import pytest
from jsonargparse import ArgumentParser

from fromage.errors import UserError
from fromage.octopus.examples import Source


@pytest.mark.parametrize("package", ["fromage.octopus", "fromage.octopus.sources"])
def test_configurations_build_them_without_reading(tmp_path, package):
    parser = ArgumentParser()
    parser.add_argument("--train", type=list[Source])
    gone = str(tmp_path / "gone")
    named = {
        "RefCOCO": {"refs": gone, "instances": gone, "images": gone, "split": "testA"},
        "CocoObjects": {"instances": gone, "images": gone, "max_objects": 64, "apart_from": [gone]},
        "Flickr30kEntities": {"folder": gone, "images": gone},
        "Flickr30kSpotting": {"folder": gone, "images": gone, "instruction": "Describe."},
        "VisualGenome": {"file": gone, "image_data": gone, "images": gone, "per_image": 10, "apart_from": [gone]},
        "Instructions": {"file": gone, "images": gone, "padded": True},
        "Pope": {"file": gone, "images": gone, "limit": 5},
    }
    listed = [{"class_path": f"{package}.{name}", "init_args": args} for name, args in named.items()]
    made = parser.instantiate_classes(parser.parse_object({"train": listed})).train
    assert [type(source).__name__ for source in made] == list(named)
    for source in made:
        with pytest.raises(UserError, match=r"gone.*cannot be read"):
            len(source)
