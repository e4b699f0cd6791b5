"""What is timed, and what came out: plain data, which needs neither a GPU nor torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.option_values import BLOCK_SIZES, RULES

OURS, EXACT, FA3_BF16, FA3_FP8 = "ours", "exact", "fa3_bf16", "fa3_fp8"
PEERS = {FA3_BF16: 4, FA3_FP8: 2}
"""Other kernels, and the bytes that they read for an element of K and its V."""
BASE_READ = "base_read"
FIXED = PEERS | {BASE_READ: 1}
"""Series that are timed once a shape: peers, and the bare read of our base."""
VALUE_BYTES = {"auto": 2, "fp8": 1}
"""Bytes of an element of V by its dtype: the model's 16-bit one, or E4M3."""
CODE_BYTES = 0.5 + 4 / 64
"""Bytes of an element of K in 4 bits, with its part of the step and offset of 64 tokens."""
SPREAD, NEWEST, UNEVEN = "spread", "newest", "uneven"
HOT = (SPREAD, NEWEST, UNEVEN)
"""Where hot blocks are planted: anywhere; one after another at the end of the context; or anywhere,
but half of a request's KV heads have twice as many and the others none, as about half of the heads
of a GQA model attend to the first and last tokens alone (https://arxiv.org/abs/2410.10819)."""
SINK, OFFSET = "sink", "offset"
PLANTED = (
    SINK, "needle", "local", "heads", OFFSET, "lognormal-1", "lognormal-2", "lognormal-3",
)  # fmt: skip
"""Distributions of scores, see bench/planted.py."""
NOTHING, WRITE = "nothing", "write"
AHEAD = (NOTHING, WRITE)
"""What is timed with attention, ahead of it: nothing, or the write of the newest tokens' keys and
values to the cache, as in a layer."""


