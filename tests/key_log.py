"""For runs in processes of their own: which samples went into which step."""

import json
from pathlib import Path

import pytorch_lightning as pl


class KeyLog(pl.Callback):
    """Adds a line [step, keys] to a file after each step; what a killed run repeats comes twice."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with self.path.open("a") as file:
            file.write(json.dumps([trainer.global_step, batch.keys]) + "\n")
