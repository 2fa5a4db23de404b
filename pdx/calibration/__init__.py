"""Quantizing with a text's help: activation-aware scaling and GPTQ."""

from pdx.calibration.layerwise import calibrate, check_method, quantize_model

__all__ = ["calibrate", "check_method", "quantize_model"]
