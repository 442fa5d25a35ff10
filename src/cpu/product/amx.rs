//! Tiles of AMX: the micro-kernel of products of bf16, and whether the processor and the system have what it takes.
//!
//! Stable Rust has no intrinsics for tiles, and no registers for them: a tile of sums is one block of assembly. Its
//! instructions are as Intel's manual has them (Architectures Software Developer's Manual, volume 2, TDPBF16PS): 16 rows
//! of 64 bytes, `c[m, n] += Σ_k a[m, 2k] b[k, 2n] + a[m, 2k+1] b[k, 2n+1]`, sums in f32, to the nearest, subnormals as 0.

#[cfg(all(target_os = "linux", any(test, feature = "emulator")))]
pub(crate) mod trap;

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use half::bf16;

use super::pairs::{Operands, Pair, Square};

/// Rows of a tile.
const ROWS: usize = 16;
/// Bytes of a row.
const ROW_BYTES: usize = 64;
/// Tiles.
const TILES: usize = 8;

/// The feature whose state the system is asked to keep: the tiles' data.
const TILE_DATA: u64 = 18;
/// `arch_prctl`, and what it is to do: give leave to use a feature.
const ARCH_PRCTL: u64 = 158;
const REQUEST: u64 = 0x1023;

/// Whether tiles of bf16 can be multiplied: the processor has the instructions and Linux lets this process use them.
pub(crate) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| cfg!(target_os = "linux") && built_in() && allowed())
}

/// Whether the processor has the instructions, be they allowed or not.
pub(crate) fn built_in() -> bool {
    // SAFETY: every x86-64 has the instruction.
    #[allow(unused_unsafe)]
    let features = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx } };
    let (of_bf16, tiles) = (features >> 22 & 1 == 1, features >> 24 & 1 == 1);
    of_bf16 && tiles
}

/// Asks Linux for leave to use tiles; it is the process's from then on.
fn allowed() -> bool {
    let answer: i64;
    // SAFETY: this call changes what the process may use and reads and writes no memory of it.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") REQUEST,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

/// What `ldtilecfg` reads: palette, and of each tile the bytes of a row and the rows.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles of 16 rows of 64 bytes, until it is dropped.
pub(super) struct Tiles(());

impl Tiles {
    /// Configures the calling thread's tiles.
    ///
    /// # Safety
    /// They are [`available`].
    pub(super) unsafe fn new() -> Tiles {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..TILES].fill(ROW_BYTES as u16);
        rows[..TILES].fill(ROWS as u8);
        let config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: the processor has the instruction, which reads 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) }
        Tiles(())
    }
}

impl Tiles {
    /// Multiplies and adds `rounds` times four tiles, the sums of which a product makes side by side, and reads nothing: the
    /// multiplications and additions.
    pub(super) fn spin(&self, rounds: usize) -> usize {
        if rounds > 0 {
            // SAFETY: tiles are configured, and no compiler keeps anything in them; no memory is touched.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "tilezero tmm4",
                    "tilezero tmm5",
                    "tilezero tmm6",
                    "tilezero tmm7",
                    "2:",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) rounds => _,
                    options(nostack, nomem),
                );
            }
        }
        4 * 2 * ROWS * ROWS * (ROW_BYTES / size_of::<bf16>()) * rounds
    }
}

impl Square for Tiles {
    const STEP: usize = ROWS;

    #[inline(always)]
    unsafe fn multiply(
        &self,
        Operands { out, out_stride, keep, a, a_stride, b, beside, b_stride, pairs }: Operands,
    ) {
        let steps = pairs / ROWS;
        let b_stride = b_stride * size_of::<Pair>();
        let (out_stride, a_stride) = (out_stride * size_of::<f32>(), a_stride * size_of::<bf16>());
        let below = out.wrapping_byte_add(ROWS * out_stride);
        let a_below = a.wrapping_byte_add(ROWS * a_stride);
        // SAFETY: tiles are configured, and all that is read and written is the caller's; no compiler keeps anything in
        // tiles.
        unsafe {
            asm!(
                "test {keep:l}, {keep:l}",
                "jz 2f",
                "tileloadd tmm0, [{out} + {out_stride}]",
                "tileloadd tmm1, [{out} + {out_stride} + 64]",
                "tileloadd tmm2, [{below} + {out_stride}]",
                "tileloadd tmm3, [{below} + {out_stride} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "test {steps}, {steps}",
                "jz 5f",
                "4:",
                "tileloadd tmm6, [{b} + {b_stride}]",
                "tileloadd tmm4, [{a} + {a_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{beside} + {b_stride}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a_below} + {a_stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 64",
                "add {a_below}, 64",
                "add {b}, {b_step}",
                "add {beside}, {b_step}",
                "dec {steps}",
                "jnz 4b",
                "5:",
                "tilestored [{out} + {out_stride}], tmm0",
                "tilestored [{out} + {out_stride} + 64], tmm1",
                "tilestored [{below} + {out_stride}], tmm2",
                "tilestored [{below} + {out_stride} + 64], tmm3",
                keep = in(reg) usize::from(keep),
                out = in(reg) out,
                out_stride = in(reg) out_stride,
                below = in(reg) below,
                b_stride = in(reg) b_stride,
                b_step = in(reg) ROWS * b_stride,
                a = inout(reg) a => _,
                a_below = inout(reg) a_below => _,
                a_stride = in(reg) a_stride,
                b = inout(reg) b => _,
                beside = inout(reg) beside => _,
                steps = inout(reg) steps => _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made this had the instructions.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}
