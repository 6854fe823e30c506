"""A mutation of a whole adapter, made from its number alone."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Mapping

from . import configs, weights
from .files import Files, dump


def mutated(seed: int, sources: Mapping[str, Files]) -> tuple[str, str, Files]:
    """(mutation, kind of the adapter, files) of this number."""
    draw = random.Random(seed)
    kind = draw.choice(sorted(sources))
    files = copy.copy(sources[kind])
    of_weights = draw.random() < 0.5
    mutation = draw.choice(weights.MUTATIONS if of_weights else configs.MUTATIONS)
    mutation(draw, files)
    if of_weights and draw.random() < 0.1:
        draw.choice(configs.OF_FIELDS)(draw, files)
    if of_weights and (fits := draw.choice(["no", "yes", "none"])) != "no":
        # As somebody would who knows of the hash: the checks behind it must hold by themselves.
        config = json.loads(files.config)
        config["weights_sha256"] = hashlib.sha256(files.weights).hexdigest() if fits == "yes" else None
        files.config = dump(config)
    return mutation.__name__, kind, files
