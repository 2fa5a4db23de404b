"""Instruments: bytes, FLOPs and compiler figures of kernels without their chips, and their times on a device."""
