"""What `doctor` finds: a fact each, with what to do about it."""

from dataclasses import dataclass

OK, WARNING, MISSING = "ok", "warning", "missing"
COLORS = {OK: "green", WARNING: "yellow", MISSING: "red"}


@dataclass(frozen=True)
class Finding:
    subject: str
    status: str
    found: str
    advice: str = ""
