"""A grid of runs as cells that differ in learning rate and seed: what is trained, what is chosen, what is reported."""

from __future__ import annotations
