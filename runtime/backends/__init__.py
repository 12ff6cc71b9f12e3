"""What runs a graph: ONNX Runtime and TensorRT, with what they need of CUDA and of processor cores."""
