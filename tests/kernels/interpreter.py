"""Triton's interpreter as tests run kernels in it, in a process of its own: faster, and stricter."""

from __future__ import annotations

import torch


def patch_language_once():
    """Make Triton's interpreter patch its language once, not at every call of a function; for a process of its own."""
    import triton.language as language
    from triton.runtime import interpreter

    def patch_once(function):
        names = frozenset(name for name, x in function.__globals__.items() if x is language or x is language.core)
        if names not in scopes:
            scopes[names] = patch(function)
        return interpreter._LangPatchScope()  # with nothing to put back

    scopes, patch, interpreter._patch_lang = {}, interpreter._patch_lang, patch_once


def interpret_as_gpus_compute():
    """Make Triton's interpreter round as GPUs do and look after every address; for a process of its own."""
    import numpy as np
    from triton.runtime import interpreter

    def round_to_nearest(self, x, to):  # the interpreter cuts the last bits off, GPUs round
        if x.dtype.scalar.is_fp32() and to.scalar.is_bf16():
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), to.scalar)
        return cast(self, x, to)

    def index_by_item(tensor, scope):  # since numpy 2.4, int() refuses arrays of one element
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def remember_storages(self, *arguments):
        placed = place(self, *arguments)
        storages = [x.untyped_storage() for x in placed[0] if isinstance(x, torch.Tensor)]
        spans[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages]
        return placed

    class Memory:
        """The interpreter's memory, where all elements of a load or store must lie in one of the kernel's arguments."""

        @staticmethod
        def check(pointers, mask, size):
            first = np.asarray(pointers)[np.asarray(mask)]
            if first.size:
                low, high = int(first.min()), int(first.max()) + size
                assert any(start <= low and high <= end for start, end in spans), "outside of a kernel's arguments"

        def load(self, pointers, mask, other, dtype):
            self.check(pointers, mask, np.dtype(dtype).itemsize)
            return memory.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            self.check(pointers, mask, value.dtype.itemsize)
            return memory.store(pointers, value, mask)

        def __getattr__(self, name):
            return getattr(memory, name)

    spans, memory = [], interpreter._interpreter
    interpreter._interpreter = Memory()
    place, interpreter.GridExecutor._init_args_hst = interpreter.GridExecutor._init_args_hst, remember_storages
    cast, interpreter.InterpreterBuilder.create_fp_trunc = interpreter.InterpreterBuilder.cast_impl, round_to_nearest
    interpreter.InterpreterBuilder.cast_impl = round_to_nearest
    patch, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, index_by_item
    patch_language_once()
