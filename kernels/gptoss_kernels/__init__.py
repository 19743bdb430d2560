"""Kernels for GPT-OSS: storage forms, inference, training. They stand alone: no import of the converter."""
