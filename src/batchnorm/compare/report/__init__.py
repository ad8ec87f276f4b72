"""Summarize the runs of a comparison: tables, figures and the page."""
