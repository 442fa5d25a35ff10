//! Compiles `kernels/*.cu` with nvcc, where there is one, and embeds the result.
//!
//! Found in `$NVCC`, `$CUDA_HOME`, `$CUDA_PATH`, `PATH`, the project's `.venv` (tools/setup-cuda) or /usr/local/cuda.
//! `ANABRANCH_CUDA_ARCHS` names the architectures (`sm_80,sm_90a`). One fat binary a file; only what is older than a
//! source or header that it includes is compiled again, and all builds of a profile share it (a lint and a test have an
//! OUT_DIR each). `ledger.tsv` lists each kernel's registers, shared memory and spills. The feature `emulator` also
//! builds a driver library that runs the kernels on the CPU, for `cargo test`.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

/// What a build without `ANABRANCH_CUDA_ARCHS` is for, as far as nvcc knows it.
const ARCHS: [&str; 6] = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_120"];
/// Architectures of later years run the intermediate code of this one.
const PORTABLE: &str = "sm_80";
/// Files of this ending are for `HOPPER` alone.
const HOPPER_SUFFIX: &str = "_sm90";
const HOPPER: &str = "sm_90a";

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "ANABRANCH_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let sources = sources(&root.join("kernels"));
    // OUT_DIR is PROFILE/build/anabranch-HASH/out.
    let shared = out.ancestors().nth(3).expect("cargo makes OUT_DIR").join("kernels");
    let _one_at_a_time = lock(&shared);
    let emulator = env::var_os("CARGO_FEATURE_EMULATOR").is_some();
    let nvcc = find_nvcc(&root);
    let mut toolkit = Toolkit { release: (0, 0), archs: Vec::new() };
    let images = match &nvcc {
        Some(nvcc) => {
            println!("cargo:rerun-if-changed={}", nvcc.display());
            let version = version(nvcc);
            toolkit = Toolkit { release: release(&version), archs: archs(nvcc) };
            compile_all(nvcc, &version, &toolkit.archs, &sources, &shared)
        }
        None if emulator => sources.iter().map(|source| placeholder(source, &out)).collect(),
        None => {
            if !sources.is_empty() {
                println!(
                    "cargo:warning=nvcc not found: no CUDA kernels in this build (tools/setup-cuda gets it)"
                );
            }
            Vec::new()
        }
    };
    println!("cargo:rustc-check-cfg=cfg(kernels)");
    if !images.is_empty() {
        println!("cargo:rustc-cfg=kernels");
    }
    write_ledger(&root, &out, &images);
    embed(&out, &images, &toolkit);
    if emulator {
        build_emulator(&root, &shared);
    }
}

/// Makes `folder`; held until the file is dropped.
fn lock(folder: &Path) -> fs::File {
    let locked = fs::create_dir_all(folder).and_then(|()| fs::File::create(folder.join("lock")));
    let locked = locked.and_then(|file| file.lock().map(|()| file));
    locked.unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

/// What the images are made with and for.
struct Toolkit {
    release: (u32, u32),
    archs: Vec<String>,
}

/// What was made of one source file.
struct Image {
    stem: String,
    file: PathBuf,
    /// Lines of the ledger.
    ledger: String,
}

fn sources(kernels: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(kernels).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    let mut sources: Vec<PathBuf> = entries;
    sources.retain(|p| p.extension().is_some_and(|e| e == "cu"));
    sources.sort();
    sources
}

fn stem(source: &Path) -> String {
    source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn find_nvcc(root: &Path) -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        let nvcc = PathBuf::from(nvcc);
        assert!(nvcc.is_file(), "NVCC is {}, which is no file", nvcc.display());
        return Some(nvcc);
    }
    let homes =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|h| Path::new(&h).join("bin"));
    let path: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let pythons =
        fs::read_dir(root.join(".venv/lib")).map(|d| d.flatten().collect()).unwrap_or_else(|_| Vec::new());
    let venv = pythons.into_iter().map(|p| p.path().join("site-packages/nvidia/cu13/bin"));
    let candidates = homes.chain(path).chain(venv).chain([PathBuf::from("/usr/local/cuda/bin")]);
    candidates.map(|d| d.join("nvcc")).find(|p| p.is_file())
}

/// What `nvcc --version` prints.
fn version(nvcc: &Path) -> String {
    let version = Command::new(nvcc).arg("--version").output();
    let version = version.unwrap_or_else(|e| panic!("{} --version: {e}", nvcc.display()));
    String::from_utf8_lossy(&version.stdout).into_owned()
}

