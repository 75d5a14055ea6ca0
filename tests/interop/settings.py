"""What transformers makes of settings that files say in several places or forms: writes
tests/fixtures/settings.json, against which tests/multimodal.rs holds what gptq makes of them.

A case is a model of tests/fixtures/families whose config.json has these settings instead of its own of the same
kind, in the whole and in `text_config`."""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
TIED, EOS, SECTIONS = "tie_word_embeddings", "eos_token_id", "mrope_section"
ROPE = ["rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"]
WINDOW = ["layer_types", "sliding_window", "use_sliding_window", "max_window_layers"]
# A model of every wrapper whose settings lie in `text_config`, and the others.
NESTED = ["llava", "llava-next", "llava-onevision", "mistral3", "internvl", "gemma3-whole", "qwen2-vl-nested", "qwen3-vl",
          "idefics3", "smolvlm"]
FLAT = ["qwen2-vl", "qwen2.5-vl"]
LINEAR = {"rope_type": "linear", "factor": 8.0}
FULL = {"full_attention": LINEAR | {"rope_theta": 500.0}}
SLIDING = {"sliding_attention": {"rope_type": "default", "rope_theta": 20.0}}


def said(**keys):
    return {key: value for key, value in keys.items() if value != "absent"}


def blocks(base):
    config = settings(base, [], {}, {})
    return config.get("text_config", config)["num_hidden_layers"]


def cases():
    ties = ["absent", True, False]
    for base in NESTED:
        for whole in ties:
            for text in ties:
                yield base, [TIED], said(**{TIED: whole}), said(**{TIED: text})
        for whole, text in [("absent", 5), ("absent", [5, 6]), (4, 5), (None, 5)]:
            yield base, [EOS], said(**{EOS: whole}), said(**{EOS: text})
    for base in FLAT:
        for whole in ties:
            yield base, [TIED], said(**{TIED: whole}), {}
        yield base, [EOS], {EOS: 5}, {}
    for base in ["gemma3-whole", "llava"]:
        yield base, [TIED], {TIED: None}, {}
    for base in ["qwen2-vl", "qwen2.5-vl", "qwen2-vl-nested", "qwen3-vl"]:
        pairs = 16 if base == "qwen3-vl" else 8
        lists = [None, [2, 3, pairs - 5], [2, 3, pairs - 4], [pairs, 0, 0], [2, pairs - 2], [-1, 1, pairs], [2.0, 3.0, 3.0],
                 [2, 3, 3 * pairs], pairs]
        for sections in lists:
            rope = {"type": "mrope" if base in FLAT else "default"} | ({} if sections is None else {SECTIONS: sections})
            keys = {"rope_scaling": rope}
            yield base, ROPE, keys if base in FLAT else {}, {} if base in FLAT else keys
        yield base, ROPE, {}, {}
    for base in ["llama2", "granite", "gemma", "cohere", "mistral-nemo", "phi3", "mixtral", "qwen2", "qwen3", "smollm3", "gemma2", "olmo3",
                 "cohere2", "llava", "llava-mistral", "qwen2-vl-nested"]:
        for window in [None, 2]:
            for kinds in [["full"], ["sliding"], ["sliding", "full"]]:
                types = [f"{kinds[block % len(kinds)]}_attention" for block in range(blocks(base))]
                if window is None and base in ["mistral-nemo", "gemma2", "olmo3", "cohere2"]:
                    # These always have one, or with a list.
                    continue
                keys = {"sliding_window": window, "layer_types": types}
                nested = base in NESTED + ["llava-mistral"]
                yield base, WINDOW, {} if nested else keys, keys if nested else {}
    for base in ["gemma3", "gemma3-whole", "olmo3"]:
        for keys in [
            {"rope_scaling": LINEAR},
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            {"rope_scaling": LINEAR | {"type": "linear"}},
            {"rope_scaling": LINEAR | {"type": "yarn"}},
            {"rope_scaling": {"factor": 8.0}},
            {"rope_scaling": {}},
            {"rope_scaling": LINEAR | {"rope_theta": 7.0}},
            {"rope_scaling": LINEAR, "rope_parameters": FULL | SLIDING},
            {"rope_scaling": LINEAR | {"factor": 4.0}, "rope_parameters": FULL | SLIDING},
            {"rope_scaling": LINEAR | {"rope_theta": 7.0}, "rope_parameters": FULL},
            {"rope_scaling": LINEAR, "rope_parameters": SLIDING},
            {"rope_parameters": FULL},
            {"rope_parameters": SLIDING},
            {"rope_parameters": FULL, "rope_theta": 500.0},
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_theta": 500.0},
            {"rope_theta": 500.0},
            {"rope_theta": 500000.0, "rope_local_base_freq": 11.0},
            {"rope_parameters": LINEAR},
        ]:
            nested = base in NESTED
            yield base, ROPE, {} if nested else keys, keys if nested else {}


def settings(base, without, whole, text):
    """The config.json of a case."""
    config = json.loads((FIXTURES / "families" / f"{base}.json").read_text())
    for keys, more in [(config, whole), (config.get("text_config"), text)]:
        if keys is not None:
            for key in without:
                keys.pop(key, None)
            keys |= more
    return config


def frequencies(model):
    """The rotary frequencies of blocks that attend to everything and of those that slide."""
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    of = {kind: getattr(rotary, f"{kind}_attention_inv_freq", None) for kind in ["full", "sliding"]}
    if of["full"] is None and of["sliding"] is None:
        return {"full": rotary.inv_freq.tolist()}
    return {kind: values.tolist() for kind, values in of.items() if values is not None}


@torch.no_grad()
def understood(config):
    """What transformers makes of a config.json, or why it makes nothing of it."""
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "config.json").write_text(json.dumps(config))
        try:
            config = AutoConfig.from_pretrained(work)
            auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
            model = auto.from_config(config, attn_implementation="eager").eval()
            attended = model(input_ids=torch.tensor([[3, 4, 5, 6]]), output_attentions=True).attentions
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[-1].strip()}"}
    model.tie_weights()
    # Of a flat file the settings are those of the language model.
    ids = GenerationConfig.from_model_config(config).eos_token_id
    return {"tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "eos": [ids] if isinstance(ids, int) else ids or [], "frequencies": frequencies(model),
            "seen": [int((weights[0, 0, -1] > 0).sum()) for weights in attended]}


def main():
    transformers.logging.set_verbosity_error()
    lines = []
    for base, without, whole, text in cases():
        found = understood(settings(base, without, whole, text))
        for kind, values in found.get("frequencies", {}).items():
            found["frequencies"][kind] = [float(f"{value:.7g}") for value in values]
        # Everything else is as in other cases.
        kept = {TIED: ["tied"], EOS: ["eos"], WINDOW[0]: ["seen"]}.get(without[0], ["frequencies"])
        found = {key: value for key, value in found.items() if key in ["error", *kept]}
        lines.append(json.dumps({"base": base, "without": without, "whole": whole, "text": text, **found}))
    file = FIXTURES / "settings.json"
    file.write_text(f'{{"transformers": "{transformers.__version__}", "cases": [\n' + ",\n".join(lines) + "\n]}\n")
    print(f"{len(lines)} cases in {file}")


if __name__ == "__main__":
    main()
