//! `budget --measure`: the plan of one real step against its measured peak of anonymous memory, each in a process of
//! its own, so that nothing else counts.

#[path = "common/seeded.rs"]
mod seeded;

use std::path::Path;

use assert_cmd::Command;
use serde_json::{Value, json};

/// What `budget --measure --of of` says about the model in `dir`.
fn measured(dir: &Path, of: &str, batch: &str, more: &[&str]) -> Value {
    let mut command = Command::cargo_bin("anabranch").expect("the program");
    command.args(["budget", "--json", "--device", "cpu", "--threads", "2", "--seq", "256", "--measure"]);
    command.args(["--batch", batch, "--of", of, "--model"]).arg(dir).args(more);
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{of}: {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("a JSON document");
    report["measured"].clone()
}

#[test]
fn the_plan_is_what_a_step_takes() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "llama", "hidden_size": 256, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 704, "num_hidden_layers": 4,
        "vocab_size": 4000, "max_position_embeddings": 512});
    seeded::write_model(dir.path(), &config, 1, "BF16");
    for (of, batch, more) in [
        ("train", "8", &["--precision", "f32"][..]),
        ("train", "8", &["--precision", "bf16"]),
        ("train", "8", &["--recompute", "3"]),
        ("train", "8", &["--pack-weights", "off"]),
        ("eval", "32", &[]),
        ("prune", "1", &[]),
    ] {
        let m = measured(dir.path(), of, batch, more);
        let Some(peak) = m["peak"].as_f64() else {
            println!("skipped: the kernel does not say how much memory is anonymous");
            return;
        };
        let ratio = peak / m["planned"].as_f64().expect("a number");
        println!("{of} {more:?}: planned {}, measured {peak}, ratio {ratio:.3}", m["planned"]);
        assert!((0.9..=1.1).contains(&ratio), "{of} {more:?}: measured / planned is {ratio}\n{m:#}");
    }
}