@dataclass(frozen=True, order=True)
class Geometry:
    """Heads and pages of a model."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    page_size: int = 64

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        if not 1 <= self.group <= 16:
            raise ValueError(f"1 to 16 query heads share a KV head, not {self.group}")
        if self.head_size % 16 or not 16 <= self.head_size <= 256:
            raise ValueError(f"head sizes are multiples of 16 up to 256, not {self.head_size}")
        if self.page_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(
                f"pages, which are blocks here, have {sizes} tokens, not {self.page_size}"
            )

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def __str__(self) -> str:
        return f"h{self.num_heads}-kv{self.num_kv_heads}-d{self.head_size}-p{self.page_size}"


@dataclass(frozen=True, order=True)
class Shape:
    """One decode batch: `batch` requests of `seq_len` tokens, one query token each."""

    geometry: Geometry
    batch: int
    seq_len: int

    @classmethod
    def parse(cls, text: str, geometry: Geometry) -> "Shape":
        """From `8x32768`: batch x tokens."""
        batch, _, seq_len = text.partition("x")
        if not (batch.isdigit() and seq_len.isdigit() and int(batch) and int(seq_len)):
            raise ValueError(f"shape {text!r} is not BATCHxTOKENS, such as 8x32768")
        return cls(geometry, int(batch), int(seq_len))

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def pages(self) -> int:
        """Pages of one request, which are also its blocks."""
        return -(-self.seq_len // self.geometry.page_size)

    def kept_blocks(self, kept: float) -> int:
        """Blocks of a request and KV head that are kept for a fraction of `kept`; the first and
        the last one always are."""
        return min(self.pages, max(2, round(kept * self.pages)))

    @property
    def elements(self) -> int:
        """Elements of K in the cache, as many as of V."""
        return self.tokens * self.geometry.num_kv_heads * self.geometry.head_size

    def floor_bytes(self, kept: float, value_bytes: int = 2, scan_bytes: float = 1) -> float:
        """The least to read: what is scanned, of all blocks; residual and V of the kept ones, and
        their base where that is not what was scanned."""
        kept_bytes = 1 + value_bytes + (scan_bytes != 1)
        return self.elements * (scan_bytes + kept_bytes * kept)

    def __str__(self) -> str:
        return f"{self.batch} x {self.seq_len:,}"


@dataclass(frozen=True, order=True)
class Cell:
    """One figure to measure. The series that are FIXED know none of the last fields, peers `ahead`
    alone.

    Args:
        series: ours, exact (`delta = None`), base_read (nothing but the read of the base), fa3_bf16
            or fa3_fp8.
        value_dtype: auto or fp8.
        kept: fraction of the blocks to plant as hot.
        tuning: changes to the launch parameters, `name=value,...`.
        hot: spread, newest or uneven; see `HOT`.
        ahead: nothing or write; see `AHEAD`.
        planted: the distribution of the scores, see `bench/planted.py`; empty for hot blocks.
        setting: options for planted scores, see `describe`; empty to search for the delta that
            keeps `kept`.
    """

    shape: Shape
    series: str
    value_dtype: str = "auto"
    kept: float = 1.0
    tuning: str = ""
    hot: str = SPREAD
    ahead: str = NOTHING
    planted: str = ""
    setting: str = ""

    @property
    def is_variant(self) -> bool:
        """Whether it is shown beside the figure that counts."""
        varied = self.tuning or self.planted
        return bool(varied) or self.hot != SPREAD or self.ahead != NOTHING

    @property
    def config(self) -> FFAConfig:
        """The options of planted scores."""
        pairs = (item.partition("=") for item in self.setting.split(",") if item)
        options = {name: json.loads(value) for name, _, value in pairs}
        rule = next((rule for rule, name in RULES.items() if name in options), "threshold")
        return FFAConfig(**{"v_cache_dtype": self.value_dtype, "rule": rule} | options)

    def peer(self, series: str) -> "Cell":
        """The cell of another kernel that this one is compared with."""
        return Cell(self.shape, series, ahead=self.ahead, planted=self.planted)

    def floor_bytes(self, kept: float) -> float:
        """The least that it reads when a fraction of `kept` is kept."""
        if self.series in FIXED:
            return self.shape.elements * FIXED[self.series]
        kept_bytes = VALUE_BYTES[self.value_dtype] - (not self.config.use_fp8_residual)
        scan_bytes = CODE_BYTES if self.config.scans_codes else 1
        return self.shape.floor_bytes(kept, kept_bytes, scan_bytes)


NOT_OF_DECODE = (
    "dense_layers", "min_context", "min_request_delta", "max_request_tau", "record_skip_ratio",
    "metrics", "fused_kproj",
)  # fmt: skip


def describe(config: FFAConfig) -> str:
    """`delta=10.0,block_size=16`: the options of one launch, delta or tau and what is not the
    default."""
    defaults = FFAConfig().to_dict()
    return ",".join(
        f"{name}={json.dumps(value)}"
        for name, value in config.to_dict().items()
        if name in RULES.values()
        or (name not in ("rule", *NOT_OF_DECODE) and value != defaults[name])
    )


@dataclass(frozen=True)
class Figure:
    """What a cell took.

    Args:
        us: median microseconds of one launch.
        floor_us: microseconds to read the floor's bytes at the bandwidth measured in that run.
        kept: fraction of the blocks that was kept, as counted on the device.
        error: relative error against the float32 reference of what was asked for.
        code: fingerprint of the code that was timed.
        commit: what git calls that code; empty where nobody said.
        cached: whether it comes from an earlier run.
        exact_error: of planted scores: relative error against attention to everything, float64.
        delta: of planted scores: what was found to keep the wanted fraction.
    """

    us: float
    floor_us: float
    kept: float
    error: float
    code: str
    commit: str = field(default="", compare=False)
    cached: bool = field(default=False, compare=False)
    exact_error: float | None = None
    delta: float | None = None

    @property
    def floor_fraction(self) -> float:
        return self.floor_us / self.us


Figures = dict[Cell, Figure]


def over(figures: Figures, cell: Cell, peer: str) -> float | None:
    """How many times faster than `peer` the cell is; None where the peer was not timed."""
    theirs = figures.get(cell.peer(peer))
    return theirs.us / figures[cell].us if theirs else None


def plan_cells(
    shapes: list[Shape],
    kept_fractions: list[float],
    value_dtypes: list[str],
    tunings: list[str],
    peers: bool = True,
    hot: Sequence[str] = (SPREAD,),
    ahead: Sequence[str] = (NOTHING,),
) -> list[Cell]:
    """All cells of a sweep. Fractions that come to the same number of blocks are timed once."""
    cells = []
    for shape in shapes:
        by_blocks = {shape.kept_blocks(kept): kept for kept in reversed(kept_fractions)}
        for value_dtype, tuning, before in product(value_dtypes, tunings, ahead):
            cells += [
                Cell(shape, OURS, value_dtype, kept, tuning, place, before)
                for place in hot
                for kept in sorted(by_blocks.values(), reverse=True)
            ]
            cells.append(Cell(shape, EXACT, value_dtype, tuning=tuning, ahead=before))
        cells.append(Cell(shape, BASE_READ))
        if peers:
            cells += [Cell(shape, peer, ahead=before) for before in ahead for peer in PEERS]
    return cells


def plan_planted(
    shapes: list[Shape],
    planted: Sequence[str],
    settings: Sequence[FFAConfig],
    kept_fractions: Sequence[float],
    value_dtypes: Sequence[str],
    peers: bool = True,
) -> list[Cell]:
    """Cells of planted scores: each setting, and each fraction that is to be searched for."""
    cells = []
    for shape, name in product(shapes, planted):
        cells += [
            Cell(shape, OURS, config.v_cache_dtype, planted=name, setting=describe(config))
            for config in settings
        ]
        cells += [
            Cell(shape, OURS, value_dtype, kept, planted=name)
            for kept, value_dtype in product(kept_fractions, value_dtypes)
        ]
        cells += [Cell(shape, peer, planted=name) for peer in PEERS if peers]
    return list(dict.fromkeys(cells))
