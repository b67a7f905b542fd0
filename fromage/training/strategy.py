"""Training on several devices: the frozen language model sharded over them, or all that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from fromage.checkpoints.format import DTYPES, TOWERS
from fromage.config import DType
from fromage.errors import UserError
from fromage.training.layers import gather_blocks, shard_all, shard_blocks


class ShardedTowers(DDPStrategy):
    """FSDP for the frozen layers of the language model, DDP for the trained parameters.

    Each of D devices holds 1 / D of every layer and gathers a layer while it runs. Each device has all trained parameters,
    so checkpoints, clipping and the optimiser are those of one device. (Lightning's own FSDPStrategy would flatten trained
    and frozen parameters together, which their dtypes do not allow, and does not support clipping by norm.)

    In validation, where devices can have different numbers of batches, each holds the whole language model.

        lightning fit --config cc3m.yaml --trainer.devices 4 --trainer.strategy fromage.ShardedTowers
    """

    def model_to_device(self) -> None:
        """Shard the layers, one by one, and move the rest to the device. Raises UserError if they are trained."""
        if any(p.requires_grad for p in self.lightning_module.model.lm.hf.parameters()):  # type: ignore[union-attr]
            raise UserError("trainer.strategy: ShardedTowers keeps the language model frozen; give fromage.ShardedModel")
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


class ShardedModel(ModelParallelStrategy):
    """FSDP2 for a run that trains its language model: D devices hold 1 / D of every parameter, gradient and moment each.

    Parameters are sharded one by one, so frozen and trained ones may stand in one layer, gradients are clipped by their norm
    over all devices, and checkpoints are those of one device: whole, in one file. (Lightning's FSDPStrategy does not clip by
    norm, and runs on GPUs only.)

    In validation, where answers have different lengths, each device holds the whole language model.

        lightning fit --config octopus_stage3.yaml --config octopus_stage3_8gpu.yaml
    """

    def __init__(self, dtype: DType | None = None) -> None:
        """dtype: in which the language model's layers are gathered and run; null for that of their weights.

        What is held stays in the dtype of the weights, and gradients are summed in float32. Lightning's bf16-mixed is no
        substitute: it refuses to clip gradients for fused optimisers, and would run the DETR decoder in bfloat16 too.
        """
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.dtype = None if dtype is None else DTYPES[dtype]

    def setup_environment(self) -> None:
        """Data parallelism over all devices."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def model_to_device(self) -> None:
        """Shard, layer by layer, and move what stays whole to the device."""
        module: Any = self.lightning_module
        shard_all(module, module.model.lm, self.root_device.type, ("training_step", "validation_step"), self.dtype)
        super().model_to_device()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, on the first device; on the others the same with tensors without storage."""
        checkpoint, error = {}, None
        if self.is_global_zero:
            try:
                checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
            except UserError as found:
                error = found
        outline = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), checkpoint)
        outline, error = self.broadcast((outline, error))  # so that no device waits for the first
        if error is not None:
            raise error
        return checkpoint or outline

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each device takes its part from the first."""
        state = checkpoint["state_dict"] if self.is_global_zero else {}
        set_model_state_dict(self._module, dict(state), options=_from_first(strict))

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls load_optimizer_state_dict."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each device takes its part from the first."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if self.is_global_zero:
                state = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self._module)
            set_optimizer_state_dict(self._module, optimizer, state if self.is_global_zero else {}, options=_from_first())

    @property
    def _module(self) -> Any:
        return self.lightning_module

    def on_validation_start(self) -> None:
        """From the first batch on, keep the layers that are gathered."""
        for block in self._module.model.lm.blocks:
            block.set_reshard_after_forward(False, recurse=False)

    def on_validation_end(self) -> None:
        """Shard everything again: after the next update, what was gathered is out of date."""
        for block in self._module.model.lm.blocks:
            block.set_reshard_after_forward(True, recurse=False)
            block.reshard()
        self._module.reshard()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end


def _from_first(strict: bool = True) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
