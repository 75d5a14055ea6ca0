"""Small multimodal models for families.py, whose language model is of a supported family: their
config.json, how their files call tensors, and how transformers reads them."""

import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from family_configs import BASE, YARN

CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32}
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
           "num_attention_heads": 2, "head_dim": 16, "image_size": 16, "patch_size": 8}
INTERNVL = CLIP | {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]}
IDEFICS3 = {"model_type": "idefics3_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
QWEN2_VL = {"model_type": "qwen2_vl_vision", "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 4}
QWEN2_5_VL = {"model_type": "qwen2_5_vl_vision", "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
              "out_hidden_size": 64, "patch_size": 4, "fullatt_block_indexes": [0]}
QWEN3_VL = {"model_type": "qwen3_vl_vision", "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0]}

# The language model's settings are an object without the keys of a model by itself.
TEXT = {key: value for key, value in BASE.items() if key != "tie_word_embeddings"}


def wrapper(architecture, model_type, vision, text, **keys):
    return {"architectures": [architecture], "model_type": model_type, "text_config": TEXT | text,
            "vision_config": vision} | keys


def llava(text, **keys):
    return wrapper("LlavaForConditionalGeneration", "llava", CLIP, text, image_token_index=63, **keys)


def flat(architecture, model_type, vision, **keys):
    return {"architectures": [architecture], "model_type": model_type, "vision_config": vision} | BASE | keys


MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}

WRAPPED = {
    # Its published files do not say what the language model is.
    "llava": llava({}, tie_word_embeddings=False),
    "llava-mistral": llava({"model_type": "mistral", "sliding_window": 12, "rope_theta": 5000.0}),
    "llava-next": wrapper("LlavaNextForConditionalGeneration", "llava_next", CLIP,
                          {"model_type": "llama", "attention_bias": True}, image_token_index=63),
    "llava-onevision": wrapper("LlavaOnevisionForConditionalGeneration", "llava_onevision", SIGLIP,
                               {"model_type": "qwen2", "tie_word_embeddings": True}, image_token_index=63,
                               video_token_index=62),
    "mistral3": wrapper("Mistral3ForConditionalGeneration", "mistral3", PIXTRAL,
                        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
                        image_token_index=63, tie_word_embeddings=False),
    "internvl": wrapper("InternVLForConditionalGeneration", "internvl", INTERNVL, {"model_type": "qwen2"},
                        image_token_id=63, tie_word_embeddings=False),
    "internvl-qwen3": wrapper("InternVLForConditionalGeneration", "internvl", INTERNVL,
                              {"model_type": "qwen3", "head_dim": 32}, image_token_id=63),
    "gemma3-whole": wrapper("Gemma3ForConditionalGeneration", "gemma3", SIGLIP,
                            {"model_type": "gemma3_text", "hidden_size": 96, "head_dim": 32, "num_hidden_layers": 3,
                             "sliding_window": 8, "query_pre_attn_scalar": 20, "rms_norm_eps": 1e-6,
                             "hidden_activation": "gelu_pytorch_tanh", "layer_types": [
                                 "sliding_attention", "full_attention", "sliding_attention"],
                             "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
                            image_token_index=63, mm_tokens_per_image=4),
    "qwen2-vl": flat("Qwen2VLForConditionalGeneration", "qwen2_vl", QWEN2_VL, rope_theta=5000.0, rope_scaling=MROPE,
                     use_sliding_window=False, sliding_window=32, max_window_layers=1, image_token_id=63,
                     video_token_id=62, vision_start_token_id=61, vision_end_token_id=60),
    "qwen2-vl-nested": wrapper("Qwen2VLForConditionalGeneration", "qwen2_vl", QWEN2_VL,
                               {"model_type": "qwen2_vl_text", "rope_parameters": YARN | {"mrope_section": [2, 3, 3]},
                                "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
                               image_token_id=63, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60,
                               tie_word_embeddings=True),
    "qwen2.5-vl": flat("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", QWEN2_5_VL, rope_scaling=MROPE,
                       image_token_id=63, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60,
                       ) | {"tie_word_embeddings": True},
    "qwen3-vl": wrapper("Qwen3VLForConditionalGeneration", "qwen3_vl", QWEN3_VL,
                        {"model_type": "qwen3_vl_text", "head_dim": 32, "rope_scaling": {
                            "rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]}},
                        image_token_id=63, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60),
    "idefics3": wrapper("Idefics3ForConditionalGeneration", "idefics3", IDEFICS3,
                        {"model_type": "llama", "rope_theta": 5000.0}, image_token_id=63, scale_factor=2),
    "smolvlm": wrapper("SmolVLMForConditionalGeneration", "smolvlm", IDEFICS3 | {"model_type": "smolvlm_vision"},
                       {"model_type": "llama"}, image_token_id=63, scale_factor=2, tie_word_embeddings=True),
}

# Names of files as they were published, from names in memory.
PUBLISHED = [
    (r"^lm_head", "language_model.lm_head"), (r"^model\.language_model", "language_model.model"),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
]
PUBLISHED_QWEN = [(r"^model\.language_model", "model"), (r"^model\.visual", "visual")]
OF = {"qwen2_vl": PUBLISHED_QWEN, "qwen2_5_vl": PUBLISHED_QWEN, "qwen3_vl": [], "idefics3": [], "smolvlm": []}


def is_wrapped(config):
    return hasattr(config, "vision_config")


def plain_name(name):
    """The name of a tensor of the language model in a model by itself; of others their own."""
    return re.sub(r"^model\.(language_model|text_model)\.", "model.", name)


def published_name(name, model_type):
    """What a tensor in memory is called in published files."""
    for pattern, there in OF.get(model_type, PUBLISHED):
        changed = re.sub(pattern, there, name)
        if changed != name:
            return changed
    return name


def load_wrapped(config, tensors):
    """transformers itself finds out what the tensors of a file are."""
    stored = next(tensor.dtype for name, tensor in tensors.items() if "embed_tokens" in name)
    with tempfile.TemporaryDirectory() as work:
        config.save_pretrained(work)
        tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, Path(work) / "model.safetensors", metadata={"format": "pt"})
        model, info = AutoModelForImageTextToText.from_pretrained(
            work, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    missing = [name for name in info["missing_keys"] if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    for module in model.modules():
        if isinstance(getattr(module, "embed_scale", None), torch.Tensor):
            module.embed_scale = module.embed_scale.to(stored).float()
    return model.eval()
