//! Tiles of AMX on a processor without them, for tests: what it refuses is done here, one instruction at a time.
//!
//! An instruction that a processor does not have raises a signal. The handler reads which one it was, does what Intel's
//! manual says of it on tiles of its own, and goes on behind it.

use std::cell::RefCell;
use std::sync::Once;

use libc::{c_int, c_void, siginfo_t, ucontext_t};

const TILES: usize = 8;
const ROWS: usize = 16;
const ROW: usize = 64;

/// The tiles of a thread, and how they are configured.
struct State {
    data: [[[u8; ROW]; ROWS]; TILES],
    row_bytes: [usize; TILES],
    rows: [usize; TILES],
}

thread_local! {
    static STATE: RefCell<State> = const {
        RefCell::new(State { data: [[[0; ROW]; ROWS]; TILES], row_bytes: [0; TILES], rows: [0; TILES] })
    };
}

/// Takes over what the processor refuses, from now on, of all threads.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the action is zeroed, which is a valid empty one, and then told its handler, which has the signature
        // that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = refused as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0);
        }
    });
}

/// The handler.
extern "C" fn refused(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the system hands over the context of the thread that was stopped, which this is.
    let registers = unsafe { &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as *const u8;
    match run(at, registers) {
        Some(length) => registers[libc::REG_RIP as usize] += length as i64,
        // Not one of ours: refused again, and then the process ends.
        None => {
            // SAFETY: the default action is what there was before.
            unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        }
    }
}

/// Where the system keeps the register that an instruction calls `n`.
fn register(registers: &[i64; 23], n: usize) -> i64 {
    use libc::{
        REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP, REG_RBX,
        REG_RCX, REG_RDI, REG_RDX, REG_RSI, REG_RSP,
    };
    let all = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10,
        REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    registers[all[n] as usize]
}

/// Does the instruction at `at`; its length, or none if it is not one of tiles.
fn run(at: *const u8, registers: &[i64; 23]) -> Option<usize> {
    // SAFETY: an instruction that was refused can be read, and these are at most ten bytes long, of which none is read
    // before those in front of it say that it is there.
    let byte = |i: usize| unsafe { at.add(i).read() };
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
        return None;
    }
    let (high, prefix, opcode, modrm) = (!byte(1), byte(2) & 3, byte(3), byte(4));
    let third = usize::from(!byte(2) >> 3 & 0xf);
    let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7), usize::from(modrm & 7));
    // Bits of registers beyond the eighth.
    let (index_high, base_high) = (usize::from(high >> 6 & 1) * 8, usize::from(high >> 5 & 1) * 8);
    STATE.with_borrow_mut(|state| match (opcode, prefix, mode) {
        (0x49, 0, 3) => {
            state.rows = [0; TILES];
            Some(5)
        }
        (0x49, 3, 3) => {
            state.data[reg] = [[0; ROW]; ROWS];
            Some(5)
        }
        (0x5c, 2, 3) => {
            state.multiply(reg, rm, third);
            Some(5)
        }
        (0x49 | 0x4b, _, 0..=2) => {
            // The address: base, index and scale where there is a second byte, displacement.
            let sib = (rm == 4).then(|| byte(5));
            let base = sib.map_or(rm, |sib| usize::from(sib & 7)) + base_high;
            let index = sib.map(|sib| (usize::from(sib >> 3 & 7) + index_high, sib >> 6));
            let start = 5 + usize::from(sib.is_some());
            let (size, shift) = match mode {
                0 if base & 7 == 5 => return None,
                0 => (0, 0),
                1 => (1, i64::from(byte(start) as i8)),
                _ => (4, i64::from(i32::from_le_bytes(std::array::from_fn(|i| byte(start + i))))),
            };
            let address = (register(registers, base) + shift) as usize;
            let stride = match index {
                Some((4, _)) | None => 0,
                Some((index, scale)) => (register(registers, index) << scale) as usize,
            };
            // SAFETY: the program that is run had these bytes read or written.
            unsafe {
                match (opcode, prefix) {
                    (0x49, 0) if reg == 0 => state.configure((address as *const [u8; 64]).read_unaligned()),
                    (0x4b, 1 | 3) => state.load(reg, address, stride),
                    (0x4b, 2) => state.store(reg, address, stride),
                    _ => return None,
                }
            }
            Some(start + size)
        }
        _ => None,
    })
}

impl State {
    fn configure(&mut self, config: [u8; 64]) {
        assert!(config[0] == 1 && config[1..16].iter().all(|b| *b == 0), "not the palette of tiles");
        for n in 0..TILES {
            self.row_bytes[n] = usize::from(u16::from_le_bytes([config[16 + 2 * n], config[17 + 2 * n]]));
            self.rows[n] = usize::from(config[48 + n]);
            assert!(self.row_bytes[n] <= ROW && self.rows[n] <= ROWS);
        }
        self.data = [[[0; ROW]; ROWS]; TILES];
    }

    /// # Safety
    /// The tile's rows can be read.
    unsafe fn load(&mut self, n: usize, address: usize, stride: usize) {
        self.data[n] = [[0; ROW]; ROWS];
        for (r, row) in self.data[n][..self.rows[n]].iter_mut().enumerate() {
            let from = address.wrapping_add(r.wrapping_mul(stride)) as *const u8;
            // SAFETY: as the caller says.
            unsafe { from.copy_to_nonoverlapping(row.as_mut_ptr(), self.row_bytes[n]) };
        }
    }

    /// # Safety
    /// The tile's rows can be written.
    unsafe fn store(&self, n: usize, address: usize, stride: usize) {
        for (r, row) in self.data[n][..self.rows[n]].iter().enumerate() {
            let to = address.wrapping_add(r.wrapping_mul(stride)) as *mut u8;
            // SAFETY: as the caller says.
            unsafe { to.copy_from_nonoverlapping(row.as_ptr(), self.row_bytes[n]) };
        }
    }

    /// TDPBF16PS: products of even and of odd places are summed apart, each rounded once, and then added.
    fn multiply(&mut self, c: usize, a: usize, b: usize) {
        let (left, right) = (self.data[a], self.data[b]);
        let half = |row: &[u8; ROW], i: usize| {
            flush(f32::from_bits(u32::from(u16::from_le_bytes([row[2 * i], row[2 * i + 1]])) << 16))
        };
        let (columns, pairs) = (self.row_bytes[c] / 4, self.row_bytes[a] / 4);
        for (out, left) in self.data[c].iter_mut().zip(&left).take(self.rows[c]) {
            for (n, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate().take(columns) {
                let mut sums = [0f32; 2];
                for (k, right) in right.iter().enumerate().take(pairs) {
                    for (odd, sum) in sums.iter_mut().enumerate() {
                        let (x, y) = (half(left, 2 * k + odd), half(right, 2 * n + odd));
                        *sum = flush(x.mul_add(y, *sum));
                    }
                }
                let was = flush(f32::from_le_bytes(*out));
                *out = flush(was + flush(sums[0] + sums[1])).to_le_bytes();
            }
        }
    }
}

/// A subnormal is 0.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}
