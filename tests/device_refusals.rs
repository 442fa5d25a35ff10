//! What is said where `--device cuda` cannot be had: one line with what was wrong, why, and what to do; never the CPU's
//! result instead. Devices that are not there are the emulated driver's, so most of this needs the feature `emulator`.

use std::path::Path;
use std::process::{Command, Output};

fn logits(args: &[&str], env: &[(&str, &str)]) -> Output {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/base");
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("logits.safetensors");
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.args(["logits", "--ids", "1,5,9", "--model"]).arg(base).arg("--out").arg(&out).args(args);
    command.envs(env.iter().copied());
    let done = command.output().expect("the binary starts");
    assert_eq!(done.status.success(), out.exists(), "{done:?}");
    done
}

/// Fails as asked for with one line that holds all `parts`.
fn refused(args: &[&str], env: &[(&str, &str)], parts: &[&str]) {
    let out = logits(args, env);
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "{args:?} {env:?} was done");
    let lines: Vec<&str> = told.lines().filter(|l| !l.starts_with("emulator: ")).collect();
    assert_eq!(lines.len(), 1, "{told}");
    for part in parts {
        assert!(told.contains(part), "{part:?} is not in {told:?}");
    }
}

#[test]
fn f32_is_not_for_cuda() {
    let args = ["--device", "cuda", "--precision", "f32"];
    refused(&args, &[], &["--precision f32 with --device cuda", "computes in bf16", "use --device cpu"]);
}

#[test]
fn no_driver_no_device_or_no_kernels() {
    // Where the driver is in the library path, as with the emulator, it is found no more.
    let out = logits(&["--device", "cuda"], &[("LD_LIBRARY_PATH", "")]);
    if out.status.success() {
        eprintln!("skipped: this machine has a driver in a place of the system");
        return;
    }
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    let why = ["no NVIDIA driver", "no CUDA kernels", "the driver finds none"];
    assert!(why.iter().any(|w| told.contains(w)) && told.contains("use --device cpu"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    // Chosen by itself, the CPU is named as the choice, with the reason.
    let auto =
        Command::new(env!("CARGO_BIN_EXE_anabranch")).arg("doctor").env("LD_LIBRARY_PATH", "").output();
    let told = String::from_utf8_lossy(&auto.expect("the binary starts").stdout).into_owned();
    assert!(told.contains("cpu") && why.iter().any(|w| told.contains(w)), "{told}");
}

#[cfg(feature = "emulator")]
mod emulated {
    use super::*;

    const CUDA: [&str; 2] = ["--device", "cuda"];

    #[test]
    fn devices_that_are_not_there() {
        refused(&["--device", "cuda:7"], &[], &["cuda:7 does not exist", "the driver finds one, cuda:0"]);
        refused(&CUDA, &[("CUDA_VISIBLE_DEVICES", "")], &["the driver finds none", "use --device cpu"]);
    }

    #[test]
    fn devices_that_are_too_old() {
        let old = [("ANABRANCH_EMU_CC", "7.5")];
        refused(
            &CUDA,
            &old,
            &["CPU emulator", "compute capability 7.5", "need 8.0 or later", "--device cpu"],
        );
    }

    #[test]
    fn drivers_that_are_too_old() {
        let doctor = Command::new(env!("CARGO_BIN_EXE_anabranch")).args(["doctor", "--json"]).output();
        let report: serde_json::Value = serde_json::from_slice(&doctor.unwrap().stdout).unwrap();
        if report["cuda"]["least"][0].as_u64() != Some(13) {
            eprintln!("skipped: this build's kernels are not of an nvcc 13");
            return;
        }
        let old = [("ANABRANCH_EMU_DRIVER", "12.8")];
        refused(&CUDA, &old, &["the driver is for CUDA 12.8", "CUDA 13.0 or later", "update the driver"]);
    }

    #[test]
    fn too_little_memory() {
        // Not even a batch's lists.
        let none = [("ANABRANCH_EMU_MEMORY", "1000000")];
        refused(&CUDA, &none, &["CUDA_ERROR_OUT_OF_MEMORY", "a batch's lists", "464.6 KiB are free"]);
    }
}
