"""Inference without batch normalization, for ONNX graphs."""

from batchnorm.surgery.fold_onnx.verb import OnnxResult, fold_onnx

__all__ = ["OnnxResult", "fold_onnx"]
