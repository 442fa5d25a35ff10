//! The back end without its operations: what moves and what is refused.

use half::{bf16, f16};

#[cfg(feature = "emulator")]
use super::launch::Pointer;
use super::*;
use crate::host::Bytes;
use crate::tensor::MemoryLayout;

/// The first device; none, and a word about it, where no driver answers.
pub fn device() -> Option<Cuda> {
    device_with(None)
}

/// The first device, with this tile for all products; none where it has no such kernel.
pub fn device_with_tile(tile: Tile) -> Option<Cuda> {
    let mut cuda = device()?;
    cuda.pinned = Some(tile);
    (tile != Tile::Hopper || cuda.driver.hopper).then_some(cuda)
}

fn device_with(limit: Option<u64>) -> Option<Cuda> {
    match driver::probe() {
        Ok((_, count)) if count > 0 && !images::all().is_empty() => {
            Some(Cuda::new(0, limit).expect("cuda:0"))
        }
        other if cfg!(feature = "emulator") => panic!("the emulator does not answer: {other:?}"),
        other => {
            eprintln!("skipped, no CUDA device or no kernels: {other:?}");
            None
        }
    }
}

fn read<T: Elem>(cuda: &Cuda, buf: &Buffer<T>, len: usize) -> Vec<T> {
    let mut host = vec![T::zeroed(); len];
    cuda.download(&mut host, DeviceMemory::view(buf, 0..len)).expect("download");
    host
}

#[test]
fn what_goes_up_comes_down() {
    let Some(cuda) = device() else { return };
    // More than the ring, in odd pieces.
    let numbers: Vec<u32> = (0..(5 << 20) + 3).collect();
    let mut a = cuda.alloc::<u32>("a", numbers.len()).unwrap();
    assert!(read(&cuda, &a, 1000).iter().all(|&x| x == 0));
    cuda.upload(DeviceMemory::view_mut(&mut a, 0..numbers.len()), &numbers).unwrap();
    assert_eq!(read(&cuda, &a, numbers.len()), numbers);
    let mut b = cuda.alloc::<u32>("b", 100).unwrap();
    cuda.copy(DeviceMemory::view_mut(&mut b, 10..20), DeviceMemory::view(&a, 100..110)).unwrap();
    cuda.zero(DeviceMemory::view_mut(&mut b, 15..16)).unwrap();
    assert_eq!(read(&cuda, &b, 22)[9..21], [0, 100, 101, 102, 103, 104, 0, 106, 107, 108, 109, 0]);
    assert!(cuda.upload(DeviceMemory::view_mut(&mut b, 0..5), &[1, 2]).is_err());
    drop(a);
    assert_eq!(cuda.held(), 512);
}

#[test]
fn weights_are_rounded_and_padded() {
    let Some(cuda) = device() else { return };
    for (rows, width) in [(3, 5), (2, 100), (300, 5734), (2, 3 << 20)] {
        let exact: Vec<f32> = (0..rows * width).map(|i| 1.0 + i as f32 / 1000.0).collect();
        let row = DeviceMemory::row(width);
        let brain: Vec<bf16> = exact.iter().map(|&x| bf16::from_f32(x)).collect();
        let half: Vec<f16> = exact.iter().map(|&x| f16::from_f32(x)).collect();
        let cases: [(DType, Vec<u8>, Vec<bf16>); 3] = [
            (DType::F32, bytemuck::cast_slice(&exact).to_vec(), brain.clone()),
            (
                DType::F16,
                bytemuck::cast_slice(&half).to_vec(),
                half.iter().map(|x| bf16::from_f32(x.to_f32())).collect(),
            ),
            (DType::BF16, bytemuck::cast_slice(&brain).to_vec(), brain),
        ];
        for (dtype, bytes, want) in cases {
            let range = 0..bytes.len();
            let bytes: Bytes = Arc::new(bytes);
            let source = MatrixSource { name: "w".into(), bytes, range, dtype, size: (rows, width) };
            let matrix = cuda.matrix(source).unwrap();
            assert_eq!((matrix.size(), matrix.dtype()), ((rows, width), DType::BF16));
            let got = read(&cuda, &matrix.elements, rows * row);
            for (got, want) in got.chunks(row).zip(want.chunks(width)) {
                assert!(got[..width] == *want, "{dtype} [{rows}, {width}]");
                assert!(got[width..].iter().all(|x| x.to_bits() == 0), "{dtype} [{rows}, {width}] padding");
            }
        }
    }
}

#[test]
fn lists_are_sent_once() {
    let Some(cuda) = device() else { return };
    for content in [vec![1u32, 2, 3], vec![1, 2, 3], vec![7; 1000], vec![5], vec![]] {
        let list = cuda.list(Kind::Rows, &content).unwrap();
        let mut host = vec![0; content.len()];
        cuda.download(&mut host, list.view()).unwrap();
        assert_eq!(host, content);
    }
}

