//! `doctor`: what this machine has, what this build can use of it, and what would be used.

use std::fmt;

use nvml_wrapper::Nvml;
use serde::Serialize;

use crate::cpu::simd::Instructions;
use crate::model::memory::human_bytes;

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Doctor {
    /// This program's version.
    pub version: &'static str,
    /// Where a command would compute.
    pub device: String,
    /// Why there.
    pub reason: String,
    /// Threads of the CPU back end.
    pub threads: usize,
    /// The instructions that the CPU back end's loops use.
    pub instructions: &'static str,
    /// Instruction sets that the CPU back end looks for, and whether the CPU has them.
    pub cpu_features: Vec<(&'static str, bool)>,
    /// Physical memory in bytes, and what of it is available.
    pub memory: Option<(u64, u64)>,
    /// The control group's limit in bytes.
    pub cgroup_limit: Option<u64>,
    /// NVIDIA devices as the management library names them, with their memory in bytes where it says.
    pub gpus: Vec<Gpu>,
    /// The NVIDIA driver's version, or why there is none.
    pub driver: Result<String, String>,
    /// What this build and the driver have for CUDA.
    pub cuda: Cuda,
}

/// CUDA, as the driver and this build have it.
#[derive(Clone, Debug, Serialize)]
pub struct Cuda {
    /// The CUDA version that the driver is for and its devices, or why there is none.
    pub driver: Result<((i32, i32), usize), String>,
    /// The oldest CUDA version whose driver runs this build's kernels; none without kernels.
    pub least: Option<(i32, i32)>,
    /// Files of kernels in this build.
    pub kernels: usize,
    /// The architectures that they have code for.
    pub architectures: String,
    /// The device that would be used, if it is one of these.
    pub device: Option<CudaDevice>,
}

/// A CUDA device.
#[derive(Clone, Debug, Serialize)]
pub struct CudaDevice {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Free memory in bytes.
    pub free: u64,
    /// All memory in bytes.
    pub total: u64,
    /// Whether its memory is the system's.
    pub unified: bool,
}

/// An NVIDIA device.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Its memory; devices that share the system's say nothing.
    pub memory: Option<u64>,
}

/// Looks at the machine. `device` and `reason` are what the command line would choose.
pub fn run(device: String, reason: String, threads: usize, cgroup_limit: Option<u64>, cuda: Cuda) -> Doctor {
    let (driver, gpus) = match Nvml::init() {
        Ok(nvml) => (nvml.sys_driver_version().map_err(|e| e.to_string()), gpus(&nvml)),
        Err(e) => (Err(format!("no NVIDIA driver answers: {e}")), Vec::new()),
    };
    Doctor {
        version: env!("CARGO_PKG_VERSION"),
        device,
        reason,
        threads,
        instructions: Instructions::used().name(),
        cpu_features: cpu_features(),
        memory: memory(),
        cgroup_limit,
        gpus,
        driver,
        cuda,
    }
}

fn gpus(nvml: &Nvml) -> Vec<Gpu> {
    (0..nvml.device_count().unwrap_or(0))
        .filter_map(|n| nvml.device_by_index(n).ok())
        .map(|d| Gpu {
            name: d.name().unwrap_or_else(|e| format!("a device without a name ({e})")),
            memory: d.memory_info().ok().map(|m| m.total),
        })
        .collect()
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<(&'static str, bool)> {
    vec![
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

/// Total and available memory, as the kernel says.
fn memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let of = |key: &str| -> Option<u64> {
        let line = text.lines().find_map(|l| l.strip_prefix(key))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    Some((of("MemTotal:")?, of("MemAvailable:")?))
}

impl fmt::Display for Doctor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "anabranch {}", self.version)?;
        writeln!(f, "device    {} ({})", self.device, self.reason)?;
        let features: Vec<String> = self
            .cpu_features
            .iter()
            .map(|(name, has)| format!("{name} {}", if *has { "yes" } else { "no" }))
            .collect();
        let (threads, used, has) = (self.threads, self.instructions, features.join(", "));
        writeln!(f, "cpu       {threads} threads, {used} in use; {has}")?;
        if let Some((total, available)) = self.memory {
            writeln!(f, "memory    {}, {} available", human_bytes(total), human_bytes(available))?;
        }
        match self.cgroup_limit {
            Some(limit) => writeln!(f, "limit     {} by the control group", human_bytes(limit))?,
            None => writeln!(f, "limit     none by the control group")?,
        }
        match &self.driver {
            Ok(version) => writeln!(f, "driver    NVIDIA {version}")?,
            Err(why) => writeln!(f, "driver    {why}")?,
        }
        for gpu in &self.gpus {
            let memory = gpu.memory.map_or_else(|| "memory not told".into(), human_bytes);
            writeln!(f, "gpu       {}, {memory}", gpu.name)?;
        }
        match &self.cuda.driver {
            Ok(((major, minor), devices)) => writeln!(f, "cuda      {major}.{minor}, {devices} devices")?,
            Err(why) => writeln!(f, "cuda      {why}")?,
        }
        if let Some(d) = &self.cuda.device {
            let (major, minor) = d.capability;
            let shared = if d.unified { ", shared with the system" } else { "" };
            let (free, total) = (human_bytes(d.free), human_bytes(d.total));
            writeln!(f, "in use    {}, capability {major}.{minor}, {total}{shared}, {free} free", d.name)?;
        }
        match self.cuda.least {
            Some((major, minor)) => {
                let (files, archs) = (self.cuda.kernels, &self.cuda.architectures);
                writeln!(
                    f,
                    "kernels   {files} files for {archs}; they need a driver for CUDA {major}.{minor}"
                )
            }
            None => {
                writeln!(f, "kernels   none in this build: nvcc was not found (tools/setup-cuda gets it)")
            }
        }
    }
}
