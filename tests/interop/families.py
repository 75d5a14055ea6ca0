#!/usr/bin/env python3
"""Hold `gptq` against transformers on a small random model of every supported family.

    families.py check --gptq target/debug/gptq     compare, on models and texts of a new seed
    families.py fixtures                           make tests/fixtures/families again

`check` writes each model as a folder that both read for themselves, config.json in the older and the
newer form of rotary settings. It compares the loss of every token (`gptq ppl --per-token`); then it
quantizes the model with the recipes `autogptq` and `best` in both layouts, dequantizes the files with
the few lines of numpy below, lets transformers run the result as an ordinary model, and compares the
losses again. Norm gains and biases are random too, so that none can be left out unnoticed.

`fixtures` stores what transformers computes (weights, ids, logits; a few hundred kB), so that
`cargo test` checks the same without Python: see tests/families.rs.

Needs the packages in requirements.txt. Everything runs on the CPU in float32.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from family_configs import SEEDED as ALONE
from family_configs import SHORT_TOO
from wrapped_models import WRAPPED, is_wrapped, load_wrapped, plain_name, published_name

SEEDED = ALONE | WRAPPED

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "families"
VOCABULARY = 64
SEQ_LEN = 48
TOLERANCE = 1e-4

COMMON = {
    "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 1,
}


def llama(**keys):
    return COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | keys


def family(architecture, model_type, **keys):
    return COMMON | {"architectures": [architecture], "model_type": model_type} | keys


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Name: (weights, config.json). Families of the same weights differ by their rotary settings alone.
FAMILIES = {
    "llama2": ("plain", llama(rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False)),
    "llama3": ("plain", llama(rope_theta=5000.0, rope_scaling=LLAMA3)),
    "llama3-new": ("plain", llama(rope_parameters=LLAMA3 | {"rope_theta": 5000.0})),
    "linear": ("plain", llama(rope_scaling={"type": "linear", "factor": 4.0})),
    "dynamic": ("plain", llama(max_position_embeddings=32,
                               rope_scaling={"type": "dynamic", "factor": 2.0})),
    "mistral": ("plain", family("MistralForCausalLM", "mistral", rope_theta=1000.0,
                                sliding_window=SEQ_LEN)),
    "tinyllama": ("plain", llama(attention_bias=False, rope_theta=20000.0)),
    "smollm": ("tied", llama(tie_word_embeddings=True, rope_theta=100000.0)),
    "llama-biases": ("biases", llama(attention_bias=True, mlp_bias=True)),
    "qwen2": ("qwen2", family("Qwen2ForCausalLM", "qwen2", rope_theta=1000000.0,
                              tie_word_embeddings=True, use_sliding_window=False,
                              sliding_window=32, max_window_layers=1)),
    "qwen3": ("qwen3", family("Qwen3ForCausalLM", "qwen3", head_dim=32, attention_bias=False,
                              tie_word_embeddings=True, rms_norm_eps=1e-6,
                              rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})),
}


def seq_lens(name):
    """Windows of `dynamic` and `longrope` lie within the context and beyond it."""
    return [24, SEQ_LEN] if name == "dynamic" or name in SHORT_TOO else [SEQ_LEN]


def made(config):
    auto = AutoModelForImageTextToText if is_wrapped(config) else AutoModelForCausalLM
    return auto.from_config(config)


def random_weights(config, seed):
    """Every parameter drawn anew, exact in fp16; outputs keep about the size of inputs."""
    generator = torch.Generator().manual_seed(seed)
    model = made(config)
    tensors = {}
    for name, shape in sorted(stored_shapes(model).items()):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            value = usual_gain(config) + 0.3 * noise
        elif name.endswith(".bias"):
            value = 0.5 * noise
        elif plain_name(name).startswith("model.embed_tokens"):
            # Where the head is tied, logits are of the size of one.
            value = noise / shape[-1] ** 0.5
        else:
            value = 1.3 * noise / shape[-1] ** 0.5
        tensors[name] = value.half()
    return tensors


def stored_shapes(model):
    """The tensors of a checkpoint: in memory the experts of a block are two tensors, and Mixtral's have other
    names."""
    shapes = {}
    kept = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, parameter in [*model.named_parameters(), *kept]:
        block, _, leaf = name.rpartition(".experts.")
        if not block:
            shapes[stored_name(model, name)] = tuple(parameter.shape)
            continue
        count, rows, cols = parameter.shape
        for expert in range(count):
            parts = ["gate", "up"] if leaf == "gate_up_proj" else ["down"]
            for part in parts:
                tensor = f"{block}.experts.{expert}.{part}_proj.weight"
                shapes[stored_name(model, tensor)] = (rows // len(parts), cols)
    return shapes


def stored_name(model, name):
    if model.config.model_type != "mixtral":
        return name
    for here, there in [(".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")]:
        name = name.replace(here, there)
    return name


def load_config(folder):
    return AutoConfig.from_pretrained(folder)


def has_experts(config):
    return getattr(config, "num_experts_per_tok", None) is not None


def usual_gain(config):
    """Gemma's files hold gains less 1."""
    return 0.0 if config.model_type.startswith("gemma") else 1.0


