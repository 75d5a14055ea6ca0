#!/usr/bin/env python3
"""A sharded dense Llama checkpoint of real width with random weights, for disk-to-disk timings.

    synthetic_checkpoint.py OUT --blocks 4 --tokenizer tests/fixtures/demo-llama

Needs torch and safetensors. One shard a block, as large models are stored; the tokenizer is copied
from a small model, whose ids all lie inside the vocabulary.
"""

import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 8192, 28672, 64, 8, 32000


def weight(device, rows, columns, dtype=torch.float16):
    """Random weights that keep the size of their inputs."""
    return (torch.randn(rows, columns, device=device) / columns**0.5).to(dtype).cpu()


def block(device, index, dtype=torch.float16):
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    prefix = f"model.layers.{index}"
    tensors = {f"{prefix}.{n}.weight": weight(device, *s, dtype) for n, s in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=dtype)
    return tensors


def outside(device, dtype=torch.float16):
    """What lies outside of the blocks."""
    return {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, device=device).to(dtype).cpu(),
        "model.norm.weight": torch.ones(HIDDEN, dtype=dtype),
        "lm_head.weight": weight(device, VOCAB, HIDDEN, dtype),
    }


def write_small_files(out, blocks, dtype, tokenizer):
    """The configuration, and the tokenizer of another model."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": blocks, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "bos_token_id": 1,
        "tie_word_embeddings": False, "torch_dtype": dtype,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map = {}
    # One shard in memory at a time: all of a 70B are 138 GB.
    for i in range(args.blocks + 1):
        tensors = outside(device) if i == 0 else block(device, i - 1)
        name = f"model-{i + 1:05}-of-{args.blocks + 1:05}.safetensors"
        save_file(tensors, args.out / name, metadata={"format": "pt"})
        weight_map.update({tensor: name for tensor in tensors})
    index = {"metadata": {}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    write_small_files(args.out, args.blocks, "float16", args.tokenizer)


if __name__ == "__main__":
    main()
