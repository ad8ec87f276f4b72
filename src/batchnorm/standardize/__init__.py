"""Standardize data to zero mean and unit variance."""

from batchnorm.standardize.estimator import Standardizer

__all__ = ["Standardizer"]
