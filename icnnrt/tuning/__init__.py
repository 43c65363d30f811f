"""Gradient updates on the device."""
