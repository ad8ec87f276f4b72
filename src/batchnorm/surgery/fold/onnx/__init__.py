"""Inference without batch normalization, for ONNX graphs."""

from batchnorm.surgery.fold.onnx.fold_onnx import OnnxResult, fold_onnx

__all__ = ["OnnxResult", "fold_onnx"]
