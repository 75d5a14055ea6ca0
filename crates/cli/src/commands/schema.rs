//! `gptq schema`: the form of what a command prints with `--json`.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;

use super::{SCHEMAS, print_as_it_is, print_json};
use crate::hint::advised;
use crate::printer::Printer;

/// Print the JSON Schema of what a command prints with --json
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Programs may rely on the keys that a schema requires. New versions may add keys.

Examples:
  gptq schema quantize
  gptq schema > gptq-schemas.json"
)]
pub(crate) struct Args {
    /// The command; without one, an object that has the schemas of all by name
    command: Option<String>,
}

pub(crate) fn run(args: &Args, _: &Printer) -> Result<()> {
    let Some(command) = &args.command else {
        let parsed = |&(name, schema)| Ok((name, serde_json::from_str(schema)?));
        let all: BTreeMap<&str, Value> = SCHEMAS.iter().map(parsed).collect::<Result<_>>()?;
        return print_json(&all);
    };
    let found = SCHEMAS.iter().find(|(name, _)| name == command);
    let Some((_, schema)) = found else {
        let names: Vec<&str> = SCHEMAS.iter().map(|(name, _)| *name).collect();
        return Err(advised(
            format!("`{command}` is no command that has --json"),
            format!("those are {}", names.join(", ")),
        ));
    };
    print_as_it_is(schema)
}