/// `release 13.0` in it as numbers; zeros where it is not found.
fn release(version: &str) -> (u32, u32) {
    let number = version.split("release ").nth(1).and_then(|t| t.split([',', ' ']).next());
    let parts = number.and_then(|n| n.split_once('.'));
    parts.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?))).unwrap_or((0, 0))
}

/// The architectures asked for; those of the default list that this nvcc knows.
fn archs(nvcc: &Path) -> Vec<String> {
    if let Ok(list) = env::var("ANABRANCH_CUDA_ARCHS") {
        let archs: Vec<String> =
            list.split([',', ' ']).filter(|a| !a.is_empty()).map(|a| a.trim().to_string()).collect();
        if !archs.is_empty() {
            return archs;
        }
    }
    let known = Command::new(nvcc).arg("--list-gpu-code").output();
    let known = known.unwrap_or_else(|e| panic!("{} --list-gpu-code: {e}", nvcc.display()));
    let known = String::from_utf8_lossy(&known.stdout).into_owned();
    let known: BTreeSet<&str> = known.split_whitespace().collect();
    ARCHS.into_iter().filter(|a| known.contains(a.trim_end_matches('a'))).map(str::to_string).collect()
}

/// Arguments of nvcc for `source` besides its name: a file for one architecture only leaves the others out.
fn arguments(source: &Path, archs: &[String]) -> Vec<String> {
    let mut args: Vec<String> =
        ["-std=c++17", "-O3", "-fatbin", "-lineinfo", "-Xptxas=-v", "-MD"].map(str::to_string).into();
    args.push(format!("-I{}", source.with_file_name("lib").display()));
    let hopper = stem(source).ends_with(HOPPER_SUFFIX);
    for arch in archs.iter().filter(|a| !hopper || *a == HOPPER) {
        let number = arch.trim_start_matches("sm_");
        let code = if arch == PORTABLE { format!("[{arch},compute_{number}]") } else { arch.clone() };
        args.push(format!("-gencode=arch=compute_{number},code={code}"));
    }
    args
}

fn compile_all(
    nvcc: &Path,
    version: &str,
    archs: &[String],
    sources: &[PathBuf],
    shared: &Path,
) -> Vec<Image> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).max(1);
    let sources: Vec<&PathBuf> =
        sources.iter().filter(|s| arguments(s, archs).iter().any(|a| a.starts_with("-gencode"))).collect();
    let next = Mutex::new(sources.iter().enumerate());
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(sources.len()) {
            scope.spawn(|| {
                loop {
                    let Some((at, source)) = next.lock().expect("no compiler panicked").next() else {
                        return;
                    };
                    let image = compile(nvcc, version, source, archs, shared);
                    done.lock().expect("no compiler panicked").push((at, image));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no compiler panicked");
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, image)| image).collect()
}

fn compile(nvcc: &Path, version: &str, source: &Path, archs: &[String], shared: &Path) -> Image {
    let stem = stem(source);
    let args = arguments(source, archs);
    let key = format!("{}\n{version}\n{}", nvcc.display(), args.join(" "));
    // A folder for each set of arguments: builds for other architectures keep theirs.
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    let folder = shared.join(format!("{:016x}", hasher.finish()));
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let at = |end: &str| folder.join(format!("{stem}.{end}"));
    let (file, depends, log, key_file) = (at("fatbin"), at("d"), at("log"), at("key"));
    let same = fs::read_to_string(&key_file).is_ok_and(|k| k == key);
    if !(same && newer_than_inputs(&file, &depends)) {
        // A build that is stopped half way must not leave an image that looks done.
        let _ = fs::remove_file(&key_file);
        let run =
            Command::new(nvcc).args(&args).arg("-MF").arg(&depends).arg("-o").arg(&file).arg(source).output();
        let run = run.unwrap_or_else(|e| panic!("{}: {e}", nvcc.display()));
        let text =
            format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
        assert!(run.status.success(), "nvcc failed on {}:\n{text}", source.display());
        // ptxas only informs of warpgroup products that it makes run one after another.
        let told = |line: &&str| line.contains("warning") || line.contains("Performance Loss");
        for line in text.lines().filter(told) {
            println!("cargo:warning={line}");
        }
        fs::write(&log, text).and_then(|()| fs::write(&key_file, key)).expect("the folder can be written");
    }
    let log = fs::read_to_string(&log).unwrap_or_default();
    Image { ledger: ledger(&stem, &log), stem, file }
}

/// Whether `file` is newer than everything that its dependency list names.
fn newer_than_inputs(file: &Path, depends: &Path) -> bool {
    let modified = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
    let (Some(made), Ok(text)) = (modified(file), fs::read_to_string(depends)) else { return false };
    let Some((_, inputs)) = text.split_once(" : ").or_else(|| text.split_once(": ")) else { return false };
    let older = |time: Option<SystemTime>| time.is_some_and(|t| t < made);
    inputs.replace("\\\n", " ").split_whitespace().all(|input| older(modified(Path::new(input))))
}

/// A line for each kernel and architecture: file, kernel, architecture, registers, shared bytes, stack bytes, spill
/// stores and spill loads in bytes, separated by tabs, from what `ptxas -v` printed.
fn ledger(stem: &str, log: &str) -> String {
    let number_before = |line: &str, what: &str| -> u64 {
        let digits = line.split(what).next().filter(|head| head.len() < line.len());
        digits.and_then(|head| head.split_whitespace().last()).and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let (mut lines, mut kernel, mut arch, mut stack) = (String::new(), "", "", [0; 3]);
    for line in log.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2);
            (kernel, arch) = (quoted.next().unwrap_or(""), quoted.next().unwrap_or(""));
        } else if line.contains("bytes stack frame") {
            stack = [" bytes stack frame", " bytes spill stores", " bytes spill loads"]
                .map(|what| number_before(line, what));
        } else if line.contains("Used ") && line.contains(" registers") && !kernel.is_empty() {
            let (registers, shared) = (number_before(line, " registers"), number_before(line, " bytes smem"));
            let [stack, stores, loads] = stack;
            lines +=
                &format!("{stem}\t{kernel}\t{arch}\t{registers}\t{shared}\t{stack}\t{stores}\t{loads}\n");
            kernel = "";
        }
    }
    lines
}

