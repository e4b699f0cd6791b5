"""All pictures of some files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from vllm_ffa_fp8fp8.bench.cells import Figures
from vllm_ffa_fp8fp8.bench.files import BENCHMARK, file_name, read_object, slug
from vllm_ffa_fp8fp8.bench.pictures.canvas import add_title
from vllm_ffa_fp8fp8.bench.pictures.decode import decode_pictures
from vllm_ffa_fp8fp8.bench.pictures.frontier import draw_frontiers, draw_kl_frontier
from vllm_ffa_fp8fp8.bench.pictures.layers import draw_over_lengths, heat_maps
from vllm_ffa_fp8fp8.bench.pictures.quality import draw_quality
from vllm_ffa_fp8fp8.bench.pictures.sources import (
    LAYERS,
    QUALITY,
    LayersFile,
    QualityFile,
    model_name,
    read_layers,
    read_quality,
)
from vllm_ffa_fp8fp8.bench.store import DECODE, read_decode

Pictures = dict[Path, Figure]
"""By the stem of their files."""


@dataclass
class Sources:
    decode: list[tuple[dict[str, str], Figures, Path]] = field(default_factory=list)
    layers: list[LayersFile] = field(default_factory=list)
    quality: list[QualityFile] = field(default_factory=list)


def read_all(paths: Sequence[Path], tell: Callable[[str], None]) -> Sources:
    """All that can be drawn, of files and of folders of such. A file of another benchmark that is
    in a folder is told and skipped. Raises ValueError with the name of a file and what is wrong
    with it."""
    sources = Sources()
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            kind = kind_of(file)
            if kind == DECODE:
                sources.decode.append((*read_decode(file), file.parent))
            elif kind == LAYERS:
                sources.layers.append(read_layers(file))
            elif kind == QUALITY:
                sources.quality.append(read_quality(file))
            elif path.is_dir():
                tell(f"{file} is skipped: it holds figures of {kind}, which has no pictures.")
            else:
                drawn = ", ".join((DECODE, LAYERS, QUALITY))
                raise ValueError(f"{file} cannot be drawn: it is of {kind}, not of {drawn}")
    return sources


def kind_of(file: Path) -> str:
    """Which benchmark's a file is. Raises ValueError with its name and what is wrong with it."""
    try:
        return str(read_object(file).get(BENCHMARK, "no benchmark"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be drawn: {error}") from error


def draw_all(
    sources: Sources, folder: Path | None, tell: Callable[[str], None] = print
) -> Pictures:
    """Pictures for `folder`, or beside the files that they are of."""
    pictures: Pictures = {}
    for environment, figures, parent in sources.decode:
        for geometry in sorted({cell.shape.geometry for cell in figures}):
            name = file_name(DECODE, environment, geometry).removesuffix(".json")
            pictures |= decode_pictures(figures, environment, (folder or parent) / name)
    for file in sources.layers:
        same_model = [q for q in sources.quality if model_name(q.model) == model_name(file.model)]
        pictures |= layers_pictures(file, same_model, folder or file.path.parent, tell)
    for quality in sources.quality:
        picture = draw_quality(quality)
        if picture is not None:
            what = (
                f"{model_name(quality.model)}, {quality.tokens:,} tokens of {text_name(quality)}, "
                f"the last {quality.last} judged"
            )
            add_title(picture, what, quality.environment)
            pictures[(folder or quality.path.parent) / f"{quality.path.stem}-kl"] = picture
    return pictures


def text_name(quality: QualityFile) -> str:
    names = [Path(name).name for name in quality.text.split(", ")]
    return names[0] if len(names) == 1 else f"{len(names)} texts"


def layers_pictures(
    file: LayersFile,
    judged: Sequence[QualityFile],
    folder: Path,
    tell: Callable[[str], None],
) -> Pictures:
    shape, stem = file.shape, file.path.stem
    layers = len({figure.layer for figure in file.figures})
    title = (
        f"{model_name(file.model)}, mean of {layers} layers, "
        f"{shape['num_heads']} heads over {shape['num_kv_heads']} of {shape['head_size']}"
    )
    drawn = {f"frontier-{length}": p for length, p in draw_frontiers(file).items()}
    for quality in judged:
        if picture := draw_kl_frontier(file, quality):
            drawn[f"kl-frontier-{quality.path.stem}"] = picture
        else:
            tell(f"{file.path} and {quality.path} share no setting: latency is not drawn over KL.")
    for family, picture in draw_over_lengths(file).items():
        drawn["-".join(filter(None, ("lengths", slug(family.partition(", ")[2]))))] = picture
    commits = {figure.commit for figure in file.figures}
    for picture in drawn.values():
        add_title(picture, title, file.environment, commits)
    for length, picture in heat_maps(file).items():
        drawn[f"kept-{length}"] = picture
        what = f"{model_name(file.model)}, {length:,} tokens"
        add_title(picture, what, file.environment, commits)
    return {folder / f"{stem}-{name}": picture for name, picture in drawn.items()}
