// ldmatrix and mma.sync. Lane maps are those of kernels/lib/fragments.cuh. Sums are f32, k ascending; the device's order
// and rounding inside one instruction are not specified.
#include "../include/ptx_twins.h"
#include "../../lib/fragments.cuh"
#include "race.h"
#include "worker.h"

namespace emulator {

namespace {

struct Load {
    const void* row;
    uint32_t* registers;
};

template <int matrices, bool transposed>
void load(unsigned, void* const* operands) {
    const uint16_t* rows[8 * matrices];
    for (int i = 0; i < 8 * matrices; i++) rows[i] = static_cast<const uint16_t*>(static_cast<Load*>(operands[i])->row);
    for (int lane = 0; lane < int(warp_size); lane++) {
        const int group = fragments::group(lane), pair = 2 * fragments::member(lane);
        uint32_t* registers = static_cast<Load*>(operands[lane])->registers;
        for (int j = 0; j < matrices; j++) {
            const uint16_t* const* m = rows + 8 * j;
            uint32_t low = transposed ? m[pair][group] : m[group][pair];
            uint32_t high = transposed ? m[pair + 1][group] : m[group][pair + 1];
            registers[j] = low | high << 16;
        }
    }
}

struct Product {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

float half_of(uint32_t pair, int h) { return __uint_as_float(h ? pair & 0xffff0000u : pair << 16); }
/// The tensor core ignores the low 13 bits.
float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

template <int depth>
void multiply(void* const* operands, const float (&a)[16][depth], const float (&b)[depth][8]) {
    float c[16][8];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            c[fragments::c_row(lane, i)][fragments::c_column(lane, i)] = static_cast<Product*>(operands[lane])->d[i];
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < depth; k++)
            for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            static_cast<Product*>(operands[lane])->d[i] = c[fragments::c_row(lane, i)][fragments::c_column(lane, i)];
}

void multiply_bf16(unsigned, void* const* operands) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Product& part = *static_cast<Product*>(operands[lane]);
        for (int h = 0; h < 2; h++) {
            for (int i = 0; i < 4; i++) a[fragments::a_row(lane, i)][fragments::a_k(lane, i, h)] = half_of(part.a[i], h);
            for (int i = 0; i < 2; i++) b[fragments::b_k(lane, i, h)][fragments::b_column(lane)] = half_of(part.b[i], h);
        }
    }
    multiply(operands, a, b);
}

void multiply_tf32(unsigned, void* const* operands) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
        const Product& part = *static_cast<Product*>(operands[lane]);
        for (int i = 0; i < 4; i++) a[fragments::a_row(lane, i)][fragments::a_k_tf32(lane, i)] = tf32(part.a[i]);
        for (int i = 0; i < 2; i++) b[fragments::b_k_tf32(lane, i)][fragments::b_column(lane)] = tf32(part.b[i]);
    }
    multiply(operands, a, b);
}

constexpr unsigned whole_warp = 0xffffffffu;

} // namespace

void load_matrices(uint32_t* registers, const void* row, int matrices, bool transposed, Site site) {
    if (current->lane < unsigned(8 * matrices)) { // the other lanes' addresses are not used
        if (shared_offset(row, 16, site) % 16) fail(site, "the row address of ldmatrix is not a multiple of 16");
        race::touch(row, 16, false, site);
    }
    static constexpr Meeting plain[] = {load<1, false>, load<2, false>, load<4, false>};
    static constexpr Meeting across[] = {load<1, true>, load<2, true>, load<4, true>};
    Load operands{row, registers};
    meet(whole_warp, Collective::ldmatrix, &operands, (transposed ? across : plain)[matrices / 2], site);
}

void mma_bf16_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    Product operands{d, a, b};
    meet(whole_warp, Collective::mma, &operands, multiply_bf16, site);
}

void mma_tf32_m16n8k8(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    Product operands{d, a, b};
    meet(whole_warp, Collective::mma, &operands, multiply_tf32, site);
}

} // namespace emulator
