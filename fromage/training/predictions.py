"""`lightning predict` on disk: a Parquet file in the run's folder, a row for each sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from fromage.io import WholeFile, check_new

FILE = "predictions.parquet"


class PredictionWriter(BasePredictionWriter):
    """Writes what predict_step returns, dictionaries of lists or tensors with a row per sample, batch by batch.

    The file has its name when all batches are there; of several devices each writes its own, predictions-RANK.parquet.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self.file: WholeFile | None = None
        self.writer: pq.ParquetWriter | None = None
        self.rows = 0
        self.overwrite = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raise UserError where a file of predictions is there already, before the model is loaded."""
        check_new(_path(trainer), self.overwrite)

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *which: Any) -> None:
        """Write a batch."""
        if not isinstance(prediction, dict):
            return
        table = pa.table({name: _column(value) for name, value in prediction.items()})
        if self.writer is None:
            self.file = WholeFile(_path(trainer))
            self.writer = pq.ParquetWriter(self.file.__enter__(), table.schema)
        self.writer.write_table(table)
        self.rows += len(table)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the file its name, and say it."""
        if self.writer and self.file:
            self.writer.close()
            self.file.keep()
            print(f"{self.rows} predictions -> {self.file.path}")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove what is not whole."""
        if self.writer and self.file:
            self.writer.close()
            self.file.discard()


def _path(trainer: Any) -> Path:
    name = FILE if trainer.world_size == 1 else f"{Path(FILE).stem}-{trainer.global_rank}.parquet"
    return Path(trainer.log_dir or trainer.default_root_dir) / name


def _column(value: Any) -> Any:
    """Texts or numbers as they are; a tensor (B, n) as rows of float32."""
    return pa.array(list(value.float().cpu().numpy())) if isinstance(value, Tensor) else value
