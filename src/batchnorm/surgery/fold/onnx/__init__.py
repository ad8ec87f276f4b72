"""Inference without batch normalization, for ONNX graphs."""

from batchnorm.surgery.fold.onnx.folding import OnnxResult, fold_onnx

__all__ = ["OnnxResult", "fold_onnx"]
