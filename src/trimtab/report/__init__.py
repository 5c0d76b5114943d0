"""The report of an evaluation: values, a terminal table, report.json and report.html."""

from trimtab.report.files import read_report, report_json, write_report
from trimtab.report.merge import merge_hosts
from trimtab.report.table import table
from trimtab.report.values import (
    CONTROLS,
    ROWS,
    STEERED,
    Completion,
    GrowthPoint,
    HostResult,
    Report,
    TokenChange,
    perplexity,
)

__all__ = [
    "CONTROLS",
    "ROWS",
    "STEERED",
    "Completion",
    "GrowthPoint",
    "HostResult",
    "Report",
    "TokenChange",
    "merge_hosts",
    "perplexity",
    "read_report",
    "report_json",
    "table",
    "write_report",
]
