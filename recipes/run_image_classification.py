# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-surgical[recipes]"]
#
# [tool.uv.sources]
# peft-surgical = { path = "..", editable = true }  # this clone: nothing is released yet
# ///
"""Tune one part of an image classifier, by the options of transformers' example script of this name.

::

    uv run recipes/run_image_classification.py \
        --model_name_or_path google/vit-base-patch16-224 --ignore_mismatched_sizes --train_dir flowers \
        --output_dir tuned --target block2 --num_train_epochs 10 --learning_rate 1e-3 --do_train --do_eval

``uv run`` makes an environment with this clone in it; in one that has the extra ``recipes``, ``python`` and
``accelerate launch`` do. Who has a command line for transformers' script changes the path of the script, and adds
``--target`` or leaves ``auto-rgn``. Options that are not below are those of `TrainingArguments`.

What differs: the training images are not augmented unless ``--augment crop`` (a random part and flips, as there) or
``flip`` asks for it, so that what is frozen before the target can be computed once for each image; parts are drawn in
equal numbers of each class; checkpoints are read from safetensors, timm's as well; no code is downloaded.

``--output_dir`` gets the adapter, the image processor, ``report.json`` and a page. With ``--load_best_model_at_end
--eval_strategy epoch --save_strategy epoch --metric_for_best_model accuracy`` the best epoch is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, set_seed

from peft_surgical import SurgicalCallback, SurgicalConfig, push_adapter, score_blocks
from peft_surgical.choosing.resolve import selection_record
from peft_surgical.data.labelled import Data, collate, read_data
from peft_surgical.data.layouts import list_images
from peft_surgical.errors import ConfigError, run_in_words
from peft_surgical.evaluation import Report, measure
from peft_surgical.experiment.choosing import SCORED
from peft_surgical.experiment.subject import Subject
from peft_surgical.keys import REPORT
from peft_surgical.prefix.cached import CachedPrefix
from peft_surgical.training.trainer import SELECTED_BY, ClassifierTrainer, OneDevice, evaluated
from peft_surgical.tuner.saving import write_card


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """Where the images are."""

    dataset_name: str | None = option(None, "A dataset's id on the Hub, or a folder or parquet file.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_dir: str | None = option(None, "Instead: a folder with a folder of images for each class.")
    validation_dir: str | None = option(None, "The same for the validation images.")
    train_val_split: float | None = option(None, "Else this share of the images validates; by default a fifth.")
    max_train_samples: int | None = option(None, "Tune on so many images.")
    max_eval_samples: int | None = option(None, "Validate on so many.")
    image_column_name: str | None = option(None, "Column of the images, where types and usual names do not tell.")
    label_column_name: str | None = option(None, "The same for the labels.")


@dataclass
class ModelArguments:
    """What is tuned."""

    model_name_or_path: str = option("google/vit-base-patch16-224-in21k", "An id of transformers or timm, or a folder.")
    ignore_mismatched_sizes: bool = option(False, "Give a checkpoint with other classes a new head.")
    target: str = option("auto-rgn", "block2, 'block1 + head', all, ...; a method such as lp-ft; or auto-rgn.")
    num_blocks: int = option(1, "With auto-rgn and the like: so many neighbouring blocks.")
    norm_stats: str = option("frozen", "Whose normalisation statistics move: frozen, target or all.")
    delta_dtype: str | None = option(None, "Of the saved deltas: bfloat16 or float16 halve the file.")
    augment: str = option("none", "none, flip or crop.")
    image_size: int | None = option(None, "Height and width of the network's input, in pixels.")
    cache_prefix: bool = option(True, "Compute what is frozen before the target once for each image.")


def table(folder: str) -> Dataset:
    """The images of a folder of class folders, as rows with the class's name."""
    found = list_images(Path(folder))["tuning"]
    columns = Features({"image": Image(), "label": Value("string")})
    return Dataset.from_dict({"image": found.paths, "label": found.classes}, features=columns)


def read(given: DataArguments, seed: int) -> Data:
    """The images to tune on and those to validate on."""
    if (given.dataset_name is None) == (given.train_dir is None):
        raise ConfigError("say where the images are: --dataset_name or --train_dir, one of them")
    source: Any = given.train_dir or ":".join(filter(None, (given.dataset_name, given.dataset_config_name)))
    if given.validation_dir is not None:
        source = DatasetDict(train=table(source), validation=table(given.validation_dir))
    sizes = {"tuning": given.max_train_samples, "validation": given.max_eval_samples}
    sizes["validation"] = sizes["validation"] or (None if given.validation_dir else given.train_val_split)
    columns = {"image_column": given.image_column_name, "label_column": given.label_column_name}
    return read_data(source, seed=seed, **sizes, **columns)