def seeded(name, count):
    """Numbers from -1 to 1 that follow from a tensor's name: SplitMix64 from the name's FNV-1a."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def seeded_weights(config):
    """As `random_weights`, from the names of the tensors alone: tests/families.rs makes the same."""
    tensors = {}
    for name, shape in stored_shapes(made(config)).items():
        plain = plain_name(name)
        noise = seeded(plain, int(np.prod(shape)))
        if name.endswith("norm.weight"):
            value = np.float32(usual_gain(config)) + np.float32(0.5) * noise
        elif name.endswith(".bias"):
            value = np.float32(0.8) * noise
        elif plain.startswith("model.embed_tokens"):
            value = np.float32(1.7 / shape[-1] ** 0.5) * noise
        else:
            value = np.float32(2.2 / shape[-1] ** 0.5) * noise
        value = value.astype(np.float16).astype(np.float32).reshape(shape)
        tensors[name] = torch.from_numpy(value)
    return tensors


def write_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder):
    """Whole words `w2`, `w3`, ... parted by white space."""
    words = {"<unk>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None, "decoder": None, "model": model,
    }))


def write_processor(folder, config):
    """What GPTQModel opens beside multimodal models, and every checkpoint has to carry."""
    if "vision_config" in config:
        images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16},
                  "crop_size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<unk>"}))


def load(folder, tensors=None):
    """The model of a folder as transformers understands its config.json."""
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    # Dequantized weights are an ordinary model's.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if is_wrapped(config):
        return load_wrapped(config, load_torch(folder / "model.safetensors") if tensors is None else tensors)
    if has_experts(config):
        return load_experts(folder, config, tensors)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_torch(folder / "model.safetensors") if tensors is None else tensors
    stored = next(tensor.dtype for name, tensor in tensors.items() if "embed_tokens" in name)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    missing = [m for m in missing if not (m == "lm_head.weight" and config.tie_word_embeddings)]
    assert not missing and not unexpected, (missing, unexpected)
    model.tie_weights()
    # Gemma's factor has the type of the embeddings, which are widened here after they were read.
    for module in model.modules():
        if isinstance(getattr(module, "embed_scale", None), torch.Tensor):
            module.embed_scale = module.embed_scale.to(stored).float()
    return model


def load_experts(folder, config, tensors):
    """transformers itself puts experts together while it reads a file."""
    with tempfile.TemporaryDirectory() as work:
        config.save_pretrained(work)
        tensors = load_torch(folder / "model.safetensors") if tensors is None else tensors
        tensors = {name: tensor.float().contiguous().numpy() for name, tensor in tensors.items()}
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        save_file(tensors, Path(work) / "model.safetensors", metadata={"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            work, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info[of] for of in ["missing_keys", "unexpected_keys", "mismatched_keys"]), info
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(torch.as_tensor(ids)[None].long()).logits[0]


def ids_of(count, seed):
    return np.random.default_rng(seed).integers(2, VOCABULARY, count, dtype=np.int32)


# --- fixtures ---------------------------------------------------------------------------------


def fixtures():
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    seeds = {}
    for name, (weights, config) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            file = FIXTURES / f"{weights}.safetensors"
            if weights not in seeds:
                seeds[weights] = len(seeds) + 1
                tensors = random_weights(AutoConfig.from_pretrained(folder), seeds[weights])
                write_folder(folder, config, tensors)
                shutil.copy(folder / "model.safetensors", file)
            expected = {}
            for seq_len in seq_lens(name):
                ids = ids_of(seq_len, seq_len)
                expected[f"ids.{seq_len}"] = ids
                expected[f"logits.{seq_len}"] = logits(load(folder, load_torch(file)), ids).numpy()
            (FIXTURES / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(expected, FIXTURES / f"{name}.expected.safetensors")
    seeded_fixtures()
    for file in FIXTURES.iterdir():
        file.chmod(0o644)
    print(f"{sum(f.stat().st_size for f in FIXTURES.iterdir())} bytes in {FIXTURES}")


def seeded_fixtures(only=SEEDED):
    """Config, ids and logits; the weights follow from names."""
    for name, config in ((name, SEEDED[name]) for name in only):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            text = json.dumps(config, indent=2) + "\n"
            (folder / "config.json").write_text(text)
            tensors = seeded_weights(AutoConfig.from_pretrained(folder))
            expected = {}
            for seq_len in seq_lens(name):
                ids = ids_of(seq_len, seq_len)
                expected[f"ids.{seq_len}"] = ids
                expected[f"logits.{seq_len}"] = logits(load(folder, tensors), ids).numpy()
            (FIXTURES / f"{name}.json").write_text(text)
            save_file(expected, FIXTURES / f"{name}.expected.safetensors")


# --- check ------------------------------------------------------------------------------------


def run(gptq, *args, code=0):
    done = subprocess.run([gptq, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == code, f"{args}: exit code {done.returncode}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def losses_of_gptq(gptq, folder, text, seq_len):
    """Loss of every token and the perplexity that is printed."""
    table = folder.parent / f"{folder.name}.csv"
    report = json.loads(run(gptq, "ppl", folder, "--device", "cpu", "--dataset", text, "--seq-len",
                            seq_len, "--per-token", table, "--json"))
    with open(table) as file:
        rows = list(csv.DictReader(file))
    losses = np.array([float(row["nll"]) for row in rows])
    assert np.isclose(np.exp(losses.mean()), report["perplexity"], rtol=1e-6)
    return losses, [int(row["token"]) for row in rows]


def losses_of_transformers(model, ids, seq_len):
    losses = []
    for start in range(0, len(ids) - seq_len + 1, seq_len):
        window = torch.as_tensor(ids[start:start + seq_len]).long()
        losses.append(torch.nn.functional.cross_entropy(
            logits(model, window)[:-1], window[1:], reduction="none").numpy())
    return np.concatenate(losses)


def unpacked(words, bits):
    """Values of so many bits along the rows of words, the lowest bits first; at 3 bits some cross words."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(words.shape[0], -1, bits) @ (1 << np.arange(bits))


