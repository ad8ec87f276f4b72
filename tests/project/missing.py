"""Programs in which packages are missing."""

# Begins a program in which the named packages cannot be found, as if they were not installed.
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name in {missing} else find(name, *rest))
"""
