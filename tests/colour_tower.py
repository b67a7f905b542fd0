"""A vision tower that is quick to import in another process: it sees the mean colour, and can be slow and watched."""

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn


def to_tensor(image):
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 255


class Tower(nn.Module):
    """seen: a folder in which every process that embeds leaves its number."""

    width, transform = 3, staticmethod(to_tensor)

    def __init__(self, seconds=0.0, seen=None):
        super().__init__()
        self.seconds, self.seen = seconds, seen

    def forward(self, pixels):
        if self.seen:
            Path(self.seen, str(os.getpid())).touch()
        time.sleep(self.seconds)
        return pixels.mean((2, 3))


class Model(nn.Module):
    """As much of a Fromage as embedding images needs."""

    q, device = 3, torch.device("cpu")

    def __init__(self, *how):
        super().__init__()
        self.vision, self.image_head = Tower(*how), nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.image_head.weight)

    def embed_images(self, features):
        return nn.functional.normalize(self.image_head(features), dim=-1).detach()

    def fingerprint(self):
        return "f00d"