def choose(asked: ModelArguments, subject: Subject, batch_size: int, seed: int) -> tuple[str, dict[str, Any] | None]:
    """The target, and the record of its choice where scores have chosen it; a new head has no say in that."""
    if asked.target not in SCORED:
        return asked.target, None
    generator = torch.Generator().manual_seed(seed)
    rows = subject.rows("tuning", seed)
    loader = DataLoader(rows, batch_size, shuffle=True, generator=generator, collate_fn=collate)
    scores = score_blocks(subject.base(seed).model, loader, SCORED[asked.target], blocks=subject.anatomy)
    if subject.head_is_new:
        scores = scores.without("head", subject.anatomy["head"].tensors)
    print(scores)
    blocks = scores.contiguous(asked.num_blocks)
    return " + ".join(blocks), selection_record(asked.target, scores, num_blocks=asked.num_blocks)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, OneDevice), description=__doc__.splitlines()[0])
    asked, given, args = parser.parse_args_into_dataclasses(None if arguments is None else list(arguments))
    if args.push_to_hub and not args.hub_model_id:
        raise ConfigError("--push_to_hub: say where with --hub_model_id OWNER/NAME")
    pushes, args.push_to_hub = args.push_to_hub, False  # once, at the end, what has been proven to load
    args.remove_unused_columns, args.label_names, seed = False, ["labels"], args.seed
    set_seed(seed)
    head = "auto" if asked.ignore_mismatched_sizes else "keep"
    sizes = {"augment": asked.augment, "image_size": asked.image_size}
    subject = Subject(asked.model_name_or_path, lambda _: read(given, seed), head=head, seed=seed, **sizes)
    target, selection = choose(asked, subject, args.per_device_train_batch_size, seed)
    row, zero, fields = subject.prepared(target)
    base, data = subject.base(seed, zero), subject.data(seed)
    print(f"{data}\nhead: {base.head_note}\ntarget: {target}")

    policy = {"norm_stats": asked.norm_stats, "delta_dtype": asked.delta_dtype, "selection": selection}
    model = get_peft_model(base.model, SurgicalConfig(target=row.target, **policy, **fields))  # the line that differs
    model.peft_config["default"].base_model_name_or_path = asked.model_name_or_path
    model.print_trainable_parameters()
    options = row.settings()
    surgical = SurgicalCallback(
        row.schedule(subject.anatomy, options) if row.schedule else None,
        row.penalty(options) if row.penalty else None,
        reset_moments=row.reset_moments,
        blocks=subject.anatomy,
    )
    cached = CachedPrefix(
        model.to(args.device),
        subject.rows("tuning", seed),
        subject.rows("validation", seed),
        batch_size=(args.per_device_train_batch_size, args.per_device_eval_batch_size),
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        off=None if asked.cache_prefix and args.world_size == 1 else "it is switched off, or there are processes",
    )
    place = Path(args.output_dir)
    with cached:
        print(cached)
        trainer = ClassifierTrainer(
            model=model,
            args=args,
            train_dataset=cached.datasets[0],
            eval_dataset=cached.datasets[1],
            compute_metrics=lambda found: {name: x for name, x in evaluated(found).items() if name != SELECTED_BY},
            callbacks=[surgical],
        )
        if args.do_train:
            trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
            trainer.save_metrics("train", trained.metrics)
            trainer.save_state()
        if args.do_eval:
            measured = trainer.evaluate()
            trainer.log_metrics("eval", measured)
            trainer.save_metrics("eval", measured)
    if not (args.do_train and trainer.is_world_process_zero()):
        return
    model.save_pretrained(place)
    if (processor := getattr(base.transform_eval, "processor", None)) is not None:
        processor.save_pretrained(place)
    opening = subject.opening(seed, zero)
    if not zero:
        opening["head"] = "new" if base.head_is_new else "keep"
    kept = "epoch by validation accuracy" if args.load_best_model_at_end else "none: the last epoch"
    part = {"dataset": "validation", "n": len(data.validation), "seeds": [seed], "selection": kept}
    numbers = (measure("accuracy", [measured["eval_accuracy"]], **part),) if args.do_eval else ()
    settings = {"method": target, "open": opening, "lr": args.learning_rate, "epochs": args.num_train_epochs}
    report = Report(asked.model_name_or_path, target, numbers, settings)
    report.save(place / REPORT)
    write_card(place, report)
    print(f"In {place}: the adapter, {REPORT}")
    if pushes:
        names = [given.dataset_name] if given.dataset_name and not Path(given.dataset_name).exists() else []
        print(push_adapter(place, args.hub_model_id, datasets=names, private=args.hub_private_repo, complete=False).url)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
