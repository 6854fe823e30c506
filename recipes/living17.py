"""Living-17 (Santurkar et al. 2021): a network meets animals of kinds that it has not been trained on.

::

    accelerate launch recipes/living17.py --data imagenet --hierarchy modified --output outputs/living-17

trains a ResNet-50 on the source (34 of ImageNet's classes in 17 superclasses), then tunes it on 850 images of 34 other
classes in the same superclasses by every row of the paper's Table 4, and reports accuracy on ImageNet's validation
images of these. ``imagenet`` holds ``train/`` and ``val/`` with a folder for each class; ``modified`` is the folder
imagenet_class_hierarchy/modified of github.com/MadryLab/BREEDS-Benchmarks. The paper: none 80.7 %, full 92.8 %,
Cross-Val 93.2 %, Auto-RGN 93.5 %. NOT measured here: it needs ImageNet and a GPU. A network that is trained already
saves the source step::

    accelerate launch recipes/living17.py --data imagenet --hierarchy modified --source-checkpoint PATH_OR_ID --seeds 0

Protocol (paper, Sec. 2.1, A.3 and A.4): the head alone for 3 epochs on the source, then everything for 2 (LP-FT);
on the target 50 images of each superclass, 15 epochs, three rates, of which validation chooses, no weight decay.
Chosen here, since it could not be looked up: the network; Adam, rate, batch and random crops of the source step; Adam
and batch 64 on the target; that the target's images are ImageNet training images of all its classes together, and that
as many validate; that the test images, and those of the source for ``--forgetting``, are ImageNet's validation images.
Departures: the head has the other tensors' rates. A network that was trained on ImageNet's labels has seen the target's
images with theirs, which makes the shift milder; ``--model vit_base_patch16_224.dino`` is one that was trained without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from paper.pretraining import SourceTraining
from paper.protocol import TABLE_4, Protocol, parser_of
from paper.study import run_study
from paper.subpopulations import imagenet_parts, read_breeds
from peft_surgical.errors import run_in_words
from peft_surgical.training.fitting import FitSettings

PROTOCOL = Protocol(
    name="Living-17",
    data=None,
    layouts="the folder of ImageNet: train/ and val/, each with a folder for every class (n01440764, ...)",
    model="resnet50.tv_in1k",
    rows=(*TABLE_4[1:], "auto"),
    lrs=(5e-4, 1e-4, 1e-5),
    head_lrs=(5e-4, 1e-4, 1e-5),
    fitting=FitSettings(lr=1e-4, epochs=15, batch_size=64, optimizer="adam", weight_decay=0.0),
    source=SourceTraining(
        FitSettings(lr=1e-4, epochs=5, batch_size=64, optimizer="adam", weight_decay=0.0),
        method="lp-ft",
        options={"share": 0.6},
        augment="crop",
        reference="3 for the head and 2 for all: the paper; the rest is chosen here",
    ),
    published=dict(zip(TABLE_4, (80.7, 92.8, 90.1, 90.6, 93.4, 93.5, 93.5, 93.2), strict=True)),
    reference="paper, Table 4 and appendix; optimizer and batch chosen here",
)


def main(
    argv: Sequence[str] | None = None,
    protocol: Protocol = PROTOCOL,
    benchmark: str = "living17",
    description: str | None = __doc__,
) -> None:
    """Also of Entity-30, which has a description, name and published numbers of its own."""
    parser = parser_of(protocol, description)
    parser.add_argument(
        "--hierarchy",
        required=True,
        metavar="DIR",
        help="the hierarchy files: imagenet_class_hierarchy/modified of github.com/MadryLab/BREEDS-Benchmarks",
    )
    args = parser.parse_args(argv)
    train, val = imagenet_parts(args.data)
    places = {"hierarchy": args.hierarchy, "train": train, "val": val}
    sizes = {"tuning": args.tuning_images, "validation": args.validation_images}
    run_study(protocol, args, lambda seed: read_breeds(benchmark, **places, seed=seed, **sizes))


if __name__ == "__main__":
    sys.exit(run_in_words(main))
