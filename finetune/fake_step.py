"""A GPU's training step on fake tensors: no memory, no arithmetic, no GPU, and every storage accounted for."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = "cuda:0"
"""Device of the fake tensors."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's modes are untyped
    """Bytes of the storages that operations under it make, for as long as each is alive; views are counted once.

    Args:
        weights: whose copies in another type are kept apart from everything else, and whose storages are not counted.
        others: tensors from outside whose storages are not counted either.
    """

    def __init__(self, weights: Iterable[torch.Tensor], others: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = self.copies = self.peak = 0
        self._weights = {_key(tensor) for tensor in weights}
        self._known = self._weights | {_key(tensor) for tensor in others}

    @property
    def alive(self) -> int:
        """Bytes that are held now."""
        return self.values + self.copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and _key(args[0]) in self._weights
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and _key(made) not in self._known:
                storage = made.untyped_storage()
                self._known.add(_key(made))
                self._book(storage.nbytes(), cast)
                weakref.finalize(storage, self._release, _key(made), storage.nbytes(), cast)
        self.peak = max(self.peak, self.alive)
        return result

    def _book(self, size: int, copy: bool) -> None:
        if copy:
            self.copies += size
        else:
            self.values += size

    def _release(self, key: int, size: int, copy: bool) -> None:
        self._known.discard(key)
        self._book(-size, copy)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class GpuKernels(TorchFunctionMode):
    """What fake tensors cannot find out: the kernels that a GPU takes, and results whose size depends on values.

    Without a driver torch falls back to attention that keeps its matrix. A GPU takes flash attention in half precision
    and memory-efficient attention in fp32 or with a mask; both keep queries, keys, values, the output and the logarithm
    of the normaliser. `torch.unique` finds as many values as there can be.

    Args:
        values: distinct values of a tensor, at most.
    """

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return fused_attention(*args, **kwargs)
        if func is torch.unique:
            found = args[0].new_zeros(min(self.values, args[0].numel()))
            return found, torch.zeros_like(args[0])
        return func(*args, **kwargs)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention [B, H, T, D] by the kernel that a GPU takes; the signature of torch's."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        attn_mask = attn_mask if attn_mask is None else attn_mask.to(dtype)
    aten, results = torch.ops.aten, None
    if attn_mask is None and query.dtype != torch.float32:
        results = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)
    else:
        shape = (*query.shape[:-1], key.shape[-2])
        bias = attn_mask if attn_mask is None else attn_mask.expand(shape)
        results = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal)
    output: torch.Tensor = results[0]
    return output


@contextlib.contextmanager
def gpu_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast of a GPU as Lightning sets it (no cache of weights), also where there is none; None for none.

    `torch.autocast` turns itself off without a GPU.
    """
    if dtype is None:
        yield
        return
    before = torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled()
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_cache_enabled(False)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before[0])
        torch.set_autocast_cache_enabled(before[1])


@torch.no_grad()
def pass_back(loss: list[torch.Tensor]) -> None:
    """The backward pass from a loss [], which is taken out of the list so that nothing else holds its graph.

    autograd's own engine needs a driver for tensors on a GPU. As there, the newest step comes first, and what a step
    kept is freed behind it. Gradients of parameters are dropped on arrival.
    """
    gradient = torch.ones_like(loss[0])
    root = loss.pop().grad_fn
    assert root is not None
    waiting, order = _count_uses(root), itertools.count()
    arrived: dict[Node, dict[int, torch.Tensor]] = {root: {0: gradient}}
    ready: list[tuple[int, int, Node]] = [(0, next(order), root)]
    del root, gradient
    while ready:
        node = heapq.heappop(ready)[2]
        results, following = _run(node, arrived.pop(node)), node.next_functions
        waiting.pop(node, None)
        del node
        for number, (target, index) in enumerate(following):
            result, results[number] = results[number], None
            if target is None or target.name() == "torch::autograd::AccumulateGrad":
                continue
            sums = arrived.setdefault(target, {})
            if result is not None:
                sums[index] = sums[index] + result if index in sums else result
            waiting[target] -= 1
            if waiting[target] == 0:
                heapq.heappush(ready, (-target._sequence_nr(), next(order), target))
            del sums
        result = target = None
        del following, results


def _count_uses(root: Node) -> Counter[Node]:
    """How many gradients every step of a graph waits for."""
    uses: Counter[Node] = Counter()
    stack, seen = [root], {root}
    while stack:
        for target, _ in stack.pop().next_functions:
            if target is not None:
                uses[target] += 1
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
    return uses


def _run(node: Node, gradients: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
    """Gradients of a step's inputs; those of its outputs take their outputs' shapes and types first, as in autograd."""
    given: list[torch.Tensor | None] = []
    for number, output in enumerate(node._input_metadata):
        gradient = gradients.pop(number, None)
        if gradient is not None:
            gradient = gradient.sum_to_size(tuple(output.shape)) if gradient.shape != output.shape else gradient
            gradient = gradient.to(output.dtype)
        given.append(gradient)
        del gradient
    results = node(*given)  # type: ignore[operator]
    return list(results) if isinstance(results, tuple) else [results]
