"""The self-contained HTML page that shows a run."""
