"""Experiments on one's own data: what the commands ``tune``, ``compare`` and ``adapt`` run, and what they leave."""
