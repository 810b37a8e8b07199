"""Plumbing shared by the services: one third-party library per file."""
