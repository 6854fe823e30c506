"""Mutations of adapter files, and what becomes of them: see ``benchmarks/fuzz.py``."""
