"""Training on several devices with the language model sharded over them."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from fromage.checkpoints.format import TOWERS
from fromage.training.layers import gather_blocks, shard_blocks


class ShardedTowers(DDPStrategy):
    """FSDP for the frozen layers of the language model, DDP for the trained parameters.

    Each of W devices holds 1 / W of every layer and gathers a layer while it runs. Each device has all trained parameters,
    so checkpoints, clipping and the optimiser are those of one device. (Lightning's own FSDPStrategy would flatten trained
    and frozen parameters together, which their dtypes do not allow, and does not support clipping by norm.)

    In validation, where devices can have different numbers of batches, each holds the whole language model.

        lightning fit --config cc3m.yaml --trainer.devices 4 --trainer.strategy fromage.ShardedTowers
    """

    def model_to_device(self) -> None:
        """Shard the layers, one by one, and move the rest to the device."""
        shard_blocks(self.lightning_module.model.lm, self.root_device.type)  # type: ignore[union-attr, arg-type]
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Leave the towers out of DDP: they have no gradients."""
        frozen = [name for name, _ in self.model.named_parameters() if name.removeprefix("model.").startswith(TOWERS)]  # type: ignore[union-attr]
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(self.model, frozen)
        super().configure_ddp()

    def on_validation_start(self) -> None:
        """Gather all layers."""
        gather_blocks(self.lightning_module.model.lm, whole=True)  # type: ignore[union-attr, arg-type]

    def on_validation_end(self) -> None:
        """Shard the layers again."""
        gather_blocks(self.lightning_module.model.lm, whole=False)  # type: ignore[union-attr, arg-type]

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
