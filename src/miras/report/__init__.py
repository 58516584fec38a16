"""One self-contained HTML report about finished training runs."""

from miras.report.page import write_report

__all__ = ["write_report"]
