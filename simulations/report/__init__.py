"""The report of a run: one self-contained HTML file, and the table that sets runs side by side."""

from simulations.report.compare import compare_table
from simulations.report.page import write_report

__all__ = ["compare_table", "write_report"]
