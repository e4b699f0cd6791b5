"""What a compiled kernel does: its PTX, instruction by instruction, and what ptxas says of it."""

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton.backends.nvidia

from vllm_ffa_fp8fp8 import kernels
from vllm_ffa_fp8fp8.bench import base_read

SOURCES = (*Path(kernels.__file__).parent.rglob("*.py"), Path(base_read.__file__))
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Instruction:
    """`text` without its predicate. `file` (the last two parts of its path) and `line` are of the
    innermost source; `position` counts the lines of the PTX."""

    text: str
    file: str
    line: int
    position: int

    @property
    def operation(self) -> str:
        return self.text.split(".")[0]

    @property
    def function(self) -> str:
        """The function of ours that it comes from, or the file where it is Triton's."""
        return _functions().get((self.file, self.line), self.file)

    @cached_property
    def bytes(self) -> int:
        """What a thread reads or writes in global memory at a time; 0 if it does not."""
        if self.text.startswith(("cp.async.ca.", "cp.async.cg.")):
            return int(self.text.split(",")[2].strip(" ;"), 0)
        access = re.match(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\s", self.text)
        return int(access[1] or 1) * int(access[2]) // 8 if access else 0


@lru_cache
def _functions() -> dict[tuple[str, int], str]:
    """The names of our functions by file and line."""
    names = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for line in range(node.lineno, node.end_lineno + 1):
                    names["/".join(path.parts[-2:]), line] = node.name
    return names


class Assembly:
    """The PTX of one kernel."""

    def __init__(self, ptx: str):
        files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(.*)"', ptx, re.M))
        files = {number: "/".join(Path(path).parts[-2:]) for number, path in files.items()}
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        file, line, inline = "", 0, False
        for position, text in enumerate(map(str.strip, ptx.splitlines())):
            if text.endswith("inline asm"):
                inline = text.startswith("// begin")
            elif place := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
                if not inline:  # or lines of the assembly are added to those of the source
                    file, line = files[place[1]], int(place[2])
            elif label := re.match(r"(\$\w+):", text):
                self._labels[label[1]] = position
            elif text and not text.startswith((".", "//", "{", "}", ")")):
                text = re.sub(r"^\{?\s*@!?%?p\d*\s+", "", text)
                self.instructions.append(Instruction(text, file, line, position))

    def count(self, *beginnings: str) -> int:
        return len(list(self.starting(*beginnings)))

    def starting(self, *beginnings: str) -> Iterator[Instruction]:
        return (i for i in self.instructions if i.text.startswith(beginnings))

    @cached_property
    def product_loops(self) -> list["Loop"]:
        """The innermost loops that multiply matrices, in the order of the code."""
        spans = {}
        for jump in self.starting("bra"):
            begin = self._labels.get(jump.text.split()[-1].strip(";"), jump.position)
            if begin < jump.position:
                spans[begin] = max(jump.position, spans.get(begin, 0))
        loops = [
            Loop([i for i in self.instructions if begin < i.position <= end])
            for begin, end in sorted(spans.items())
            if not any(begin < other and last <= end for other, last in spans.items())
        ]
        return [loop for loop in loops if loop.multiplies]


@dataclass
class Loop:
    instructions: list[Instruction]

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, i.text) for i in self.instructions)

    @property
    def multiplies(self) -> bool:
        return self.has(r"wgmma\.mma|mma\.sync|tcgen05\.mma")

    @property
    def multiplies_e4m3(self) -> bool:
        return self.has(r"wgmma\.mma\S*\.e4m3\.e4m3")

    @property
    def copies(self) -> bool:
        """Whether rows come by asynchronous copies; scalars have 4 bytes."""
        return any(i.operation == "cp" and i.bytes > 4 for i in self.instructions)


@dataclass(frozen=True)
class Resources:
    """What a thread takes of registers and local memory (spilled registers, mostly), in bytes."""

    registers: int
    local: int


def resources(cubin: bytes) -> Resources:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"])
