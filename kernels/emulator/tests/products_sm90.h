// Tests of kernels/linear_sm90.cu and linear_bwd_sm90.cu: the cases of the other kernels, by as many blocks as tiles and by
// few that take several.
#pragma once
#include "products.h"
#include "tensor_map.h"

namespace products_sm90 {

using namespace products;

constexpr unsigned threads = 384;
constexpr int box = 128, box_across = 64, row_tile = 128, column_tile = 256;

inline TensorMap map_of(const Matrix& m, int box_rows) { return tensor_map(m.pointer(), m.rows, m.width, m.ld, box_rows); }

// As in linear_sm90.cu.
struct Output {
    unsigned long long y, bias;
    int width, ld, groups_end, tiles_end;
};
struct Rows {
    int start, end, rank, unused;
};
struct Task {
    TensorMap x, w[4], t[12], factor[12];
    unsigned long long residual, h;
    int tokens, copies, inner, across;
    Output output[4];
    Rows group[12];
};

inline void linear(const Case& test, unsigned blocks) {
    Inputs in(test);
    Task task{};
    task.x = map_of(in.x, box);
    task.tokens = test.tokens, task.copies = test.copies, task.inner = test.inner;
    const bool pair = test.with == Case::swiglu;
    int group = 0;
    for (size_t j = 0; j < test.widths.size(); j++) {
        task.w[j] = map_of(in.w[j], box);
        for (const Group& g : test.groups) {
            const Matrix& t = in.t[j];
            task.t[group] = tensor_map(t.pointer() + size_t(2) * g.start * t.ld, g.end - g.start, g.rank, t.ld, box);
            task.factor[group] = map_of(in.factors[group], box);
            task.group[group] = {g.start, g.end, g.rank, 0};
            group++;
        }
        task.across += up(test.widths[j], pair ? column_tile / 2 : column_tile);
        task.output[j] = {in.y[j].pointer(), in.bias(j), test.widths[j], in.y[j].ld, group, task.across};
    }
    if (pair) task.across = task.output[0].tiles_end, task.h = in.h.pointer();
    if (test.with == Case::residual) task.residual = in.residual.pointer();
    const unsigned tiles = unsigned(test.copies * up(test.tokens, row_tile) * task.across);
    const char* kernel = pair ? "linear_swiglu_sm90" : "linear_sm90";
    in.expect(kernel, launch(kernel, {std::min(blocks, tiles), 1, threads, own_struct}, task));
}

// As in linear_bwd_sm90.cu.
struct TaskBwd {
    TensorMap u, a, dy[4], w[4];
    unsigned long long dx;
    int tokens, inner, ld_x, ranks, outputs, drops, width[4];
    Dropout dropout;
};

inline void linear_bwd(const CaseBwd& test, unsigned blocks) {
    InputsBwd in(test);
    TaskBwd task{};
    task.u = map_of(in.u, box), task.a = map_of(in.a, box_across);
    task.dx = in.dx.pointer();
    task.tokens = test.tokens, task.inner = test.inner, task.ld_x = in.dx.ld, task.ranks = test.ranks;
    task.outputs = int(in.w.size()), task.drops = test.p > 0, task.dropout = in.dropout;
    for (size_t j = 0; j < in.w.size(); j++) {
        task.dy[j] = map_of(in.dy[j], box), task.w[j] = map_of(in.w[j], box_across);
        task.width[j] = test.widths[j];
    }
    const unsigned tiles = unsigned(up(test.tokens, row_tile) * up(test.inner, column_tile));
    in.expect("linear_bwd_sm90", launch("linear_bwd_sm90", {std::min(blocks, tiles), 1, threads, own_struct}, task));
}

/// K of more tiles than the ring has, and ranks of more than one.
inline void linear() {
    std::vector<Case> cases = linear_cases();
    cases.push_back({140, 2, 600, {300, 5}, {{0, 150, 80}, {150, 279, 16}}, Case::none});
    cases.push_back({131, 1, 330, {140, 140}, {{0, 60, 70}, {60, 131, 3}}, Case::swiglu});
    for (const Case& test : cases)
        for (const unsigned blocks : {1u, 1000u}) linear(test, blocks);
}

inline void linear_bwd() {
    std::vector<CaseBwd> cases = linear_bwd_cases();
    cases.push_back({140, 300, {400, 3}, 130, 0.3});
    for (const CaseBwd& test : cases)
        for (const unsigned blocks : {1u, 1000u}) linear_bwd(test, blocks);
}

} // namespace products_sm90
