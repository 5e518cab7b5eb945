"""One HTML page about some runs: `singer report RUN... --out FILE.html`."""

from pipeline.report.page import ReportResult, report

__all__ = ["ReportResult", "report"]
