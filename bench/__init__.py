"""Workloads, load generation and measurements."""

import services  # noqa: F401  # first of all: it decides what gRPC does at a fork, and several modules here import gRPC
