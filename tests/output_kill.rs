//! A run that is killed at any moment leaves the old output or the new one whole, and the next start tidies up.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anabranch::checkpoint::output::{Begun, Output, OutputOptions};
use anabranch::checkpoint::provenance::{Provenance, Verdict};

const CHILD: &str = "ANABRANCH_TEST_OUTPUT";

/// Replaces the output again and again, until it is killed.
#[test]
#[ignore = "the process that `killed_at_any_moment` starts and kills"]
fn child() {
    let Some(out) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    for round in 0u64.. {
        let options = OutputOptions { force: true, resume: false };
        let Begun::Work(output) = Output::begin(&out, "test", "p", options).unwrap() else { unreachable!() };
        std::fs::create_dir(output.dir().join("sub")).unwrap();
        for name in ["a", "sub/b", "sub/c"] {
            std::fs::write(output.dir().join(name), format!("{name} {round}")).unwrap();
        }
        Provenance::new("test").seal(output.dir(), BTreeMap::new()).unwrap();
        output.finish().unwrap();
    }
}

fn check_whole(out: &Path) {
    let verdicts = Provenance::verify(out).unwrap();
    assert_eq!(verdicts.len(), 3);
    assert!(verdicts.values().all(|v| *v == Verdict::Same), "{verdicts:?}");
}

#[test]
fn killed_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut seen = 0;
    for round in 0..60u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env(CHILD, &out)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Moments spread over the start of the process and several replacements.
        std::thread::sleep(Duration::from_micros(8_000 + round * 7_919 % 40_000));
        assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            seen += 1;
            check_whole(&out);
        } else {
            assert_eq!(seen, 0, "an output that was there is gone");
        }
    }
    assert!(seen > 20, "the child made an output in {seen} rounds only");
    let options = OutputOptions { force: true, resume: false };
    drop(Output::begin(&out, "test", "p", options).unwrap());
    check_whole(&out);
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["out"]);
}
