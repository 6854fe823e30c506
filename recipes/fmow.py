"""FMoW (Christie et al. 2018; WILDS, Koh et al. 2021): what land is used for, seen from space, years later in Africa.

::

    accelerate launch recipes/fmow.py --data PATH --precision bf16 --workers 8

fine-tunes CLIP ViT-B/16 on the images from before 2013, of all regions, then tunes one part of it at a time on 62
African images from 2013 to 2015, one of each class, and tests on the African images from 2016 on. To expect, in percent
of the test images (paper, Table 1, SGD; one part at a time):

    none 35.5    all 38.9    embedding 36.0    first three blocks 39.8    last three blocks 44.9    head 36.9

NOT measured here: it needs the images and a GPU. PATH is the folder of ``fmow_v1.1`` (rgb_metadata.csv,
country_code_mapping.csv and images/) as the WILDS package unpacks it, or the one above; no copy on the Hub is known,
and images stay on disk. What else can be asked for::

    ... --source-checkpoint DIR_OR_ID                 # a network that is trained on the source already
    ... --model openai/clip-vit-large-patch14         # the paper's other network
    ... --region Asia --years 2016 2017               # another target: its region, first and last year
    ... --optimizer adamw                             # with rates of its own; the paper reports both
    ... --dry-run                                     # parts, tensors, steps and rates; trains nothing

Protocol (paper, Sec. 2.1, A.3 and A.4): CLIP ViT-B/16 and ViT-L/14 (of which the numbers above are could not be
looked up), 62 tuning images, SGD and AdamW, cosine rate, batch 32, 10 epochs. Chosen here, since the paper's are not
known to us: which years and splits of WILDS source and target are (see `read_published`), validation on the rest of the
pool that the 62 images are drawn from, all rates, no weight decay, and the source step (AdamW, 1e-5, cosine, 5 epochs).
Departures: transformers' CLIP classifies the mean of the patch tokens, not the class token. A class of which Africa has
no image is left out of the draw, with a warning.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from paper.pretraining import SourceTraining
from paper.protocol import Protocol, parser_of
from paper.published import read_published
from paper.study import run_study
from paper.wilds_folders import REGIONS
from peft_surgical.errors import run_in_words
from peft_surgical.training.fitting import FitSettings

ADAM_RATES = (1e-4, 3e-5, 1e-5), (1e-2, 1e-3, 1e-4)

PROTOCOL = Protocol(
    name="FMoW",
    data=None,
    layouts="the folder of fmow_v1.1 (rgb_metadata.csv, country_code_mapping.csv and images/)",
    model="openai/clip-vit-base-patch16",
    rows=("all", "embedding", "first3", "last3", "head"),
    lrs=(1e-2, 3e-3, 1e-3),
    head_lrs=(1e-1, 1e-2, 1e-3),
    rates=dict.fromkeys(("adam", "adamw"), ADAM_RATES),
    fitting=FitSettings(lr=1e-3, epochs=10, batch_size=32, optimizer="sgd", weight_decay=0.0, lr_scheduler="cosine"),
    source=SourceTraining(
        FitSettings(lr=1e-5, epochs=5, batch_size=32, optimizer="adamw", weight_decay=0.0, lr_scheduler="cosine"),
        reference="chosen here",
    ),
    published={"none": 35.5, "all": 38.9, "embedding": 36.0, "first3": 39.8, "last3": 44.9, "head": 36.9},
    reference="paper, Table 1 and appendix",
    chosen=("lr", "head_lr", "weight_decay"),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(PROTOCOL, __doc__)
    parser.add_argument(
        "--region", choices=REGIONS[:-1], default="Africa", help="region to adapt to; default: %(default)s (paper)"
    )
    parser.add_argument(
        "--years",
        type=int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="years of the target, for tuning, validation and test; default: 2013 to 2015, and to test from 2016 on",
    )
    args = parser.parse_args(argv)
    options = {"region": args.region, "years": tuple(args.years) if args.years else None}
    options |= {"tuning": args.tuning_images, "validation": args.validation_images}
    run_study(PROTOCOL, args, lambda seed: read_published("fmow", args.data, seed=seed, **options))


if __name__ == "__main__":
    sys.exit(run_in_words(main))
