//! The gptq command.
fn main() {}
