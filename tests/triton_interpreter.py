"""Triton's interpreter, in which tests run the kernels of the GPU: in numpy, one program after the other."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


def triton_ops(patch: pytest.MonkeyPatch) -> ModuleType:
    """`sdvae.engine.triton_ops` for the interpreter, which must be chosen before anybody imports Triton."""
    patch.setenv("TRITON_INTERPRET", "1")
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    if not isinstance(triton.language.sum, InterpretedFunction):
        pytest.skip("Triton was imported before these tests were; set TRITON_INTERPRET=1 to run them")
    # The interpreter keeps bf16 as integers: it truncates instead of rounding, and multiplies the integers.
    patch.setattr(InterpreterBuilder, "cast_impl", _rounding_cast(InterpreterBuilder.cast_impl))
    patch.setattr(InterpreterBuilder, "create_dot", _widening_dot(InterpreterBuilder.create_dot))
    from sdvae.engine import triton_ops

    return triton_ops


def _rounding_cast(cast: Any) -> Any:
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import TensorHandle

    def rounding(self: Any, handle: Any, dtype: Any) -> Any:
        if handle.dtype.scalar == float32 and dtype.scalar == bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), bfloat16)
        return cast(self, handle, dtype)

    return rounding


def _widening_dot(dot: Any) -> Any:
    from triton.language import bfloat16, float32

    def widening(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == bfloat16:
            a, b = self.cast_impl(a, float32), self.cast_impl(b, float32)
        return dot(self, a, b, *rest)

    return widening
