"""Fully sharded training (FSDP2): every process holds a part of each weight, gradient, moment and average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh

    from eva_clip.classifier import Classifier
    from finetune.sections import TrainerSection


def build_strategy(section: TrainerSection) -> str | Strategy:
    """Lightning's strategy of a recipe: "ddp" where "auto" meets several processes."""
    from datetime import timedelta

    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    processes, timeout = section.devices * section.nodes, timedelta(seconds=section.timeout_s)
    if section.strategy == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timeout,
        )
    if section.strategy == "ddp" or processes > 1:
        return DDPStrategy(timeout=timeout, gradient_as_bucket_view=True)  # else every gradient is there twice
    return "auto"


def shard(model: Classifier, mesh: DeviceMesh, precision: str) -> None:
    """Shard a classifier in place, block by block, over the processes of a one-dimensional mesh.

    Weights stay fp32. With precision "bf16" the matrices of blocks are gathered, and their gradients computed, in bf16
    and reduced in fp32: what autocast makes of them on one process. All else (embeddings, norms, head) is gathered in
    fp32, so that the residual stream, norms and logits are fp32 as they are there. Everything is resharded after its
    forward pass, the root too: evaluation would otherwise go on with weights gathered before an average was swapped in.
    """
    whole, half = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if precision == "bf16":
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in model.tower.blocks.modules():
            if isinstance(part, torch.nn.LayerNorm) and any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=whole)
    for block in model.tower.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=half)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=whole)


def clear_gradients(wrapped: torch.nn.Module) -> None:
    """Drop the gradients of a model as a strategy has wrapped it; DDP's, which lie in its buckets, become 0 there.

    The buckets stay in any case: of a gradient that leaves them there would be a second one while micro-batches add up.
    """
    in_buckets = isinstance(wrapped, DistributedDataParallel) and wrapped.gradient_as_bucket_view
    for parameter in wrapped.parameters():
        if in_buckets and parameter.grad is not None:
            parameter.grad.zero_()
        else:
            parameter.grad = None


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether any parameter is spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors of parts; all processes must call it together."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def copy_whole(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be a part."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    target.copy_(whole)


@torch.no_grad()
def load_whole(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put whole tensors of all names into a model that may be sharded; all processes must call it together."""
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in own.items():
        copy_whole(tensor, state[name])


class EveryPass(torch.nn.Module):
    """A sharded model that answers empty batches too: each pass gathers weights from all processes.

    Args:
        model: images [B, 3, S, S] to logits [B, C].
        size: S, pixels.
    """

    def __init__(self, model: torch.nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, C], also for B = 0."""
        shown = images if len(images) else images.new_zeros(1, 3, self.size, self.size)
        logits: torch.Tensor = self.model(shown)
        return logits[: len(images)]
