"""Surgical fine-tuning of an image classifier of transformers, in the form of PEFT's examples.

::

    python recipes/surgical_finetuning/surgical_finetuning.py --base_model google/vit-base-patch16-224 --data PHOTOS \
        --target block2 --output_dir adapter
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from peft_surgical import SurgicalConfig


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", required=True, help="an image classifier of transformers: an id or a folder")
    parser.add_argument("--data", required=True, help="a folder with a folder of images per class, or a dataset's id")
    parser.add_argument("--target", default="block1", help="what to tune; default: %(default)s")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    images = load_dataset(args.data, split="train")
    label = next(name for name, feature in images.features.items() if hasattr(feature, "names"))
    images = images.train_test_split(0.2, seed=args.seed, stratify_by_column=label)
    names = images["train"].features[label].names
    processor = AutoImageProcessor.from_pretrained(args.base_model)

    def transform(rows):
        pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": rows[label]}

    base = AutoModelForImageClassification.from_pretrained(
        args.base_model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        use_safetensors=True,
    )
    fresh = copy.deepcopy(base)  # with the same draw of the new head, which the adapter replaces
    # The head is new, and saved whole; "classifier" is what transformers calls it in most networks.
    model = get_peft_model(base, SurgicalConfig(target=args.target, modules_to_save=["classifier"]))
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            eval_strategy="epoch",
            save_strategy="no",
            label_names=["labels"],
            remove_unused_columns=False,
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=images["train"].with_transform(transform),
        eval_dataset=images["test"].with_transform(transform),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )
    trainer.train()
    model.eval()
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    again = PeftModel.from_pretrained(fresh, args.output_dir).to(model.device).eval()
    pixels = transform(images["test"][:4])["pixel_values"].to(model.device)
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, again(pixels).logits)
    print(f"In {args.output_dir}: the adapter. Loaded again, it gives the same logits, bit for bit.")


if __name__ == "__main__":
    main()
