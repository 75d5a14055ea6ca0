//! The loaders and their rules, each learnt from the release that its row names.

use super::needs::Need;
use super::rules::{Loader, Seen, When, code, ran, untried};

/// Keys that AutoGPTQ 0.4 hands to its configuration's constructor.
const AUTOGPTQ_KEYS: [&str; 9] = [
    "bits",
    "group_size",
    "damp_percent",
    "desc_act",
    "static_groups",
    "sym",
    "true_sequential",
    "model_name_or_path",
    "model_file_base_name",
];

const ALL_BITS: &[u8] = &[2, 3, 4, 8];

/// Group sizes of GPTQModel's Torch kernel, which takes what no other of its kernels does.
const TORCH_GROUPS: Need = Need::Groups(&[16, 32, 64, 128, 256, 512, 1024]);

/// The loaders, oldest conventions first. A row of a version stands for the releases up to it that
/// have the same code, and has no name longer than 16 characters.
pub(super) static LOADERS: [Loader; 13] = [
    Loader {
        name: "AutoGPTQ 0.4",
        release: "AutoGPTQ 0.4.2",
        seen: Seen::Code,
        rules: &[
            code(Need::QuantizeConfig),
            code(Need::KnownKeys(&AUTOGPTQ_KEYS)),
            code(Need::OneFile),
            code(Need::Bits(ALL_BITS)),
            code(Need::MinusOneZeros),
            code(Need::NoZeroOfZero),
            code(Need::NoPlaceholder),
            code(Need::EveryLinear),
            // Its 4-bit kernel asserts it, and its others round the number of groups down.
            code(Need::WholeGroups),
            code(Need::StoredHead),
            // Those it lists; and the scalings of the transformers that it was made for, 4.31.
            code(Need::Family(&["llama"])),
            code(Need::RopeScaling(&["linear", "dynamic"])),
        ],
        remarks: &[
            (When::Always, "use_safetensors=True"),
            (When::Unfused, "inject_fused_attention=False"),
            (When::ActOrder(4), "prompts beyond 2048 tokens need exllama_set_max_input_length"),
        ],
    },
    Loader {
        name: "AutoGPTQ 0.7",
        release: "AutoGPTQ 0.7.1",
        seen: Seen::Ran,
        rules: &[
            // It looks no further than this file where the folder is a local one.
            ran(Need::QuantizeConfig),
            code(Need::Bits(ALL_BITS)),
            ran(Need::MinusOneZeros),
            code(Need::NoZeroOfZero),
            code(Need::NoPlaceholder),
            code(Need::EveryLinear),
            ran(Need::WholeGroups),
            ran(Need::StoredHead),
            code(Need::Family(&["llama", "mistral", "qwen2", "mixtral"])),
        ],
        remarks: &[(When::Bits(&[4]), "ExLlamaV2 kernel"), (When::Bits(&[2, 3, 8]), "CUDA kernel")],
    },
    Loader {
        name: "transformers",
        release: "transformers 5.24, optimum 2.3, GPTQModel 7.7.0",
        seen: Seen::Ran,
        rules: &[
            code(Need::QuantizationConfig),
            code(Need::ModelFile),
            code(Need::PtMetadata),
            code(Need::Bits(ALL_BITS)),
            ran(TORCH_GROUPS),
            code(Need::ZerosAsDeclared),
            code(Need::NoPlaceholder),
            code(Need::ZeroBias),
            // Its models start with random experts then, and say so in a log.
            ran(Need::NoExperts),
            ran(Need::Wrapper(&[
                "llava",
                "llava_next",
                "llava_onevision",
                "mistral3",
                "internvl",
                "gemma3",
                "qwen2_vl",
                "qwen2_5_vl",
                "qwen3_vl",
                "idefics3",
                "smolvlm",
            ])),
        ],
        remarks: &[
            (When::Always, "with optimum and gptqmodel"),
            (When::Bits(&[3]), "Torch kernel only: slow"),
        ],
    },
    Loader {
        name: "GPTQModel",
        release: "GPTQModel 7.7.0",
        seen: Seen::Ran,
        rules: &[
            code(Need::AnyConfig),
            code(Need::Bits(ALL_BITS)),
            ran(TORCH_GROUPS),
            ran(Need::SymmetricOrStamp),
            code(Need::ZerosAsDeclared),
            code(Need::NoPlaceholder),
            code(Need::EveryLinear),
            code(Need::ZeroBias),
            // Of mixtral it asks for other names, glm4_moe it loads but does not run.
            ran(Need::Experts(&["qwen2_moe", "qwen3_moe", "olmoe"])),
            ran(Need::ExpertsInAll),
            ran(Need::NoWrapper(&["llava_next", "llava_onevision", "idefics3"])),
            ran(Need::NamesInMemory),
            untried(Need::Wrapper(&["llava", "mistral3"])),
            // It takes fused ones apart where transformers 5 has them, before it looks for their tensors.
            ran(Need::GateAndUp),
        ],
        remarks: &[(When::Bits(&[3]), "Torch kernel only: slow")],
    },
    Loader {
        name: "ExLlama",
        release: "ExLlama, its last commit",
        seen: Seen::Code,
        rules: &[
            code(Need::Bits(&[4])),
            code(Need::MinusOneZeros),
            code(Need::NoZeroOfZero),
            code(Need::EveryLinear),
            code(Need::WholeGroups),
            code(Need::OutMultiple(8)),
            code(Need::ZeroBias),
            // It skips every `_proj.bias`, and takes nothing but rope_theta from the rotary settings.
            code(Need::Family(&["llama"])),
            code(Need::NoBiases),
            code(Need::RopeScaling(&[])),
        ],
        remarks: &[],
    },
    Loader {
        name: "ExLlamaV2",
        release: "ExLlamaV2 0.3.2",
        seen: Seen::Code,
        rules: &[
            code(Need::Bits(&[4])),
            code(Need::ZerosAsDeclared),
            code(Need::NoZeroOfZero),
            code(Need::PowerOfTwoGroups),
            code(Need::ShortOrder),
            code(Need::ZeroBias),
            code(Need::RopeScaling(&["linear", "llama3"])),
            untried(Need::Experts(&[])),
            untried(Need::Wrapper(&[])),
        ],
        remarks: &[],
    },
    Loader {
        name: "vLLM 0.21 marlin",
        release: "vLLM 0.21.0, gptq_marlin",
        seen: Seen::Ran,
        rules: &[
            code(Need::AnyConfig),
            code(Need::Bits(&[4, 8])),
            code(Need::Symmetric),
            code(Need::Groups(&[32, 64, 128])),
            code(Need::MarlinOrExllama),
            code(Need::SharedOrder),
            code(Need::ZeroBias),
            untried(Need::Experts(&[])),
            untried(Need::Wrapper(&[])),
        ],
        remarks: VLLM_REMARKS,
    },
    Loader {
        name: "vLLM 0.21 gptq",
        release: "vLLM 0.21.0, gptq",
        seen: Seen::Ran,
        rules: &[
            code(Need::AnyConfig),
            code(Need::Bits(ALL_BITS)),
            code(Need::WholeGroups),
            code(Need::OutMultiple(32)),
            code(Need::SharedOrder),
            code(Need::MinusOneZeros),
            code(Need::NoZeroOfZero),
            code(Need::ZeroBias),
            untried(Need::Experts(&[])),
            untried(Need::Wrapper(&[])),
        ],
        remarks: &[
            (When::Bits(&[4]), "warns that its 4-bit kernel is buggy: use gptq_marlin"),
            (When::Always, "fp16 only"),
            (When::Bfloat16, "--dtype float16, as config.json asks for bfloat16"),
        ],
    },
    Loader {
        name: "vLLM 0.22-0.29",
        release: "vLLM 0.29.0, auto_gptq",
        seen: Seen::Ran,
        rules: &[
            code(Need::AnyConfig),
            ran(Need::Bits(&[4, 8])),
            code(Need::Symmetric),
            // Its method asks for these before it chooses a kernel.
            code(Need::Groups(&[32, 64, 128])),
            code(Need::MarlinOrExllama),
            code(Need::SharedOrder),
            code(Need::ZeroBias),
            untried(Need::Experts(&[])),
            untried(Need::Wrapper(&[])),
        ],
        remarks: VLLM_REMARKS,
    },
    Loader {
        name: "vLLM 0.30",
        release: "vLLM 0.32.0, auto_gptq",
        seen: Seen::Ran,
        rules: &[
            code(Need::AnyConfig),
            ran(Need::Bits(&[4, 8])),
            ran(Need::Symmetric),
            ran(Need::Groups(&[32, 64, 128])),
            ran(Need::DeclaredOrder),
            code(Need::MarlinOrExllama),
            code(Need::SharedOrder),
            code(Need::ZeroBias),
            untried(Need::Experts(&[])),
            untried(Need::Wrapper(&[])),
        ],
        remarks: VLLM_REMARKS,
    },
    Loader {
        name: "TGI",
        release: "TGI 3",
        seen: Seen::Code,
        rules: &[
            code(Need::AnyConfig),
            code(Need::Bits(&[2, 4, 8])),
            code(Need::WholeGroups),
            code(Need::StoredIndex),
            code(Need::SharedOrder),
            code(Need::MinusOneZeros),
            code(Need::EveryLinear),
            code(Need::ZeroBias),
            // Others run in transformers there, without its GPTQ kernels.
            code(Need::Family(&["llama", "mistral", "qwen2"])),
        ],
        remarks: &[
            (When::Marlin, "Marlin kernel"),
            (When::NoMarlin(&[2, 4, 8]), "ExLlama or Triton kernel"),
        ],
    },
    Loader {
        name: "GPTQ-for-LLaMa",
        release: "GPTQ-for-LLaMa, triton branch",
        seen: Seen::Code,
        rules: &[
            code(Need::NoExtraTensors),
            code(Need::StoredIndex),
            code(Need::EveryLinear),
            code(Need::OneFile),
            code(Need::Bits(&[2, 4, 8])),
            code(Need::WholeGroups),
            code(Need::MinusOneZeros),
            // Its attention fuses q, k and v under the first's index, as three equal parts, and turns
            // them by frequencies of its own.
            code(Need::SharedOrder),
            code(Need::Family(&["llama"])),
            code(Need::NoBiases),
            code(Need::UngroupedHeads),
            code(Need::RopeScaling(&[])),
            code(Need::RopeTheta(10_000)),
        ],
        remarks: &[(When::Always, "triton branch; bits and group size on its command line")],
    },
    Loader {
        name: "ONNX Runtime",
        release: "onnxruntime-genai 0.18, onnxruntime 1.30",
        seen: Seen::Ran,
        rules: &[
            code(Need::QuantizationConfig),
            ran(Need::Bits(&[4, 8])),
            ran(Need::BlockGroups),
            ran(Need::OrderAtBits(4)),
            code(Need::MinusOneZeros),
            code(Need::EveryLinear),
            code(Need::ZeroBias),
            untried(Need::Experts(&[])),
            untried(Need::Wrapper(&[])),
        ],
        remarks: &[(When::Always, "by onnxruntime-genai's builder, which rounds the head to int4")],
    },
];

/// A kernel that does not take bfloat16 is left where Marlin's limits are not met.
const VLLM_REMARKS: &[(When, &str)] = &[(
    When::Bfloat16WithoutMarlin,
    "its Exllama kernel takes fp16 only: --dtype float16, as config.json asks for bfloat16",
)];
