"""Render a diagnosis as text, JSON or HTML."""
