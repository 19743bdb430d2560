"""Kernels of the GPT-OSS storage forms. They stand alone: no import of the converter."""
