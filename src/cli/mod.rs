//! The command line: what was typed ([`args`]), what it means ([`plan`]), what is done ([`run`]), what is printed.

pub mod args;
pub mod data;
mod dry_run;
pub mod flow;
pub mod plan;
mod print;
pub mod run;
pub mod size;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};

/// Runs the command that was typed. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
pub fn main() -> ExitCode {
    let cli = args::Cli::parse();
    log_to_stderr(&cli.global);
    match stop_flag().and_then(|stop| run::run(&cli, stop)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("anabranch: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// A flag that SIGINT and SIGTERM set; a second signal ends the process at once.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .and_then(|_| flag::register(signal, Arc::clone(&stop)))
            .map_err(|e| Error::Usage(format!("cannot listen to signal {signal}: {e}")))?;
    }
    Ok(stop)
}

fn log_to_stderr(global: &args::Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, _) => "debug",
    };
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("anabranch={level}")))
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
}
