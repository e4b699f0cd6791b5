"""Triton's interpreter changes triton.language anew at every call of a function, which takes a
third of its time. Here: once a launch for the functions of each module."""

import triton.runtime.interpreter as interpreter


def install(monkeypatch) -> None:
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
