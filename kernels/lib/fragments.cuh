// Which lane holds which element of the operands of mma.sync (PTX ISA, "Matrix Fragments for mma").
//
// With group = lane / 4 (0..7) and member = lane % 4:
//
//   m16n8k16, bf16: A is 16×16 (row, k) in 4 registers of 2, B is 16×8 (k, column) in 2 registers of 2
//     A register i, half h:  row = group + 8·(i & 1),  k = 2·member + h + 8·(i >> 1)
//     B register i, half h:  k = 2·member + h + 8·i,   column = group
//   m16n8k8, tf32: A is 16×8 in 4 registers, B is 8×8 in 2 registers
//     A register i:          row = group + 8·(i & 1),  k = member + 4·(i >> 1)
//     B register i:          k = member + 4·i,         column = group
//   both: C and D are 16×8 in 4 floats
//     C float i:             row = group + 8·(i >> 1), column = 2·member + (i & 1)
//
// ldmatrix: lanes 8j..8j+7 give the addresses of the eight 16-byte rows of matrix j; afterwards register j of a lane
// holds elements 2·member and 2·member + 1 of row `group` of matrix j, or, transposed, of column `group`.
// So ldmatrix_x4 on [16 rows][16 k] of A, lane l pointing at row l % 16, k = 8·(l / 16), fills A's four registers;
// ldmatrix_x4 on [16 columns][16 k] of B (k contiguous), lane l at column l % 8 + 8·(l / 16), k = 8·(l / 8 % 2), fills
// B of two neighbouring n8 tiles: registers 0, 1 and 2, 3; with k the strided dimension, use the transposed form.
#pragma once

namespace fragments {

__host__ __device__ constexpr int group(int lane) { return lane >> 2; }
__host__ __device__ constexpr int member(int lane) { return lane & 3; }

__host__ __device__ constexpr int a_row(int lane, int i) { return group(lane) + 8 * (i & 1); }
__host__ __device__ constexpr int a_k(int lane, int i, int h) { return 2 * member(lane) + h + 8 * (i >> 1); }
__host__ __device__ constexpr int b_k(int lane, int i, int h) { return 2 * member(lane) + h + 8 * i; }
__host__ __device__ constexpr int b_column(int lane) { return group(lane); }
__host__ __device__ constexpr int c_row(int lane, int i) { return group(lane) + 8 * (i >> 1); }
__host__ __device__ constexpr int c_column(int lane, int i) { return 2 * member(lane) + (i & 1); }

__host__ __device__ constexpr int a_k_tf32(int lane, int i) { return member(lane) + 4 * (i >> 1); }
__host__ __device__ constexpr int b_k_tf32(int lane, int i) { return member(lane) + 4 * i; }

} // namespace fragments
