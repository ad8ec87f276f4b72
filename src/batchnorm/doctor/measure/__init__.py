"""Measure a model: its layers, the passes over its data, and what they show."""
