"""
A checkpoint's weights as safetensors and its configuration as JSON, for use outside this project.

    python paper/export.py --ckpt=out/paper-exo/ckpt_038147.pt --out=exo

writes exo/model.safetensors (float32, by the names of model.py's state dict) and exo/config.json
(the fields of its ModelConfig), builds the model again from these two files, and compares every
tensor with the checkpoint's bit by bit.
"""

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from eval_hellaswag import CHECKPOINT_HELP
from model import (
    ExoFormer,
    InputError,
    ModelConfig,
    count_parameters,
    load_checkpoint,
    variant_name,
)
from prepare_fineweb import UserError, atomic_write, command_line


def export(model, folder):
    """Write FOLDER/model.safetensors and FOLDER/config.json. UserError without safetensors."""
    if importlib.util.find_spec("safetensors") is None:
        raise UserError("safetensors is not installed; pip install safetensors")
    from safetensors.torch import save

    os.makedirs(folder, exist_ok=True)
    with atomic_write(os.path.join(folder, "model.safetensors")) as file:
        file.write(save(model.state_dict()))
    with atomic_write(os.path.join(folder, "config.json")) as file:
        file.write(json.dumps(asdict(model.config), indent=1).encode())


def load_exported(folder):
    """The ExoFormer that `export` wrote, in eval mode."""
    from safetensors.torch import load_file

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        model = ExoFormer(ModelConfig(**json.load(file)))
    model.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
    return model.eval()


def different(one, other):
    """Names of the tensors that two models do not have alike to the last bit."""
    theirs = other.state_dict()
    names = []
    for name, tensor in one.state_dict().items():
        if not torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)):
            names.append(name)
    return names


def main():
    """Export a checkpoint and compare what was written with it."""
    parser = argparse.ArgumentParser(
        description="Weights as safetensors, configuration as JSON.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="PATH", help=CHECKPOINT_HELP)
    add("--out", required=True, metavar="DIR", help="where the two files go")
    args = parser.parse_args()
    model = load_checkpoint(args.ckpt)
    export(model, args.out)
    wrong = different(model, load_exported(args.out))
    if wrong:
        raise UserError(
            f"{args.out}: {len(wrong)} tensors came back changed, {wrong[0]} first; is the disk "
            "sound?"
        )
    print(
        f"wrote {args.out}/model.safetensors and config.json: {variant_name(model.config)}, "
        f"{count_parameters(model):,} parameters; read back, every bit equal"
    )


if __name__ == "__main__":
    command_line(main, InputError)
