"""Triton's interpreter, which finds out anew with every operation what it knew before, in half of
its time."""

import dataclasses
import functools

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def install(monkeypatch) -> None:
    patch_once_a_launch(monkeypatch)
    remember_types(monkeypatch)
    leave_overflow(monkeypatch)


def patch_once_a_launch(monkeypatch) -> None:
    """It changes triton.language at every call of a function. Here: once a launch for the functions
    of each module."""
    launch, patched = interpreter.GridExecutor.__call__, set()

    def launch_kernel(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_function(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_kernel)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call_function)


def remember_types(monkeypatch) -> None:
    """All but those of pointers, which have no hash."""
    make, known = tl.block_type.__init__, {}
    find = interpreter._get_np_dtype
    find_once = functools.cache(find)

    def make_once(self, element_ty, shape) -> None:
        if type(element_ty) is not tl.dtype:
            return make(self, element_ty, shape)
        key = element_ty, tuple(shape)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    def np_dtype(kind) -> np.dtype:
        return (find_once if type(kind.scalar) is tl.dtype else find)(kind.scalar)

    monkeypatch.setattr(tl.block_type, "__init__", make_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)


def leave_overflow(monkeypatch) -> None:
    """It computes every sum in 64 bits, too, and looks at the result only where it debugs."""
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)
