//! The solver and the packer against tensors that AutoGPTQ's own code made.
//!
//! The golden files hold inputs (weight, Hessian) and outputs (qweight, qzeros, scales, g_idx) of
//! AutoGPTQ 0.4.2 for 3 and 4 bits, every group size, with and without act-order, a dead column and
//! ragged groups. They are not part of the repository: set `GPTQ_SHARED` to the folder that holds
//! `golden/`, or the test says that it was skipped.

use std::path::PathBuf;

use gptq_checkpoint::{Bits, GptqLinear};
use gptq_compute::{Device, Gram, Tensor};
use gptq_quant::{QuantSpec, Recipe, factor, solve};
use half::f16;
use ndarray::Array2;
use safetensors::SafeTensors;

fn golden_dir() -> Option<PathBuf> {
    let shared = std::env::var_os("GPTQ_SHARED").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let dir = shared.join("golden");
    if dir.is_dir() {
        Some(dir)
    } else {
        println!("skipped: no golden tensors in {} (set GPTQ_SHARED)", dir.display());
        None
    }
}

fn words(file: &SafeTensors<'_>, name: &str) -> Vec<u32> {
    let bytes = file.tensor(name).unwrap().data().to_vec();
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn halves(file: &SafeTensors<'_>, name: &str) -> Vec<f16> {
    let bytes = file.tensor(name).unwrap().data().to_vec();
    bytes.chunks_exact(2).map(|b| f16::from_le_bytes(b.try_into().unwrap())).collect()
}

fn matrix(file: &SafeTensors<'_>, name: &str) -> Array2<f32> {
    let tensor = file.tensor(name).unwrap();
    let shape = (tensor.shape()[0], tensor.shape()[1]);
    let values = match tensor.dtype() {
        safetensors::Dtype::F16 => halves(file, name).iter().map(|v| v.to_f32()).collect(),
        _ => words(file, name).into_iter().map(f32::from_bits).collect(),
    };
    Array2::from_shape_vec(shape, values).unwrap()
}

/// tr((W − Ŵ) H (W − Ŵ)ᵀ) in f64.
fn loss(w: &Array2<f32>, quantised: &[f32], h: &Array2<f32>) -> f64 {
    let q = Array2::from_shape_vec(w.dim(), quantised.to_vec()).unwrap();
    let delta = (w - &q).mapv(f64::from);
    (delta.dot(&h.mapv(f64::from)) * &delta).sum()
}

fn check_case(file: &SafeTensors<'_>, name: &str, spec: &QuantSpec) {
    let (w, h) = (matrix(file, "weight"), matrix(file, "hessian"));
    let (out_features, in_features) = w.dim();
    let gram = Gram::from_host(h.clone());
    let factored = factor(&Device::Cpu, &gram, 1.0, spec).unwrap();
    let ours = solve(&Device::Cpu, &Tensor::from_host(w.clone()), &factored, spec).unwrap();
    let bits = Bits::new(spec.bits).unwrap();
    let zeros = vec![spec.zero(); ours.groups * out_features];
    let packed = GptqLinear::pack(
        bits,
        in_features,
        out_features,
        &ours.codes,
        &zeros,
        &ours.scales,
        &ours.g_idx,
    )
    .unwrap();

    let golden = GptqLinear {
        bits,
        in_features,
        out_features,
        groups: ours.groups,
        qweight: words(file, &format!("{name}.qweight")),
        qzeros: words(file, &format!("{name}.qzeros")),
        scales: halves(file, &format!("{name}.scales")),
        g_idx: words(file, &format!("{name}.g_idx")),
    };
    assert_eq!(packed.g_idx, golden.g_idx, "{name}: g_idx");
    assert_eq!(packed.qzeros, golden.qzeros, "{name}: qzeros");
    let close = |a: &f16, b: &f16| a.to_bits().abs_diff(b.to_bits()) <= 1;
    let off = packed.scales.iter().zip(&golden.scales).filter(|(a, b)| !close(a, b)).count();
    assert_eq!(off, 0, "{name}: scales beyond the last bit");
    let differing_scales = packed.scales.iter().zip(&golden.scales).filter(|(a, b)| a != b).count();
    let (a, b) = (packed.unpack_codes(), golden.unpack_codes());
    let same = a.iter().zip(&b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64;
    let ratio = loss(&w, &packed.dequantise(), &h) / loss(&w, &golden.dequantise(), &h);
    println!(
        "{name}: {:.4} % of codes, loss ratio {ratio:.6}, {differing_scales} scales in the last bit",
        same * 100.0
    );
    assert!(same >= 0.999, "{name}: only {:.4} % of codes are the same", same * 100.0);
    assert!((ratio - 1.0).abs() <= 1e-3, "{name}: loss ratio {ratio}");
}

#[test]
fn every_golden_case_is_reproduced() {
    let Some(dir) = golden_dir() else { return };
    let mut cases = 0;
    for file_name in ["square", "wide", "ragged"] {
        let bytes = std::fs::read(dir.join(format!("{file_name}.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for bits in [3, 4] {
            for (group, group_size) in
                [(-1, None), (32, Some(32)), (64, Some(64)), (128, Some(128))]
            {
                for act_order in [false, true] {
                    let act = if act_order { "True" } else { "False" };
                    let spec = QuantSpec {
                        bits,
                        group_size,
                        act_order,
                        damp: 0.01,
                        recipe: Recipe::AutoGptq,
                    };
                    print!("{file_name} ");
                    check_case(&file, &format!("{bits}bit.{group}g.act_{act}"), &spec);
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, 48);
}
