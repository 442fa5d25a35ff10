// Tests of cross_entropy and choice.
#pragma once
#include "expect.h"
#include <algorithm>

/// `count` supervised rows of `tokens`, `slice` words to a slice of the gradient's product.
inline void head(int count, int tokens, int vocab, int width, int slice) {
    using namespace device;
    using numbers::wide;
    const int ld = padded(width), ld_v = padded(vocab), ld_d = padded(width), slices = (vocab + slice - 1) / slice;
    const auto x = numbers::rows(1, tokens, width, ld, 1), w = numbers::rows(2, vocab, width, ld, 1);
    const float weight = 0.25f;
    std::vector<uint32_t> rows(count), ids, starts = {0};
    for (int r = 0; r < count; r++) {
        rows[r] = uint32_t(tokens - count + r);
        for (int i = 0; i <= r % 3; i++) ids.push_back(uint32_t(7 * r + 5 * i + vocab - 1) % vocab);
        starts.push_back(uint32_t(ids.size()));
    }
    std::vector<uint32_t> targets(count);
    for (int r = 0; r < count; r++) targets[r] = ids[starts[r]];
    Array<uint16_t> x_(x), w_(w), dx_(std::vector<uint16_t>(x.size(), 0));
    Array<uint32_t> rows_(rows), targets_(targets), ids_(ids), starts_(starts);
    Array<float> logits_(size_t(count) * ld_v), nll_(count), partial_(size_t(slices) * count * ld_d), out_(ids.size());
    const unsigned down = unsigned(count + 127) / 128;
    const auto logits = [&] {
        return launch("cross_entropy_logits", {unsigned(vocab + 127) / 128, down, 128, own_struct}, logits_, x_, w_, rows_, count, vocab, width, ld_v, ld, ld);
    };
    int result = logits();
    if (!result) result = launch("choice", {unsigned(count), 1, 64, own_struct}, out_, logits_, ids_, starts_, vocab, ld_v, 1.0f);
    const int result_choice = result;
    if (!result) result = logits();
    if (!result) result = launch("cross_entropy_gradient", {unsigned(count), 1, 64, own_struct}, nll_, logits_, targets_, vocab, ld_v, weight);
    Shape shape{unsigned(width + 127) / 128, down, 128, own_struct};
    shape.grid_z = unsigned(slices);
    if (!result) result = launch("cross_entropy_product", shape, partial_, logits_, w_, count, vocab, width, slice, ld_v, ld_d, ld);
    if (!result) result = launch("cross_entropy_sum", {unsigned(count), unsigned(width + 511) / 512, 64, 0}, dx_, partial_, rows_, width, slices, ld_d, ld);

    const auto nll = nll_.read(), out = out_.read();
    const auto dx = dx_.read();
    numbers::Worst worst, worst_choice, worst_dx;
    std::vector<double> wide_w(w.size());
    for (size_t i = 0; i < w.size(); i++) wide_w[i] = wide(w[i]);
    for (int r = 0; r < count; r++) {
        std::vector<double> logit(vocab), sums(width);
        double most = -INFINITY, sum = 0;
        for (int v = 0; v < vocab; v++) {
            for (int d = 0; d < width; d++) logit[v] += wide(x[size_t(rows[r]) * ld + d]) * wide_w[size_t(v) * ld + d];
            most = std::max(most, logit[v]);
        }
        for (double l : logit) sum += exp(l - most);
        const double lse = most + log(sum);
        worst.add(nll[r], lse - logit[targets[r]]);
        for (uint32_t p = starts[r]; p < starts[r + 1]; p++) worst_choice.add(out[p], logit[ids[p]] - lse);
        for (int v = 0; v < vocab; v++) {
            const double g = wide(numbers::narrow(float(weight * (exp(logit[v] - lse) - (v == int(targets[r]))))));
            for (int d = 0; d < width; d++) sums[d] += g * wide_w[size_t(v) * ld + d];
        }
        for (int d = 0; d < width; d++) worst_dx.add(wide(dx[size_t(rows[r]) * ld + d]), sums[d]);
    }
    for (int t = 0; t < tokens - count; t++)
        for (int d = 0; d < width; d++) check(dx[size_t(t) * ld + d] == 0, "cross_entropy wrote elsewhere");
    expect("choice", count, vocab, result_choice, worst_choice.error, 1e-5);
    expect("cross_entropy", count, vocab, result, worst.error, 1e-5);
    expect("its gradient", count, vocab, result, worst_dx.error, bf16_tolerance);
}

inline void heads() {
    head(1, 1, 3, 1, 8);
    head(3, 5, 131, 72, 64);
    head(140, 150, 300, 200, 104);
    head(2, 2, 5000, 24, 4096);
}
