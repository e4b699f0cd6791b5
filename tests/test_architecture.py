"""Who imports whom: downwards only, in no circle (docs/architecture.md)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm_ffa_fp8fp8"
ROOMS = (  # lower ones first; a room may import itself and those before it
    ("kernels",),
    ("configs",),
    ("envs", "registry", "environment", "option_values", "option_docs", "config", "settings"),
    ("integration",),
    ("attention",),
    ("bench",),
    ("commands",),
    ("plugin", "stats", "__main__", "__init__"),  # how others come in
)
KERNEL_ROOMS = (
    ("runtime", "counters", "share_reference"),
    ("cache",),
    ("cache_reference",),
    ("code_reference",),
    ("reference",),
    ("decode", "projection"),
)


def modules(folder: Path, package: str) -> dict[str, Path]:
    """Every module below `folder`, by its dotted name in `package`."""
    found = {}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


def imports(name: str, file: Path, known: dict) -> set[str]:
    """The modules of `known` that a module imports, in functions, too."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            targets = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in known else base for target in targets]
        else:
            continue
        found.update(targets)
    return found


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root / PACKAGE, PACKAGE)
    known |= modules(root / "kernels", f"{PACKAGE}.kernels")
    return {name: imports(name, file, known) for name, file in known.items()}


def violations(found: dict[str, set[str]]) -> list[str]:
    """What is wrong with an import graph, a line each."""
    wrong = []
    for name, targets in found.items():
        room = name.split(".")[1] if "." in name else "__init__"
        for target in targets:
            if room == "kernels" and target.split(".")[0] == "vllm":
                wrong.append(f"{name} imports {target}")
            if target not in found:
                continue
            target_room = target.split(".")[1] if "." in target else "__init__"
            if rank(ROOMS, room) < rank(ROOMS, target_room):
                wrong.append(f"{name} imports {target}, upwards")
            elif room == target_room == "kernels" and is_upwards(name, target):
                wrong.append(f"{name} imports {target}, upwards")
    try:
        ours = {name: {t for t in targets if t in found} for name, targets in found.items()}
        tuple(TopologicalSorter(ours).static_order())
    except CycleError as error:
        wrong.append("a circle: " + " <- ".join(error.args[1]))
    return wrong


def rank(rooms: tuple, name: str) -> int:
    return next(place for place, names in enumerate(rooms) if name in names)


def is_upwards(name: str, target: str) -> bool:
    """Within the kernels; their `__init__` and the seed's module are faces of all rooms."""
    rooms = [n.split(".")[2] if n.count(".") > 1 else "" for n in (name, target)]
    if any(room not in sum(KERNEL_ROOMS, ()) for room in rooms):
        return False
    here, there = (rank(KERNEL_ROOMS, room) for room in rooms)
    return here < there or (here == there and rooms[0] != rooms[1])


def test_imports_go_downwards():
    found = graph(ROOT)
    assert len(found) > 60 and f"{PACKAGE}.integration.patches" in found[f"{PACKAGE}.plugin"]
    assert not violations(found)


@pytest.mark.parametrize(
    "module, target, says",
    [
        ("kernels.runtime", "vllm", "imports vllm"),
        ("kernels.cache.kv_write", f"{PACKAGE}.config", "upwards"),
        ("kernels.cache.kv_write", f"{PACKAGE}.kernels.decode.scan", "upwards"),
        ("kernels.decode.scan", f"{PACKAGE}.kernels.projection.tuning", "upwards"),
        ("integration.refusals", f"{PACKAGE}.attention.geometry", "upwards"),
        ("attention.impl", f"{PACKAGE}.bench.cells", "upwards"),
        ("attention.metadata", f"{PACKAGE}.attention.backend", "a circle"),
    ],
)
def test_a_wrong_import_is_found(module, target, says):
    found = graph(ROOT)
    found[f"{PACKAGE}.{module}"].add(target)
    assert any(says in line for line in violations(found))


def test_files_can_be_read_in_one_go():
    files = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert not {name: length for name, length in lengths.items() if length > 320}
