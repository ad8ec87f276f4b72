"""Standardize data to zero mean and unit variance."""

from batchnorm._frameworks import required_by

with required_by("batchnorm.standardize"):
    from batchnorm.standardize.estimator import Standardizer

__all__ = ["Standardizer"]
