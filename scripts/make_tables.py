"""Makes the marked tables of README and docs again from plot/: make_tables.py [--check]."""

import argparse
from pathlib import Path

from vllm_ffa_fp8fp8.bench.model_tables import TABLES
from vllm_ffa_fp8fp8.bench.published import Published
from vllm_ffa_fp8fp8.bench.tables import fill

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def stale_pages(published: Published) -> dict[Path, str]:
    """Pages whose tables are not those of the figures, with the text that they should have."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    made = {page: fill(text, TABLES, published) for page, text in texts.items()}
    return {page: made[page] for page in PAGES if made[page] != texts[page]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if any is stale")
    options = parser.parse_args()
    stale = stale_pages(Published(ROOT / "plot"))
    for page, text in stale.items():
        if not options.check:
            page.write_text(text, encoding="utf-8")
        print(page.relative_to(ROOT))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
