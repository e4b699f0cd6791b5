"""The tables of README and docs in Markdown: parts that they share, and the marks they stand in."""

import re
from collections.abc import Callable, Iterable, Iterator

from vllm_ffa_fp8fp8.bench.cells import Cell, Figure, Figures
from vllm_ffa_fp8fp8.bench.published import Published, Source
from vllm_ffa_fp8fp8.bench.report import conditions

MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
Tables = dict[str, Callable[[Published], str]]


def fill(text: str, tables: Tables, published: Published) -> str:
    """The text with every marked table made again from the figures. Raises ValueError for a name
    that no table has, and for one that has no figures."""

    def made(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in tables:
            raise ValueError(f"no table is called {name!r}: {', '.join(tables)}")
        return f"{begin}\n{tables[name](published)}\n\n{end}"

    return MARKED.sub(made, text)


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_conditions(table: str, source: Source, commits: Iterable[str], *notes: str) -> str:
    return "\n\n".join((table, " ".join((conditions(source.environment, commits), *notes))))


def shown(us: float) -> str:
    return f"{us:,.0f}" if us >= 1000 else f"{us:.1f}"


def time(figure: Figure | None) -> str:
    return "-" if figure is None else shown(figure.us)


def time_of_floor(figure: Figure | None) -> str:
    """Microseconds, and in brackets the fraction of the byte floor."""
    return "-" if figure is None else f"{shown(figure.us)} ({figure.floor_fraction:.2f})"


def commits_of(figures: Figures, cells: Iterable[Cell]) -> Iterator[str]:
    return (figures[cell].commit for cell in cells if cell in figures)
