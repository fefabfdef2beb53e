"""One HTML file that shows what a policy is worth on recorded rows."""

from offramp.report.page import write_report

__all__ = ["write_report"]