def dequantized(folder):
    """A GPTQ folder's tensors as those of a dense model, by the format's definition."""
    settings = json.loads((folder / "quantize_config.json").read_text())
    bits = settings["bits"]
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, value in stored.items():
        prefix, _, leaf = name.rpartition(".")
        if f"{prefix}.qweight" not in stored:
            if leaf != "inv_freq":
                tensors[name] = torch.from_numpy(value)
        elif leaf == "qweight":
            codes = unpacked(value.T, bits).T
            zeros = unpacked(stored[f"{prefix}.qzeros"], bits) + 1
            group = stored[f"{prefix}.g_idx"]
            scales = stored[f"{prefix}.scales"].astype(np.float32)
            weight = scales[group] * (codes.astype(np.float32) - zeros[group].astype(np.float32))
            tensors[f"{prefix}.weight"] = torch.from_numpy(weight.T.copy())
        elif leaf == "bias":
            tensors[name] = torch.from_numpy(value)
    return tensors


def without_zero_biases(tensors, dense):
    """The card layout has a bias for every linear: all but the model's own must be zeros."""
    kept = {}
    for name, tensor in tensors.items():
        if name.endswith(".bias") and name not in dense:
            assert not tensor.any(), f"{name} is no part of the model, but not zero"
        else:
            kept[name] = tensor
    return kept


def compare(what, ours, theirs):
    error = np.abs(ours - theirs).max()
    print(f"{what:34}  {len(ours):4} tokens, largest difference of a loss {error:.1e},"
          f" perplexity {np.exp(theirs.mean()):9.4f}", flush=True)
    assert error < TOLERANCE, f"{what}: {error}"
    return np.exp(theirs.mean())


# Width, recipe and layout.
CHECKED = [(4, "autogptq", "card"), (4, "best", "modern"), (4, "best", "card"), (3, "autogptq", "modern"),
           (3, "best", "card")]


def check(gptq, seed, only, gptqmodel):
    with tempfile.TemporaryDirectory() as work:
        configs = {name: config for name, (_, config) in FAMILIES.items()} | SEEDED
        for number, (name, config) in enumerate(configs.items()):
            if only and name not in only:
                continue
            folder = Path(work) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            tensors = random_weights(AutoConfig.from_pretrained(folder), 100 * seed + number)
            write_folder(folder, config, tensors)
            write_tokenizer(folder)
            write_processor(folder, config)
            check_family(gptq, name, folder, tensors, seed, gptqmodel)
            named = {published_name(key, config["model_type"]): value for key, value in tensors.items()}
            if name in WRAPPED and named.keys() != tensors.keys():
                folder = folder.with_name(f"{name}-published")
                write_folder(folder, config, named)
                write_tokenizer(folder)
                write_processor(folder, config)
                check_family(gptq, folder.name, folder, named, seed, gptqmodel)


