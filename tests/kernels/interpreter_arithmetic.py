"""Arithmetic of Triton's interpreter as tests need it: the same on every processor, bf16 rounded as GPUs round it.

The interpreter multiplies matrices with numpy's BLAS, whose rounding depends on the processor and on the place of a
column in the matrix; it stores bf16 as integers, multiplies those as integers, truncates where a GPU rounds to nearest
even, and reads subnormal numbers wrongly. :func:`install` replaces that: products are summed in float64, one after the
other along the summed axis, and rounded once.

:func:`install` also keeps what the interpreter looks up again and again: the members of ``triton.language`` at each
call of a helper function, and the numpy type of each result. That was two fifths of its time.
"""

import functools
import inspect
import os

import numpy as np
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def decode_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bf16 numbers stored as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode_bf16(values: np.ndarray) -> np.ndarray:
    """bf16 numbers nearest to ``values`` (ties to even), stored as uint16."""
    rounded = torch.from_numpy(np.array(values, copy=True)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def product(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``total + a @ b`` summed in float64 in the order of the summed axis, for every element alike."""
    a, b, result = a.astype(np.float64), b.astype(np.float64), total.astype(np.float64)
    term = np.empty_like(result)
    for k in range(a.shape[-1]):
        np.multiply(a[..., :, k, None], b[..., None, k, :], out=term)
        result += term
    return result.astype(total.dtype)


def install() -> None:
    """Replace products and conversions of the interpreter. Does nothing where Triton is missing or compiles."""
    if not INTERPRETED:
        return
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "exact_products", False):
        return
    others = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot")}

    def values(x):
        return decode_bf16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if any(x.dtype.primitive_bitwidth == 8 for x in (a, b)):
            return others["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
        return handle(product(values(a), values(b), d.data), d.dtype.scalar)

    def convert(self, src, dst_type, other):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return other()
        if target == tl.bfloat16:
            return handle(encode_bf16(src.data), target)
        numpy_type = interpreter._get_np_dtype(target)
        return handle(values(src).astype(numpy_type), target)

    def cast_impl(self, src, dst_type):
        return convert(self, src, dst_type, lambda: others["cast_impl"](self, src, dst_type))

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return convert(self, src, dst_type, lambda: others["create_fp_to_fp"](self, src, dst_type, rounding_mode))

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    builder.exact_products = True
    keep_lookups(interpreter)


def keep_lookups(interpreter) -> None:
    """Let a helper function use the language as its kernel has patched it, and look numpy types up once."""
    patch_language, patched = interpreter._patch_lang, []

    class Scope:
        def __init__(self, modules, scope):
            patched.append(set(modules))
            self.scope = scope

        def restore(self):
            patched.pop()
            self.scope.restore()

    @functools.cache
    def modules_of(function):
        modules = {id(value) for value in function.__globals__.values() if inspect.ismodule(value)}
        return modules & {id(interpreter.tl), id(interpreter.tl.core)}

    def patch_once(function):
        """Called for a kernel, which restores the scope at its end, and for each helper, which drops it."""
        modules = modules_of(function)
        if patched and modules <= patched[-1]:
            return None
        scope = patch_language(function)
        if not patched:
            return Scope(modules, scope)
        patched[-1] |= modules
        return scope

    numpy_type, numpy_type_of_scalars = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    def numpy_type_once(dtype):
        if dtype.scalar.is_ptr():
            return numpy_type(dtype)
        return numpy_type_of_scalars(dtype.scalar)  # a block cannot be hashed

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = numpy_type_once


install()
