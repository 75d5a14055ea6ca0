//! `gptq bench`: what this machine reaches on a block's operations.

use anyhow::Result;
use gptq_compute::Device;
use gptq_pipeline::bench::{Measurement, bench};

use super::table::table;
use super::{print_json, print_result};
use crate::args::BenchArgs;

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let device = Device::Cpu;
    let measurements = bench(&device, args.width, args.tokens)?;
    if args.json {
        return print_json(&measurements);
    }
    let header = ["operation", "shape", "seconds", "GFLOP/s", "of matrixmultiply × threads"];
    let rows: Vec<Vec<String>> = measurements.iter().map(cells).collect();
    print_result(&format!("{}\n{}\n", table(&header, 2, &rows), device.name()))
}

fn cells(m: &Measurement) -> Vec<String> {
    vec![
        m.operation.clone(),
        m.shape.clone(),
        format!("{:.4}", m.seconds),
        format!("{:.1}", m.rate() / 1e9),
        m.fraction().map_or_else(String::new, |f| format!("{:.0} %", f * 100.0)),
    ]
}
