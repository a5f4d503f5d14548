"""The table of the fault suite, at the end of a run of the tests."""

import textwrap
from typing import Any

TITLES = ("fault", "what happened", "what was lost")
WIDTHS = (26, 31, 17)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tests noted, wherever they ran."""
    reports = terminalreporter.getreports("passed")
    rows = [
        row
        for report in reports
        if report.when == "call"
        for kind, row in report.user_properties
        if kind == "fault"
    ]
    if rows:
        terminalreporter.section(f"{len(rows)} faults")
        lines = [TITLES, *sorted(map(tuple, rows))]
        terminalreporter.write_line("\n".join(map(_row, lines)))


def _row(cells: tuple[str, ...]) -> str:
    wrapped = [textwrap.wrap(text, width) for text, width in zip(cells, WIDTHS, strict=True)]
    height = max(map(len, wrapped))
    lines = zip(*(column + [""] * (height - len(column)) for column in wrapped), strict=True)
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(line, WIDTHS, strict=True)).rstrip() for line in lines
    )
