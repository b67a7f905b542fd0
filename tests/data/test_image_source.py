"""What is kept of an image's own JSON."""

import json

from fromage.data.image_source import _meta, without_folders


def test_of_paths_on_the_machine_that_packed_the_name_is_left():
    packed = {"source": "/home/someone/private/a.jpg", "target_image": "/home/someone/b.jpg", "line": 3, "label": "/m/01"}
    shared = {"source": "a.jpg", "target_image": "b.jpg", "line": 3, "label": "/m/01"}
    assert without_folders(packed) == shared and json.loads(_meta(json.dumps(packed).encode())) == shared
    for untouched in ({"source": "dogs/a.jpg"}, {"source": 7}):
        assert without_folders(untouched) == untouched
