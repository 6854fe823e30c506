"""Adapters as plain data: read, combined, compared, turned into LoRA, and many of them on one base."""