/// Copies from the host are on a stream of their own: what is on the other one must have read the old numbers, and must
/// find the new ones. `tools/emulate` runs it with streams that do nothing before they must, and with some that do.
#[test]
fn copies_and_kernels_wait_for_each_other() {
    let Some(cuda) = device() else { return };
    const N: usize = 1000;
    const ROUNDS: u32 = 40;
    let mut place = cuda.alloc::<u32>("one place", N).unwrap();
    let mut kept = cuda.alloc::<u32>("what was read", N * ROUNDS as usize).unwrap();
    for round in 0..ROUNDS {
        cuda.upload(DeviceMemory::view_mut(&mut place, 0..N), &[round; N]).unwrap();
        let at = N * round as usize;
        let kept = DeviceMemory::view_mut(&mut kept, at..at + N);
        cuda.copy(kept, DeviceMemory::view(&place, 0..N)).unwrap();
    }
    let got = read(&cuda, &kept, N * ROUNDS as usize);
    assert!(got.chunks(N).zip(0..).all(|(part, round)| part.iter().all(|&x| x == round)));

    // Lists wait for the readers of their own place alone: two of a kind, of which one is on its way.
    for round in 0..ROUNDS {
        let list = cuda.list(Kind::Ids, &[1000 + round % 7; N]).unwrap();
        let at = N * round as usize;
        cuda.copy(DeviceMemory::view_mut(&mut kept, at..at + N), list.view()).unwrap();
    }
    let got = read(&cuda, &kept, N * ROUNDS as usize);
    let want = |round: u32| 1000 + round % 7;
    assert!(got.chunks(N).zip(0..).all(|(part, round)| part.iter().all(|&x| x == want(round))));
}

#[test]
fn no_more_than_the_limit() {
    let Some(cuda) = device_with(Some(1 << 20)) else { return };
    let a = cuda.alloc::<f32>("a", 100_000).unwrap();
    let err = cuda.alloc::<f32>("the second buffer", 200_000).err().expect("too much").to_string();
    assert!(
        err.contains("the second buffer takes 781.2 KiB beside 390.8 KiB, the memory limit is 1.0 MiB"),
        "{err}"
    );
    drop(a);
    cuda.memory.reserve(1 << 20).unwrap();
    let all = cuda.alloc::<u32>("all", 1 << 18).unwrap();
    assert_eq!(cuda.held(), 1 << 20);
    drop(all);
    assert_eq!(cuda.held(), 1 << 20);
    assert!(cuda.memory.reserve((1 << 20) + 1).is_err());
}

/// On a real device nothing works in the process after a fault, so this is the emulator's alone.
#[cfg(feature = "emulator")]
#[test]
fn a_fault_is_told_with_the_kernel_and_its_sizes() {
    let Some(cuda) = device() else { return };
    let kernel = Kernel { file: "sum_sq", name: "sum_sq" };
    // SAFETY: not sound: the address is no memory, which the emulator notices.
    let launched = unsafe { cuda.launch(kernel, Grid::line(1, 256), &[("n", 5)], (Pointer(8), 5i64)) };
    let err = launched.and_then(|()| cuda.synchronize()).expect_err("a fault").to_string();
    assert!(err.contains("cuda:0: ") && err.contains("CUDA_ERROR_") && err.contains("sum_sq (n 5)"), "{err}");
    assert!(!err.contains('\n'), "{err}");
}

#[test]
fn what_is_asked_wrongly_is_refused() {
    let Some(cuda) = device() else { return };
    let err = Cuda::new(1000, None).err().expect("no such device").to_string();
    assert!(err.contains("cuda:1000 does not exist"), "{err}");
    let mut y = cuda.alloc::<f32>("y", 16).unwrap();
    let table = cuda.alloc::<f32>("table", 8).unwrap();
    let op = Rope::<DeviceMemory, f32> {
        x: DeviceMemory::view_mut(&mut y, 0..16),
        cos: DeviceMemory::view(&table, 0..8),
        sin: DeviceMemory::view(&table, 0..8),
        rows: &[0],
        heads: 1,
        head_dim: 16,
        inverse: false,
    };
    let err = cuda.rope(op).expect_err("f32").to_string();
    assert!(err.contains("rope: activations are F32, the CUDA back end computes in BF16"), "{err}");
    // SAFETY: refused before it starts.
    let err = unsafe {
        let kernel = Kernel { file: "swiglu", name: "swiglu_bwd" };
        cuda.launch(kernel, Grid::line(1, 32), &[("T", 1)], (DeviceMemory::view_mut(&mut y, 0..16), 1i32))
    };
    let err = err.expect_err("two arguments").to_string();
    assert!(err.contains("swiglu_bwd: arguments of [8, 4] bytes, the kernel takes [8, 8, 8, 4, 4]"), "{err}");
    // SAFETY: there is no such kernel.
    let err = unsafe { cuda.launch(Kernel { file: "swiglu", name: "glu" }, Grid::line(1, 32), &[], (1i32,)) };
    assert!(
        err.expect_err("no kernel").to_string().contains("glu in kernels/swiglu.cu: CUDA_ERROR_NOT_FOUND")
    );
}
