"""Callbacks for training frameworks; each module imports its framework, and nothing here does before it is imported."""