/// Writes the ledger and warns of each spill that `kernels/spills.tsv` does not explain.
fn write_ledger(root: &Path, out: &Path, images: &[Image]) {
    let explained = fs::read_to_string(root.join("kernels/spills.tsv")).unwrap_or_default();
    let explained: BTreeSet<&str> = explained.lines().filter_map(|l| l.split('\t').next()).collect();
    let mut text =
        String::from("file\tkernel\tarchitecture\tregisters\tshared\tstack\tspill stores\tspill loads\n");
    for line in images.iter().flat_map(|i| i.ledger.lines()) {
        text += line;
        text.push('\n');
        let columns: Vec<&str> = line.split('\t').collect();
        let spills = columns[6] != "0" || columns[7] != "0";
        if spills && !explained.contains(columns[1]) {
            println!("cargo:warning={} spills registers on {}", columns[1], columns[2]);
        }
    }
    fs::write(out.join("ledger.tsv"), text).expect("OUT_DIR can be written");
}

/// What stands for the image of a build that has only the emulator, which looks kernels up by name.
fn placeholder(source: &Path, out: &Path) -> Image {
    let stem = stem(source);
    let file = out.join(format!("{stem}.fatbin"));
    fs::write(&file, b"emulated").expect("OUT_DIR can be written");
    Image { stem, file, ledger: String::new() }
}

fn embed(out: &Path, images: &[Image], toolkit: &Toolkit) {
    let mut text = String::from("static IMAGES: &[Image] = &[\n");
    for Image { stem, file, .. } in images {
        text +=
            &format!("    Image {{ file: {stem:?}, bytes: aligned!({:?}) }},\n", file.display().to_string());
    }
    text += "];\n";
    text += &format!("const TOOLKIT: (i32, i32) = {:?};\n", toolkit.release);
    text += &format!("const ARCHITECTURES: &str = {:?};\n", toolkit.archs.join(" "));
    fs::write(out.join("images.rs"), text).expect("OUT_DIR can be written");
}

fn build_emulator(root: &Path, shared: &Path) {
    let folder = shared.join("emulator");
    let script = root.join("kernels/emulator/build.sh");
    let run = Command::new(&script).arg(&folder).output();
    let run = run.unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    let text = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{} failed:\n{text}", script.display());
    // Cargo puts the folder in the library path of what it runs, and there the driver is looked for.
    println!("cargo:rustc-link-search=native={}", folder.display());
}
