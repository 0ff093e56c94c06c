"""What a scheduler asks of an accelerator, counted with fake CUDA tensors: no device is needed, nothing is computed.

kernels: operators that write memory on the device (views and bare allocations do not). syncs: the host reads a device
value. uploads: a tensor goes from the host to the device; a 0-dimensional CPU tensor in an expression travels as an
argument of the kernel and is no upload.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olss_fast import Plan, PlanScheduler
from olss_fast.executors.fused import FusedLoop

aten = torch.ops.aten
TRANSFERS = {"copy_", "_to_copy", "lift_fresh_copy"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "_unsafe_view", "device"}


@dataclass
class Counts:
    kernels: int = 0
    syncs: int = 0
    uploads: int = 0


class Counter(TorchDispatchMode):
    """Counts operators; goes inside a FakeTensorMode. Host reads answer 1.0 or 0, since fake tensors have no values."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in inputs)
        if func is aten._local_scalar_dense.default:
            self.counts.syncs += on_device
            return 1.0 if args[0].is_floating_point() else 0
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)] or inputs[:1]
        if any(tensor.device.type == "cuda" for tensor in outputs):
            self._count(func, inputs)
        else:
            self.counts.syncs += on_device  # the result lies on the host, which waited for it
        return result

    def _count(self, func: Any, inputs: list[torch.Tensor]) -> None:
        name = func.overloadpacket.__name__
        if name in TRANSFERS and inputs[-1].device.type == "cpu":
            self.counts.uploads += 1
        elif not func.is_view and name not in NO_KERNEL:
            self.counts.kernels += 1


class Bindings(TorchFunctionMode):
    """Python bindings that a build of PyTorch without CUDA refuses even for fake tensors, done by operators."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.nonzero and args[0].device.type == "cuda":
            self.counts.syncs += 1
            return torch.zeros((1, 1), dtype=torch.int64)
        if func is torch.Tensor.__getitem__ and args[0].device.type == "cuda":
            return _item(*args)
        device = kwargs.get("device") or next(
            (each for each in args[1:] if isinstance(each, (str, torch.device))), None
        )
        if func is torch.Tensor.to and device is not None and torch.device(device).type != args[0].device.type:
            return aten._to_copy(args[0], device=device, dtype=kwargs.get("dtype"))
        return func(*args, **kwargs)


def _item(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    if isinstance(index, slice):
        return aten.slice(tensor, 0, index.start, index.stop)
    return aten.select(tensor, 0, index)


def count_sampler(plan: Plan, *, guided: bool, dtype: torch.dtype = torch.float32) -> Counts:
    """Counts of a whole run of `Sampler`'s fused executor, whose step is also what the graph executor captures: the
    network is not counted; guidance, history, next input and next time are."""
    counts = Counts()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        like = torch.empty(2, 4, 64, 64, dtype=dtype, device="cuda")
        output = torch.empty(4 if guided else 2, 4, 64, 64, dtype=dtype, device="cuda")
        loop = FusedLoop(lambda x, time, model: output, like, plan, doubled=guided)
        loop.plan = plan  # its tables are data: nothing of the loop depends on them
        with Counter(counts):
            loop.run()
    return counts


def count(scheduler: Any, steps: int, dtype: torch.dtype = torch.float32) -> list[Counts]:
    """Counts of every step of a pipeline's loop: scale_model_input, a network that is not counted, step."""
    found, total = list[Counts](), Counts()
    scheduler.set_timesteps(steps)
    with FakeTensorMode(allow_non_fake_inputs=True), Bindings(total), torch.no_grad():
        if isinstance(scheduler, PlanScheduler):
            scheduler.set_timesteps(steps, device="cuda")
        else:  # diffusers' own take their grid from NumPy, which fake tensors cannot; only the timesteps leave the CPU
            scheduler.timesteps = scheduler.timesteps.to("cuda")
        sample = torch.empty(2, 4, 64, 64, device="cuda", dtype=dtype)
        for timestep in scheduler.timesteps:
            before = Counts(**vars(total))
            output = torch.empty_like(sample)
            with Counter(total):
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(sample, timestep)
                sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
            found.append(Counts(**{name: value - vars(before)[name] for name, value in vars(total).items()}))
    return found
