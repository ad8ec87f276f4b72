"""Remove batch normalization from an ONNX model, for inference."""

from batchnorm.surgery.fold.onnx.folding import OnnxResult, fold_onnx

__all__ = ["OnnxResult", "fold_onnx"]
