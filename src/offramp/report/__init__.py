"""One HTML file that shows what a policy is worth on recorded rows."""

from offramp.report.page import check_price, write_report

__all__ = ["check_price", "write_report"]
