"""Fused operations, each behind one function beside its plain twin."""
