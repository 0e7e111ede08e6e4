"""Trace the Triton operators as `torch.compile` does on a GPU, without one: run as a program by test_triton.py.

The tensors are fake ones on "cuda", the driver a stand-in that knows its architecture: enough for the compiler's
analysis of what each kernel reads and writes. Prints the kernels that the traced graphs launch, with what each writes.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

from knport.geometry import Box
from knport.kernels import triton_ops, triton_units
from knport.kernels.triton_support import Box3


def trace(function, arguments) -> None:
    graph = aot_export_joint_simple(function, arguments, trace_joint=False).graph
    for node in graph.nodes:
        if "triton_kernel_wrapper_functional" in str(node.target):
            index = node.kwargs["kernel_idx"]
            kernel = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table.get_kernel(index)
            print(kernel.fn.__name__, *sorted(node.kwargs["tensors_to_clone"]))
        if str(node.target).startswith("knport"):
            raise SystemExit(f"{node.target} is opaque to the compiler")


def main() -> None:
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    )
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 64, 16, 16, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        maps = torch.empty(2, 2, 16, 16, device="cuda")
        rows = torch.empty(6, 2, 1, 16, 16, device="cuda")
        seed = torch.empty(1, device="cuda", dtype=torch.int64)
        box = Box3.of((16, 16), Box((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))).flat()
        tile = Box3.of((16, 16), Box((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))).flat()
        sums, bias = torch.empty(2, 64, device="cuda"), torch.empty(64, device="cuda")
        how = (triton_units.MOMENTS, 0.05, 576)

        def forward(x, seed, sums, bias):
            maps, higher = triton_ops._channel_moments(x, True)
            mean, var, own = triton_ops._unit_statistics(maps, higher, seed, box, *how, (16, 16))[:3].unbind()
            arguments = (sums[1], sums, bias, x, 1e-5, torch.bfloat16, 2, True, True)
            y = triton_ops._normalize_units(x, mean, var, own, *arguments)
            return (*triton_ops._kernel_norm(y, seed, tile, *how, 1e-5, (16, 16), (16, 16)),)

        def backward(grad, x, maps, rows, sums, bias):
            means = rows[:3].unbind()
            grads = triton_ops._normalize_units_backward(grad, x, *means, sums, bias, x, 1e-5, 2, True, True)
            grad_maps = triton_ops._unit_statistics_backward(maps, rows, grads[1], box, *how)
            return *grads, grad_maps, triton_ops._kernel_norm_backward(grad, x, maps, rows, tile, *how, 1e-5)

        trace(forward, (x, seed, sums, bias))
        trace(backward, (x, x, maps, rows, sums, bias))


if __name__ == "__main__":
    main()
