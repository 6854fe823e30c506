"""Experiments on one's own data, and what they leave.

`api` has `tune` and `compare`, each one call; recipes with a protocol of their own use the parts: `Experiment` for the
runs, `choosing` for which of them there are, `outputs` for what is written. `adapting` is test-time adaptation.
"""
