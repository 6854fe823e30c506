"""Surgical fine-tuning as a PEFT method."""
