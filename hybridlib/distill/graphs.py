"""A training step as two CUDA graphs, its gradients and its update: thousands of small launches become two."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Graphed", "Update"]


class Graphed:
    """`compute(*batch)`, recorded on a GPU at its third call and replayed from then on.

    `compute` must do the same work at every call and never wait for the GPU; tensors of another shape or dtype than the
    first call's raise ValueError. What it returns, and the gradients it leaves, are overwritten by the next call.
    """

    def __init__(self, compute: Callable):
        self.compute, self.calls, self.graph = compute, 0, None
        self.stream = torch.cuda.Stream()  # gradients must be first summed on the stream that records

    def __call__(self, *batch: torch.Tensor):
        self.calls += 1
        if self.calls == 1:
            self.batch = [tensor.clone() for tensor in batch]
        for tensor, first in zip(batch, self.batch, strict=True):
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise ValueError(f"batch has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; it must be that of "
                                 f"the first call, {tuple(first.shape)} and {first.dtype}")
        if self.calls <= 2:  # kernels are compiled and memory is found
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.compute(*batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.compute(*self.batch)
        for place, tensor in zip(self.batch, batch, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.result

    def release(self) -> None:
        """Give the graph's memory back; what calls returned is then gone, too."""
        if self.graph is not None:
            self.graph.reset()
        self.graph = self.result = self.batch = self.compute = None


class Update:
    """`optimizer.step()` at a share of each group's ``"peak"`` rate, recorded once its gradients are and then replayed.

    If `gradients` is given, the optimizer must be one that can be ``capturable`` and writes its state in place.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, gradients: Graphed | None = None):
        self.optimizer, self.gradients, self.graph = optimizer, gradients, None

    def __call__(self, share: float) -> None:
        groups, recorded = self.optimizer.param_groups, self.gradients is not None and self.gradients.graph is not None
        device = next(p.device for group in groups for p in group["params"])
        for group in groups:
            rate = group["peak"] * share
            if self.graph is not None:
                group["lr"].fill_(rate)
            elif recorded:
                group["lr"], group["capturable"] = torch.tensor(rate, device=device), True
            else:
                group["lr"] = rate
        if not recorded:
            self.optimizer.step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.optimizer.step()
        self.graph.replay()

    def release(self) -> None:
        """Give back what was recorded."""
        if self.graph is not None:
            self.graph.reset()
        self.graph = self.gradients = None
