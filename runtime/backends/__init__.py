"""What runs a graph: ONNX Runtime and TensorRT, with what they need of CUDA and of processor cores."""

from hcmen.runtime.backends.options import Ort, OrtCuda, TensorRT, TensorRTRTX

__all__ = ["Ort", "OrtCuda", "TensorRT", "TensorRTRTX"]
