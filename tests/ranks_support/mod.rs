//! What the tests of several ranks share: processes started as a launcher starts them, and two
//! results of one job held against each other.

use std::net::TcpListener;
use std::path::Path;

use gptq_checkpoint::{Checkpoint, GptqLinear, LinearShape, ModelConfig};
use serde_json::Value;

use crate::util::{Outcome, Workdir};

/// A port that nobody listens on: the system's choice, given back.
pub(crate) fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// What a launcher tells the process of a rank.
pub(crate) fn launcher(rank: usize, size: usize, port: &str) -> Vec<(String, String)> {
    let (rank, size) = (rank.to_string(), size.to_string());
    let variables = [
        ("RANK", rank.as_str()),
        ("WORLD_SIZE", &size),
        ("LOCAL_RANK", &rank),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ];
    variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
}

/// Runs the binary with these variables.
pub(crate) fn run(dir: &Workdir, args: &[&str], env: &[(String, String)]) -> Outcome {
    let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    dir.gptq_env(args, &env)
}

/// Runs the command as so many processes; outcomes in rank order.
pub(crate) fn ranks(dir: &Workdir, size: usize, args: &[&str]) -> Vec<Outcome> {
    unlike_ranks(dir, &vec![args; size], &[])
}

/// Runs a rank for each command, all at one port.
pub(crate) fn unlike_ranks(
    dir: &Workdir,
    commands: &[&[&str]],
    env: &[(&str, &str)],
) -> Vec<Outcome> {
    let port = free_port();
    let env: Vec<(String, String)> =
        env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (rank, &args) in commands.iter().enumerate() {
            let env = [launcher(rank, commands.len(), &port), env.clone()].concat();
            threads.push(scope.spawn(move || run(dir, args, &env)));
        }
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// How far two results of one job lie apart, block by block.
#[derive(Debug, Default)]
pub(crate) struct Distance {
    /// Share of codes that differ.
    pub(crate) codes: f64,
    /// Share of zeros that differ.
    pub(crate) zeros: f64,
    /// Share of columns that belong to another group.
    pub(crate) columns: f64,
    /// Largest mean relative difference of a linear's scales.
    pub(crate) scales: f64,
    /// Largest distance of two rows of weights, relative to the row.
    pub(crate) row: f64,
    /// Largest relative difference of the errors that the reports give for a linear.
    pub(crate) errors: f64,
}

/// Distances of every block, and as the last one of the tensors outside of blocks, whose rows alone
/// are compared. Nothing is left out: both files must hold the same tensors.
pub(crate) fn distances(a: &Path, b: &Path) -> Vec<Distance> {
    let (a, b) = (Checkpoint::open(a).unwrap(), Checkpoint::open(b).unwrap());
    assert!(a.names().eq(b.names()));
    let config = a.config();
    let blocks = config.num_hidden_layers;
    let mut found = Vec::new();
    for block in 0..blocks {
        let prefix = ModelConfig::block_prefix(block);
        let pairs: Vec<(GptqLinear, GptqLinear)> = config
            .block_linears(block)
            .iter()
            .map(|shape| linears((&a, &b), &format!("{prefix}.{}", shape.name), shape))
            .collect();
        let mut distance = block_distance(&pairs);
        distance.row = distance.row.max(dense_rows((&a, &b), &|name| {
            name.starts_with(&format!("{prefix}.")) && !is_packed(name)
        }));
        distance.errors = errors((&a, &b), block);
        found.push(distance);
    }
    let outside = |name: &str| !name.starts_with("model.layers.");
    found.push(Distance { row: dense_rows((&a, &b), &outside), ..Distance::default() });
    found
}

fn is_packed(name: &str) -> bool {
    ["qweight", "qzeros", "scales", "g_idx"].iter().any(|leaf| name.ends_with(leaf))
}

fn linears(
    (a, b): (&Checkpoint, &Checkpoint),
    prefix: &str,
    shape: &LinearShape,
) -> (GptqLinear, GptqLinear) {
    (a.gptq_linear(prefix, shape).unwrap(), b.gptq_linear(prefix, shape).unwrap())
}

fn block_distance(pairs: &[(GptqLinear, GptqLinear)]) -> Distance {
    let mut found = Distance {
        codes: share(pairs, GptqLinear::unpack_codes),
        zeros: share(pairs, GptqLinear::unpack_zeros),
        columns: share(pairs, |linear| linear.g_idx.clone()),
        ..Distance::default()
    };
    for (a, b) in pairs {
        let scales = a.scales.iter().zip(&b.scales).map(|(a, b)| (a.to_f64(), b.to_f64()));
        let sum: f64 = scales.map(|(a, b)| (a - b).abs() / a).sum();
        found.scales = found.scales.max(sum / a.scales.len() as f64);
        found.row = found.row.max(farthest_row(&a.dequantize(), &b.dequantize(), a.in_features));
    }
    found
}

/// Share of the values in which the linears differ.
fn share<T: PartialEq>(
    pairs: &[(GptqLinear, GptqLinear)],
    of: impl Fn(&GptqLinear) -> Vec<T>,
) -> f64 {
    let (mut different, mut all) = (0, 0);
    for (a, b) in pairs {
        let (a, b) = (of(a), of(b));
        assert_eq!(a.len(), b.len());
        different += a.iter().zip(&b).filter(|(a, b)| a != b).count();
        all += a.len();
    }
    different as f64 / all as f64
}

/// The largest of ‖a − b‖ / ‖a‖ over rows.
fn farthest_row(a: &[f32], b: &[f32], width: usize) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |row: &mut dyn Iterator<Item = f32>| row.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let rows = a.chunks(width).zip(b.chunks(width));
    let distance = |(a, b): (&[f32], &[f32])| {
        let apart = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
        (apart / norm(&mut a.iter().copied()).max(f64::MIN_POSITIVE)).sqrt()
    };
    rows.map(distance).fold(0.0, f64::max)
}

/// The farthest row of all tensors that are chosen.
fn dense_rows((a, b): (&Checkpoint, &Checkpoint), chosen: &dyn Fn(&str) -> bool) -> f64 {
    let mut farthest = 0.0_f64;
    for name in a.names().filter(|name| chosen(name)) {
        let (a, b) = (a.tensor(name).unwrap(), b.tensor(name).unwrap());
        assert_eq!((a.shape, a.dtype), (b.shape, b.dtype), "{name}");
        let width = a.shape.last().copied().unwrap_or(1);
        farthest = farthest.max(farthest_row(&a.to_f32(), &b.to_f32(), width));
    }
    farthest
}

/// The largest relative difference of a block's errors in the two reports.
fn errors((a, b): (&Checkpoint, &Checkpoint), block: usize) -> f64 {
    let linears = |folder: &Checkpoint| -> Vec<(String, f64)> {
        let text = std::fs::read_to_string(folder.dir().join("gptq_report.json")).unwrap();
        let report: Value = serde_json::from_str(&text).unwrap();
        let linears = report["blocks"][block]["linears"].as_array().unwrap();
        let linear = |l: &Value| (l["name"].to_string(), l["relative_error"].as_f64().unwrap());
        linears.iter().map(linear).collect()
    };
    let (a, b) = (linears(a), linears(b));
    assert_eq!(a.len(), 7);
    let mut farthest = 0.0_f64;
    for ((a_name, a), (b_name, b)) in a.iter().zip(&b) {
        assert_eq!(a_name, b_name);
        farthest = farthest.max((b / a - 1.0).abs());
    }
    farthest
}
