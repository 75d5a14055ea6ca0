//! The stand-in for the Hub on its own, for clients that are no tests: prints its address, and goes on
//! until its standard input ends.
//!
//! `cargo run -p gptq-cli --example hub_stand_in`

#![expect(clippy::unwrap_used, reason = "part of the tests")]
#![expect(clippy::print_stdout, reason = "the address is the output")]
#![expect(dead_code, reason = "no faults are planned here")]

#[path = "mod.rs"]
mod hub_support;

fn main() {
    let hub = hub_support::StandIn::start();
    println!("{} {}", hub.address, hub_support::TOKEN);
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
}
