"""What a policy is worth on recorded rows: one HTML file, and a picture for the model card."""

from offramp.report.page import check_price, write_report
from offramp.report.picture import write_picture

__all__ = ["check_price", "write_picture", "write_report"]
