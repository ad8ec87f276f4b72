"""Evaluate the finished runs: outcomes, headline, tables, figures and the page."""
