"""The tuner: deltas that live on a network, one adapter or many, and the files that hold them."""
