"""Quantization calibrated on a text: activation-aware scaling (AWQ) and GPTQ."""

from pdx.calibration.layerwise import calibrate, check_method, quantize_model

__all__ = ["calibrate", "check_method", "quantize_model"]
