// The project's kernels against plain loops in f64: usage kernels [KERNEL FILE]
#include "attention.h"
#include "elements.h"
#include "expect.h"
#include "head.h"
#include "products.h"
#include "products_sm90.h"
#include "recovery.h"
#include "rsvd.h"

using namespace device;
using namespace numbers;

namespace {

void rms_norm(int tokens, int width, unsigned threads) {
    const int ld = padded(width);
    const float eps = 1e-5f;
    const auto x = rows(1, tokens, width, ld, 2), dy = rows(2, tokens, width, ld, 1), residual = rows(3, tokens, width, ld, 1);
    const auto w = uniform(4, width, 1);
    Array<uint16_t> x_(x), dy_(dy), residual_(residual), y_(x.size()), dx_(x.size()), dx_alone_(x.size());
    Array<float> w_(w), rstd_(tokens);
    const Shape shape{unsigned(tokens), 1, threads, 32 * sizeof(float)};

    int result = launch("rms_norm", shape, y_, rstd_, x_, w_, width, ld, eps);
    const auto y = y_.read();
    const auto rstd = rstd_.read();
    Worst worst;
    for (int t = 0; t < tokens; t++) {
        const auto row = &x[size_t(t) * ld];
        double squares = 0;
        for (int d = 0; d < width; d++) squares += wide(row[d]) * wide(row[d]);
        const double scale = 1 / sqrt(squares / width + eps);
        worst.add(rstd[t], scale);
        for (int d = 0; d < width; d++) worst.add(wide(y[size_t(t) * ld + d]), wide(row[d]) * scale * w[d]);
    }
    expect("rms_norm", tokens, width, result, worst.error, bf16_tolerance);

    result = launch("rms_norm_bwd", shape, dx_, dy_, residual_, x_, rstd_, w_, width, ld);
    if (!result) result = launch("rms_norm_bwd", shape, dx_alone_, dy_, 0ull, x_, rstd_, w_, width, ld);
    const auto dx = dx_.read(), dx_alone = dx_alone_.read();
    worst = {};
    for (int t = 0; t < tokens; t++) {
        const size_t at = size_t(t) * ld;
        const double scale = rstd[t];
        double mean = 0;
        for (int d = 0; d < width; d++) mean += w[d] * wide(dy[at + d]) * wide(x[at + d]) * scale / width;
        for (int d = 0; d < width; d++) {
            const double alone = scale * (w[d] * wide(dy[at + d]) - wide(x[at + d]) * scale * mean);
            worst.add(wide(dx_alone[at + d]), alone);
            worst.add(wide(dx[at + d]), alone + wide(residual[at + d]));
        }
    }
    expect("rms_norm_bwd", tokens, width, result, worst.error, bf16_tolerance);
}

void swiglu(int tokens, int width) {
    const int ld = padded(width);
    const auto gate = rows(1, tokens, width, ld, 8), up = rows(2, tokens, width, ld, 1), dx = rows(3, tokens, width, ld, 1);
    Array<uint16_t> gate_(gate), up_(up), x_(dx);
    const unsigned threads = 64;
    const Shape shape{unsigned(tokens), (unsigned(width) + 8 * threads - 1) / (8 * threads), threads, 0};

    const int result = launch("swiglu_bwd", shape, x_, gate_, up_, width, ld);
    const auto x = x_.read(), dgate = gate_.read(), dup = up_.read();
    Worst worst;
    for (int t = 0; t < tokens; t++)
        for (int f = 0; f < width; f++) {
            const size_t at = size_t(t) * ld + f;
            const double z = wide(gate[at]), u = wide(up[at]), g = wide(dx[at]), s = 1 / (1 + exp(-z));
            worst.add(wide(x[at]), z * s * u);
            worst.add(wide(dgate[at]), g * u * s * (1 + z * (1 - s)));
            worst.add(wide(dup[at]), g * z * s);
        }
    expect("swiglu_bwd", tokens, width, result, worst.error, bf16_tolerance);
}

void pipeline(int m, int n, int k) {
    const auto a = rows(1, m, k, k, 1), b = rows(2, n, k, k, 1);
    Array<uint16_t> a_(a), b_(b), c_(size_t(m) * n);
    const Shape shape{unsigned(n + 63) / 64, unsigned(m + 63) / 64, 128, 3 * 2 * 64 * 40 * 2};
    const int result = launch("pipeline", shape, c_, a_, b_, m, n, k);
    const auto c = c_.read();
    std::vector<float> wide_a(a.size()), wide_b(b.size());
    for (size_t i = 0; i < a.size(); i++) wide_a[i] = float(wide(a[i]));
    for (size_t i = 0; i < b.size(); i++) wide_b[i] = float(wide(b[i]));
    Worst worst;
    for (int row = 0; row < m; row++)
        for (int column = 0; column < n; column++) {
            double sum = 0;
            for (int i = 0; i < k; i++) sum += wide_a[size_t(row) * k + i] * wide_b[size_t(column) * k + i];
            worst.add(wide(c[size_t(row) * n + column]), sum);
        }
    expect("pipeline", m, n, result, worst.error, bf16_tolerance);
}

struct Test {
    std::vector<std::string> kernels; // files
    void (*run)();
};

const Test tests[] = {
    {{"rms_norm"}, [] { for (int width : {1, 7, 8, 333, 1024}) rms_norm(3, width, width > 512 ? 128 : 64); }},
    {{"swiglu"}, [] { for (int width : {1, 7, 8, 333, 1024}) swiglu(3, width); }},
    {{"embed"}, [] { for (int width : {1, 7, 8, 333, 1024}) embed(3, width); }},
    {{"rope"}, [] { for (int dim : {2, 6, 16, 64, 80, 100}) rope(3, 3, dim); }},
    {{"sum_sq"}, [] { for (int n : {1, 3, 4, 1021, 4096, 9973}) sum_sq(n); }},
    {{"adamw"}, [] { for (int n : {1, 3, 4, 1021, 4096, 9973}) adamw(n); }},
    {{"attention"}, attention::test},
    {{"attention_bwd"}, [] { for (const attention::Case& c : attention::documents()) attention::backward(c); }},
    {{"cross_entropy", "choice"}, heads},
    {{"linear"}, products::linear},
    {{"linear_bwd"}, products::linear_bwd},
    {{"attention_sm90"}, attention::test_hopper},
    {{"linear_sm90"}, products_sm90::linear},
    {{"linear_bwd_sm90"}, products_sm90::linear_bwd},
    {{"lora"}, [] { products::lora(), products::gradients(); }},
    {{"importance"}, products::importance},
    {{"gram"}, recovery::gram},
    {{"apply"}, recovery::apply},
    {{"eigh"}, recovery::eigh},
    {{"gate"}, recovery::gate},
    {{"rsvd"}, rsvd::test},
    {{"merge"}, [] { rsvd::merge(1, 1, {1}), rsvd::merge(18, 300, {3, 0, 130}); }},
    {{"pipeline"}, [] { pipeline(64, 64, 8), pipeline(70, 65, 200), pipeline(128, 64, 256); }},
};

} // namespace

int main(int count, char** arguments) {
    const std::string only = count > 1 ? arguments[1] : "";
    bool found = false;
    for (const Test& test : tests) {
        if (!only.empty() && std::find(test.kernels.begin(), test.kernels.end(), only) == test.kernels.end()) continue;
        found = true;
        test.run();
    }
    if (!found) {
        fprintf(stderr, "kernels: no test of %s\n", only.c_str());
        return 2;
    }
    check(!cuCtxSynchronize(), "synchronize");
}
