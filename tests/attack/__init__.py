"""Attacks on the library with random input: `make attack` runs each for a minute, and the tests for a moment."""
