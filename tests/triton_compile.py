"""Compile every Triton kernel for a GPU of compute capability 9.0, without one: run as a program by test_triton.py.

Each kernel is launched as the layers launch it, by a launcher that compiles in place of running; what the interpreter
accepts and the compiler does not fails here. Prints one line per kernel and dtype: registers are not known before a
device loads it, the size of the machine code is.
"""

from __future__ import annotations

import inspect
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from knport.geometry import Box, output_size
from knport.kernels import triton_epilogue, triton_filters, triton_moments, triton_norm
from knport.kernels import triton_units as units
from knport.kernels.triton_support import Box3

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}


class compiling:
    """In the place of a kernel: `compiling(kernel)[grid](...)` compiles what a launch with these arguments needs."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **constants):
        names = list(inspect.signature(self.kernel.fn).parameters)
        signature, constexprs, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value = constants[name] if name in constants else args[i]
            if name in constants or (isinstance(value, int) and value == 1):  # as a launch specializes
                signature[name], constexprs[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        compiled = triton.compile(source, target=TARGET)
        print(f"{self.kernel.fn.__name__} {next(iter(signature.values()))} {len(compiled.asm['cubin'])} bytes")


def tensors(dtype, memory_format, size=(2, 48, 16, 16)):
    return torch.empty(size, dtype=dtype).to(memory_format=memory_format)


def convolution(dtype, memory_format, dropout: int, activation: str, residual: bool) -> None:
    x = tensors(dtype, memory_format)
    wide = torch.promote_types(dtype, torch.float32)
    maps = torch.empty((2, 2, 16, 16), dtype=wide)
    triton_moments.channel_moments(x, dropout == units.MOMENTS, compiling)
    triton_moments.channel_moments_backward(x, maps, maps, x, compiling)
    place = Box((3, 3), (2, 2), ((1, 1), (0, 1)), (1, 1))
    out = output_size((16, 16), *place)
    box = Box3.of((16, 16), place)
    seed = torch.zeros(1, dtype=torch.int64)
    rows = units.unit_statistics(maps, maps, seed, box, dropout, 0.05, 432, out, compiling)
    own = rows[2] if dropout == units.MOMENTS else None
    units.unit_statistics_backward(maps, rows, rows[0], rows[1], own, box, dropout, 0.05, 432, compiling)
    weight = torch.empty(48, 48, 3, 3, dtype=wide)
    used, sums = triton_filters.centre_filters(weight, dtype, compiling)
    triton_filters.centre_filters_backward(used, sums[1], wide, compiling)
    c = tensors(dtype, memory_format, (2, 48, *out))
    bias = torch.empty(48, dtype=wide)
    flags = (triton_epilogue.ACTIVATIONS.index(activation), dtype != wide, dropout == units.MOMENTS)
    inputs = (c, rows[0], rows[1], rows[0], sums, bias, c if residual else None, 1e-5)
    triton_epilogue.normalize_units(*inputs, dtype, *flags, compiling)
    triton_epilogue.normalize_units_backward(c, *inputs, *flags, compiling)


def kernel_norm(dtype, memory_format, kernel_size: int) -> None:
    x = tensors(dtype, memory_format)
    place = Box((kernel_size,) * 2, (kernel_size,) * 2, ((0, 0),) * 2, (1, 1))
    out = output_size((16, 16), *place)
    box = Box3.of((16, 16), place)
    wide = torch.promote_types(dtype, torch.float32)
    rows, maps = torch.empty((6, 2, 1, *out), dtype=wide), torch.empty((2, 2, 16, 16), dtype=wide)
    triton_norm.normalize(x, rows, box, 2, 1e-5, (16, 16), compiling)
    triton_norm.normalize_sums(x, x, rows, box, 2, 1e-5, compiling)
    triton_norm.normalize_backward(x, x, maps, maps, rows, box, 2, 1e-5, compiling)


def main() -> None:
    dtype = getattr(torch, sys.argv[1])
    convolution(dtype, torch.channels_last, units.MOMENTS, "gelu", True)
    convolution(dtype, torch.contiguous_format, units.EXPECTED, "mish", False)
    convolution(dtype, torch.channels_last, units.PLAIN, "none", False)
    for activation in ("relu", "silu"):
        convolution(dtype, torch.contiguous_format, units.MOMENTS, activation, True)
    kernel_norm(dtype, torch.channels_last, 1)
    kernel_norm(dtype, torch.contiguous_format, 2)
    compiling(units._normals_kernel)[(1,)](torch.zeros(1, dtype=torch.int64), torch.empty(9), 9, BLOCK=128)


if __name__ == "__main__":
    main()
