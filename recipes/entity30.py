"""Entity-30 (Santurkar et al. 2021): a network meets things of kinds that it has not been trained on.

::

    accelerate launch recipes/entity30.py --data imagenet --hierarchy modified --output outputs/entity-30

trains a ResNet-50 on the source (120 of ImageNet's classes in 30 superclasses), then tunes it on 1,500 images of 120
other classes in the same superclasses by every row of the paper's Table 4, and reports accuracy on ImageNet's
validation images of these. ``imagenet`` holds ``train/`` and ``val/`` with a folder for each class; ``modified`` is the
folder imagenet_class_hierarchy/modified of github.com/MadryLab/BREEDS-Benchmarks. The paper: none 58.6 %, full 79.3 %,
Cross-Val 81.2 %, Auto-RGN 80.6 %. NOT measured here: it needs ImageNet and a GPU. A network that is trained already
saves the source step::

    accelerate launch recipes/entity30.py --data imagenet --hierarchy modified --source-checkpoint PATH_OR_ID --seeds 0

Protocol, what is chosen here and what departs from the paper: as in ``recipes/living17.py``, whose rates and source
step these are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import living17
from paper.protocol import TABLE_4
from peft_surgical.errors import run_in_words

PUBLISHED = dict(zip(TABLE_4, (58.6, 79.3, 69.9, 77.8, 78.4, 77.3, 80.6, 81.2), strict=True))
PROTOCOL = replace(living17.PROTOCOL, name="Entity-30", published=PUBLISHED)


def main(argv: Sequence[str] | None = None) -> None:
    living17.main(argv, PROTOCOL, "entity30", __doc__)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
