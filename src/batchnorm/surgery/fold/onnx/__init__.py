"""Remove batch normalization from an ONNX model, for inference."""

from batchnorm.surgery.fold.onnx.folding import fold_onnx

__all__ = ["fold_onnx"]
