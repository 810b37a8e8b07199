"""Workloads, load generation and measurements."""
