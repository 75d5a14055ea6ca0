"""Readers of GPTQ checkpoints that share no code with the project: torch, transformers, GPTQModel.

Each gives a function from token ids [1, n] to logits [n, vocab] in f32.
"""

import json
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Two of its own threads load a model, and on two cores it would allow itself one.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# Compiling the kernels takes longer than running them on a model of this size.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig, LlamaForCausalLM


def bit_stream(words, bits, count):
    """Values of `bits` bits from the little-endian stream of 32-bit words [n, columns]."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    rows = []
    for j in range(count):
        word, shift = divmod(j * bits, 32)
        value = words[word] >> shift
        if shift + bits > 32:
            value |= words[word + 1] << (32 - shift)
        rows.append(value & ((1 << bits) - 1))
    return torch.stack(rows)


def dequantized(qweight, qzeros, scales, g_idx, bits, minus_one):
    """The weight [out, in] that the four tensors mean, in f32."""
    columns, outputs = g_idx.numel(), scales.shape[1]
    codes = bit_stream(qweight, bits, columns)
    zeros = bit_stream(qzeros.T.contiguous(), bits, outputs).T
    if minus_one:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    groups = g_idx.long()
    return (scales.float()[groups] * (codes - zeros[groups]).float()).T.contiguous()


def tensors(folder):
    """Every tensor of a checkpoint, by name."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    return found


def dense_weights(folder):
    """The state of an ordinary model: quantized linears dequantized, the rest in f32."""
    settings = json.loads((Path(folder) / "quantize_config.json").read_text())
    minus_one = settings.get("checkpoint_format", "gptq") == "gptq"
    found, state = tensors(folder), {}
    for name, tensor in found.items():
        prefix, leaf = name.rsplit(".", 1)
        if leaf == "qweight":
            parts = [found[f"{prefix}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
            state[f"{prefix}.weight"] = dequantized(*parts, settings["bits"], minus_one)
        elif leaf == "bias":
            assert not tensor.any(), f"{name} is not zero"
        elif leaf not in ("qzeros", "scales", "g_idx", "inv_freq"):
            state[name] = tensor.float()
    return state


def dense(folder):
    """transformers on weights that `dense_weights` unpacked."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).float().eval()
    state = dense_weights(folder)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not missing, (missing, unexpected)
    return model


def gptqmodel(folder):
    """GPTQModel's Torch kernel, its scales and the rest of the model in f32."""
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(
        str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
    ).model
    kernels = {type(m).__name__ for m in loaded.modules() if hasattr(m, "qweight")}
    assert kernels == {"TorchLinear"}, kernels
    return loaded.float().eval()


def transformers(folder, auto=AutoModelForCausalLM):
    """transformers' own GPTQ integration, as a user calls it: fp16."""
    settings = json.loads((Path(folder) / "quantize_config.json").read_text())
    options = {}
    if settings["group_size"] == -1:
        # The kernel that GPTQModel chooses for a CPU by itself takes groups of 32 to 256 only.
        options["quantization_config"] = GPTQConfig(bits=settings["bits"], backend="torch")
    model = auto.from_pretrained(
        str(folder), device_map="cpu", dtype=torch.float16, **options
    )
    kernels = {type(m).__name__ for m in model.modules() if hasattr(m, "qweight")}
    assert kernels, "no linear was loaded as quantized"
    return model.eval()


READERS = {"dense": dense, "gptqmodel": gptqmodel, "transformers": transformers}


@torch.no_grad()
def logits(model, ids):
    """Logits [n, vocab] of one window."""
    return model(torch.tensor([ids])).logits[0].float()
