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

Protocol (paper, Sec. 2.1, A.3 and A.4): an ImageNet ResNet-50; with Adam the head alone for 3 epochs on the source,
then everything for 2 (LP-FT); on the target 50 images of each superclass, Adam, 15 epochs, three rates for all methods,
of which validation chooses, no weight decay. Chosen here, since neither the paper nor its code says: which ResNet-50;
rate, batch and random crops of the source step; batch 64 and a constant rate on the target; that the target's images
are ImageNet training images of all its classes together, and that as many validate; that the test images, and those of
the source for ``--forgetting``, are ImageNet's validation images. A network that was trained on ImageNet's labels has
seen the target's images with theirs, which makes the shift milder; ``--model vit_base_patch16_224.dino`` is one that
was trained without. The paper's Table 7 is this data with CLIP ViT-B/16: ``--model openai/clip-vit-base-patch16``.
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
        reference="paper, A.4: Adam, 3 epochs of the head, 2 of all; rate, batch and crops chosen here",
    ),
    published=dict(zip(TABLE_4, (80.7, 92.8, 90.1, 90.6, 93.4, 93.5, 93.5, 93.2), strict=True)),
    reference="paper, A.4",
    sources={
        "model": "paper, Sec. 2.1: a ResNet-50 of ImageNet; which one is chosen here",
        "tuning": "paper, A.3",
        "validation": "chosen here",
        "test": "chosen here",
        "optimizer": "paper, Sec. 2.1",
        "head_lr": "paper, A.4: for all methods",
        "batch_size": "chosen here",
        "scheduler": "chosen here",
    },
    parts={"tuning": "50 of each superclass", "validation": "as many", "test": "ImageNet's validation images"},
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
