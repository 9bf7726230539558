"""Overtone: a sentiment pipeline for X posts. This package is the floor the others stand on."""

__version__ = "0.1.0"
