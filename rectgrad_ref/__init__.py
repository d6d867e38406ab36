"""Attribution for any ONNX classifier: RectGrad and its baselines, layer by layer."""
