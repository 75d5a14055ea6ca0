#!/usr/bin/env python3
"""A float32 checkpoint as StableBeluga2's: 70B widths, PyTorch shards of 10 GB, fewer blocks.

    synthetic_bin.py OUT --blocks 1 --tokenizer tests/fixtures/demo-llama

Needs torch and safetensors, and 3.4 GB of memory and twice that of disk a block. OUT/bin holds the
`.bin` shards in the model's order with its index and the rotary frequencies that such files carry,
OUT/safetensors the same values as safetensors. Quantizing either must give the same bytes.
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file
from synthetic_checkpoint import HEADS, HIDDEN, block, outside, write_small_files


def shards(tensors, limit):
    """Tensors in order, cut as transformers cuts them: a new file before the limit is passed."""
    parts, used = [{}], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > limit:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += size
    return parts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--shard-size", type=float, default=10e9)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    rest = outside("cpu", torch.float32)
    tensors = {"model.embed_tokens.weight": rest.pop("model.embed_tokens.weight")}
    head_dim = HIDDEN // HEADS
    for index in range(args.blocks):
        tensors |= block("cpu", index, torch.float32)
        frequencies = 1 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = frequencies
    tensors |= rest
    parts = shards(tensors, args.shard_size)
    for kind, stem, extension in (
        ("bin", "pytorch_model", "bin"), ("safetensors", "model", "safetensors"),
    ):
        folder = args.out / kind
        folder.mkdir(parents=True, exist_ok=True)
        places = {}
        for i, part in enumerate(parts):
            name = f"{stem}-{i + 1:05}-of-{len(parts):05}.{extension}"
            if kind == "bin":
                torch.save(part, folder / name)
            else:
                save_file(part, folder / name, metadata={"format": "pt"})
            places |= dict.fromkeys(part, name)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.{extension}.index.json").write_text(json.dumps(index, indent=2))
        write_small_files(folder, args.blocks, "float32", args.tokenizer)


if __name__ == "__main__":
    main()