def held_by_gptqmodel(what, folder, ids, ours):
    """Its Torch kernel on the file as it is; what it refuses is printed in its own words."""
    import readers

    # It would take the padding of the family's published models, which lies beyond this vocabulary.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"pad_token_id": 0} | config))
    try:
        model = readers.gptqmodel(folder)
    except Exception as error:
        print(f"{what:34}  GPTQModel refuses it: {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)
        return
    compare(f"{what}, GPTQModel", ours, losses_of_transformers(model, ids, SEQ_LEN))


def held_by_transformers(what, folder, ids, ours):
    """Its own integration, with optimum and GPTQModel, on the file as it is."""
    import readers

    try:
        model = readers.transformers(folder, AutoModelForImageTextToText)
    except Exception as error:
        print(f"{what:34}  transformers refuses it: {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)
        return
    compare(f"{what}, transformers", ours, losses_of_transformers(torch.nn.Module.float(model), ids, SEQ_LEN))


def same_parts(out, source):
    """Everything but the language model is carried as it is."""
    made, given = (load_file(folder / "model.safetensors") for folder in (out, source))
    language = ("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")
    inner = ("language_model.", "model.language_model.", "model.text_model.")
    parts = [name for name in given if not name.startswith(language + inner)]
    assert parts, "no other parts"
    for name in parts:
        assert made[name].tobytes() == given[name].tobytes() and made[name].dtype == given[name].dtype, name


def check_family(gptq, name, folder, dense, seed, gptqmodel):
    work = folder.parent
    text, train = work / f"{name}.txt", work / f"{name}-train.txt"
    ids = ids_of(8 * SEQ_LEN, 7 * seed)
    text.write_text(" ".join(f"w{i}" for i in ids))
    train.write_text(" ".join(f"w{i}" for i in ids_of(40 * SEQ_LEN, 7 * seed + 1)))
    for seq_len in seq_lens(name):
        ours, tokens = losses_of_gptq(gptq, folder, text, seq_len)
        theirs = losses_of_transformers(load(folder), ids, seq_len)
        assert tokens == [t for i, t in enumerate(ids[:len(ids) // seq_len * seq_len])
                          if i % seq_len]
        base = compare(f"{name}, windows of {seq_len}", ours, theirs)
    for bits, recipe, layout in CHECKED:
        out = work / f"{name}-{bits}-{recipe}-{layout}"
        run(gptq, "quantize", folder, "--out", out, "--recipe", recipe, "--layout", layout,
            "--bits", bits, "--group-size", 32, "--device", "cpu", "--calib-dataset", train, "--windows", 32,
            "--seq-len", SEQ_LEN, "--seed", 0)
        run(gptq, "verify", out, "--base", folder)
        if is_wrapped(load_config(folder)):
            same_parts(out, folder)
        ours, _ = losses_of_gptq(gptq, out, text, SEQ_LEN)
        tensors = without_zero_biases(dequantized(out), dense)
        theirs = losses_of_transformers(load(out, tensors), ids, SEQ_LEN)
        made = compare(f"{name}, {bits} bits, {recipe}, {layout}", ours, theirs)
        if gptqmodel:
            what = f"{name}, {bits} bits, {recipe}, {layout}"
            held_by_gptqmodel(what, out, ids, ours)
            if is_wrapped(load_config(folder)):
                held_by_transformers(what, out, ids, ours)
        # Of a random mixture of experts many tokens go another way once it is rounded.
        far = (0.1 if bits == 4 else 0.3) * (3 if has_experts(load_config(folder)) else 1)
        assert abs(np.log(made / base)) < far, f"{name}, {recipe}: perplexity {made} from {base}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("fixtures", help="make tests/fixtures/families again")
    making.add_argument("--only", nargs="*", help="names of models whose weights follow from names; the others stay")
    checking = commands.add_parser("check", help="compare gptq with transformers")
    checking.add_argument("--gptq", default="target/debug/gptq", help="the binary")
    checking.add_argument("--seed", type=int, default=1, help="of weights and texts")
    checking.add_argument("--only", nargs="*", help="names of families")
    checking.add_argument("--gptqmodel", action="store_true", help="let GPTQModel read every file, too, and transformers those of"
                               " multimodal models")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    if args.command == "fixtures" and args.only:
        seeded_fixtures(args.only)
    elif args.command == "fixtures":
        fixtures()
    else:
        check(args.gptq, args.seed, args.only, args.gptqmodel)
        print("all families agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
