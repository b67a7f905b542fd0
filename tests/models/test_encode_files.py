"""Image files encoded in several framings."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from fromage.evals.options import Options
from fromage.models.encode_files import encode_files


def test_each_framing_has_features_of_its_own_pixels(toy_model, tmp_path):
    rng, paths = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(3)]
    for path, (width, height) in zip(paths, [(200, 60), (64, 64), (50, 170)], strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    (tmp_path / "torn.png").write_bytes(paths[0].read_bytes()[:200])
    encoded = encode_files(toy_model, [*paths, tmp_path / "torn.png"], Options(2, max_lost=0.5), ("own", "square"))
    vision = toy_model.vision
    size = vision.image_size[::-1]
    squares = torch.stack([pil_to_tensor(Image.open(path).resize(size)) for path in paths])
    torch.testing.assert_close(encoded.of(paths, "square"), vision(squares).float())
    torch.testing.assert_close(encoded.features, encode_files(toy_model, paths, Options()).features)
    far = (encoded.of(paths) - encoded.of(paths, "square")).abs().amax(1)
    assert far[0] > 0.01 and far[2] > 0.01 and far[1] < 1e-5
    assert encoded.lost == [("broken", tmp_path / "torn.png")] and len(encoded.row) == 3
