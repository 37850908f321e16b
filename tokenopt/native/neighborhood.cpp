// Neighbourhood attention in float32, with NATTEN's windows (Hassani et al., arXiv:2204.07143; GNA, arXiv:2504.16922).
//
// Tokens are cut into tasks: one head, one dilation group, a run of queries on the last axis, a tile of the other axes.
// A task walks along the first axis and keeps the keys and values of one window of lines: keys as [line][dim][key], so
// that the scores of a query with LANES keys, neighbours from any one on, are one vector, and a block of queries shares
// each load; values as [line][key][dim]. For every line of queries it computes scores, softmax and weighted sum, in
// buffers that stay in the cache.
//
// Written with the vector extensions of GCC and Clang: the same source for AVX-512, AVX2, SSE and NEON.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Accumulators of a block stay below the number of vector registers: 32 with AVX-512 and NEON, 16 otherwise.
#if defined(__AVX512F__)
constexpr int LANES = 16, QUERIES = 8, BLOCKS = 3, ROWS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, QUERIES = 4, BLOCKS = 3, ROWS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, QUERIES = 8, BLOCKS = 3, ROWS = 4;
#else
constexpr int LANES = 4, QUERIES = 4, BLOCKS = 3, ROWS = 2;
#endif
constexpr double PACK = 8;          // cycles that a vector of keys and their values takes to pack, per dimension
constexpr double SUM = 0.5, FEW = 0.8;  // cycles of a sum in a whole block, and in one of half the queries: more loads
constexpr int COLUMNS = 4;          // vectors of a value row that one weighted sum takes
constexpr int MAX_RUN = 32;         // queries of a run
constexpr int64_t CACHE = 1 << 20;  // bytes of panels that a task may use before it is cut
constexpr double WORTH = 1 << 20;   // multiplications that take longer than starting a thread

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Floats load(const float* from, int64_t count) {
    if (count >= LANES) return load(from);
    Floats x = {};
    std::memcpy(&x, from, count * sizeof(float));
    return x;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline Floats fill(float x) { return x - Floats{}; }

// Up to a whole number of vectors.
inline void copy(const float* from, int64_t count, float* to, float factor = 1) {
    int64_t i = 0;
    for (; i <= count - LANES; i += LANES) store(to + i, load(from + i) * factor);
    if (i < count) store(to + i, load(from + i, count - i) * factor);
}

inline Ints lanes() {
    Ints x;
    for (int i = 0; i < LANES; ++i) x[i] = i;
    return x;
}

#if defined(__AVX512F__)
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

// The two halves of a0 b0 a1 b1 ...
#ifdef __clang__
inline Floats zip_low(Floats a, Floats b) { return __builtin_shufflevector(a, b, LOW); }
inline Floats zip_high(Floats a, Floats b) { return __builtin_shufflevector(a, b, HIGH); }
#else
inline Floats zip_low(Floats a, Floats b) { return __builtin_shuffle(a, b, Ints{LOW}); }
inline Floats zip_high(Floats a, Floats b) { return __builtin_shuffle(a, b, Ints{HIGH}); }
#endif

// An initialiser would be a call of memset, and keep the sums out of registers until then.
template <int Q, int N>
inline void clear(Floats (&x)[Q][N]) {
    for (auto& row : x)
        for (Floats& y : row) y = Floats{};
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// Into every lane.
inline Floats max_of_lanes(Floats x) {
    for (int i = 1; i < LANES; i *= 2) x = max(zip_low(x, x), zip_high(x, x));
    return x;
}

inline float sum_of_lanes(Floats x) {
    for (int i = 1; i < LANES; i *= 2) x = zip_low(x, x) + zip_high(x, x);
    return x[0];
}

// A transposition is log2(LANES) perfect shuffles of the rows.
inline void transpose(Floats (&x)[LANES]) {
    for (int step = 1; step < LANES; step *= 2) {
        Floats y[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) {
            y[2 * i] = zip_low(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = zip_high(x[i], x[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) x[i] = y[i];
    }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 2**x to 1e-7, relative; 0 below 2**-126, so that minus infinity gives 0; not a number stays that.
inline Floats exp2(Floats x) {
    const float round = 12582912.0f;  // 1.5 * 2**23: adding it leaves the nearest integer in the low bits
    Floats shifted = x + round;
    Floats f = x - (shifted - round);
    Floats y = fill(1.5353391e-4f);  // minimax polynomial of degree 6 on [-1/2, 1/2], to 2e-9
    y = y * f + 1.3398879e-3f;
    y = y * f + 9.6184373e-3f;
    y = y * f + 5.5503325e-2f;
    y = y * f + 2.4022648e-1f;
    y = y * f + 6.9314720e-1f;
    y = y * f + 1.0f;
    y *= (Floats)(((Ints)shifted << 23) + (127 << 23));
    return x < fill(-126.0f) ? Floats{} : y;
}

struct Axis {
    int64_t length, window, stride, dilation, causal;

    // Tokens of a dilation group: those with position % dilation == group.
    int64_t members(int64_t group) const { return length / dilation + (group < length % dilation); }

    // First key of a query, both counted inside their dilation group of n tokens.
    int64_t first(int64_t query, int64_t n) const {
        int64_t leader = query / stride * stride + (causal ? stride - 1 : stride / 2);
        leader = std::min(leader, n - 1);
        if (causal) return std::max<int64_t>(leader - window + 1, 0);
        return std::clamp<int64_t>(leader - window / 2, 0, n - window);
    }

    // One past the last key.
    int64_t last(int64_t query, int64_t n) const { return causal ? query + 1 : first(query, n) + window; }

    // Most keys that any `count` neighbouring queries see together.
    int64_t span(int64_t count) const {
        int64_t n = members(0);
        return std::min(n, count + window + stride - 2);
    }
};

}  // namespace

extern "C" struct Problem {
    const float *query, *key, *value, *bias;  // bias may be null
    float* out;                               // [batch, heads, grid, value_dim], contiguous
    int64_t batch, heads, tokens, dim, value_dim;
    int64_t query_strides[3], key_strides[3], value_strides[3];  // of batch, head, token
    int64_t bias_stride;                                         // of batch
    int64_t start;                                               // first token of the grid
    int64_t length[3], window[3], stride[3], dilation[3], causal[3];
    int64_t threads;
    double scale;
};

namespace {

// rows[LANES] of dim floats -> out [dim][LANES], rows `pitch` apart
void pack_keys(const float* const* rows, int64_t dim, float* out, int64_t pitch) {
    for (int64_t d = 0; d < dim; d += LANES) {
        Floats x[LANES];
        for (int i = 0; i < LANES; ++i) x[i] = load(rows[i] + d, dim - d);
        transpose(x);
        int64_t count = std::min<int64_t>(LANES, dim - d);
        if (count == LANES) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) store(out + (d + i) * pitch, x[i]);
        } else {
            for (int i = 0; i < count; ++i) store(out + (d + i) * pitch, x[i]);
        }
    }
}

// query [Q][query_width], N panels [dim][LANES], whose rows are `line` apart -> scores [Q][N * LANES], `pitch` apart
template <int Q, int N>
void score(const float* query, int64_t query_width, const float* const* panels, int64_t line, int64_t dim,
           float* scores, int64_t pitch) {
    Floats sum[Q][N];
    clear(sum);
    for (int64_t d = 0; d < dim; ++d) {
        Floats key[N];
        for (int n = 0; n < N; ++n) key[n] = load(panels[n] + d * line);
        for (int q = 0; q < Q; ++q) {
            Floats x = fill(query[q * query_width + d]);
            for (int n = 0; n < N; ++n) sum[q][n] += x * key[n];
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) store(scores + q * pitch + n * LANES, sum[q][n]);
}

// Scores of `blocks` times Q queries with `count` panels, at an offset of each block. A few panels at a time go through
// all blocks, so that they stay in the nearest cache.
template <int Q>
void score_all(const float* query, int64_t query_width, int64_t blocks, const float* const* panels,
               const int64_t* offsets, int64_t count, int64_t line, int64_t dim, float* scores, int64_t pitch) {
    for (int64_t i = 0; i < count;) {
        int64_t left = count - i;
        // 4 left are 2 + 2, not 3 + 1: one panel alone has too few sums to hide the latency of an addition
        int64_t n = left == 4 ? 2 : std::min<int64_t>(left, BLOCKS);
        for (int64_t b = 0; b < blocks; ++b) {
            const float* at[BLOCKS];
            for (int64_t j = 0; j < n; ++j) at[j] = panels[i + j] + offsets[b];
            (n == 3 ? score<Q, 3> : n == 2 ? score<Q, 2> : score<Q, 1>)(
                query + b * Q * query_width, query_width, at, line, dim, scores + b * Q * pitch + i * LANES, pitch);
        }
        i += n;
    }
}

struct Sums {
    const float* weights;  // [Q] rows `pitch` apart, of `line_weights` for each line
    const float* values;   // [keys][width], `width` a multiple of LANES; the first key that has a weight
    const int64_t* lines;  // which lines of `values`, of `line_keys` each, the rows of weights go over
    int64_t pitch, width, line_weights, line_keys, line_count, first, last;
    const float* extra_weights;
    const float* extra_values;
    int64_t extra;
};

// out[q] = factor[q] * the sum of weights[q][key] * values[key], over keys [first, last) of every line and all extra
// keys. These are the keys of Q queries together: a weight is 0 where a query does not see the key.
template <int Q, int C>
void weigh(const Sums& s, int64_t column, const float* factor, float* const* out, int64_t value_dim) {
    Floats sum[Q][C];
    clear(sum);
    auto add = [&](const float* weight, const float* value) {
        Floats v[C];
        for (int c = 0; c < C; ++c) v[c] = load(value + c * LANES);
        for (int q = 0; q < Q; ++q) {
            Floats w = fill(weight[q * s.pitch]);
            for (int c = 0; c < C; ++c) sum[q][c] += w * v[c];
        }
    };
    for (int64_t i = 0; i < s.line_count; ++i) {
        const float* weight = s.weights + i * s.line_weights + s.first;
        const float* value = s.values + (s.lines[i] * s.line_keys + s.first) * s.width + column;
        for (int64_t n = s.last - s.first; n > 0; --n, ++weight, value += s.width) add(weight, value);
    }
    for (int64_t i = 0; i < s.extra; ++i) add(s.extra_weights + i, s.extra_values + i * s.width + column);
    for (int q = 0; q < Q; ++q)
        for (int c = 0; c < C; ++c) {
            Floats x = sum[q][c] * factor[q];
            int64_t at = column + c * LANES;
            if (value_dim - at >= LANES) store(out[q] + at, x);
            else std::memcpy(out[q] + at, &x, (value_dim - at) * sizeof(float));
        }
}

template <int Q>
void weigh_columns(const Sums& s, int64_t column, const float* factor, float* const* out, int64_t value_dim) {
    int64_t n = std::min<int64_t>((s.width - column) / LANES, COLUMNS);
    (n == 4 ? weigh<Q, 4> : n == 3 ? weigh<Q, 3> : n == 2 ? weigh<Q, 2> : weigh<Q, 1>)(
        s, column, factor, out, value_dim);
}

struct Plan {
    const Problem& p;
    Axis axes[3];
    int64_t grid, extra, extra_blocks, query_width, width;
    int64_t runs, run, line;  // of the last axis: runs of `run` queries, whose keys take lines of `line` floats
    int64_t block, vectors;   // `block` queries, whose scores with a line are `vectors` vectors, share loads
    int64_t tile[2], tiles[2];  // of the other axes
    int64_t groups[3], lines, window_lines, tasks, threads;

    explicit Plan(const Problem& problem) : p(problem) {
        for (int a = 0; a < 3; ++a) {
            axes[a] = {p.length[a], p.window[a], p.stride[a], p.dilation[a], p.causal[a]};
            groups[a] = p.dilation[a];
        }
        grid = p.length[0] * p.length[1] * p.length[2];
        extra = p.tokens - grid;
        extra_blocks = ceil_div(extra, LANES);
        query_width = ceil_div(p.dim, LANES) * LANES;
        width = ceil_div(p.value_dim, LANES) * LANES;
        window_lines = axes[0].window * axes[1].window;
        double keys = double(window_lines) * axes[2].window + extra;
        double work = double(p.batch) * p.heads * grid * keys * (p.dim + p.value_dim);
        threads = std::max<int64_t>(1, std::min<double>(p.threads, work / WORTH));
        choose_run();
        choose_tiles();
    }

    // The run and the block with the fewest operations: long ones share more, short ones compute fewer scores outside
    // of windows.
    void choose_run() {
        const int64_t n = axes[2].members(0);
        const double all = double(axes[0].members(0)) * axes[1].members(0);
        double best = std::numeric_limits<double>::infinity();
        for (int64_t size : {QUERIES / 2, QUERIES})
            for (int64_t length = size; length <= MAX_RUN; length += size) {
                int64_t count = ceil_div(n, length), even = ceil_div(n, count);
                int64_t keys = ceil_div(axes[2].span(even), LANES), seen = ceil_div(axes[2].span(size), LANES);
                double compute = (size == QUERIES ? SUM : FEW) * ceil_div(even, size) * size * window_lines * seen;
                double cost = count * all * (PACK * keys + compute);
                if (cost >= best) continue;
                best = cost, runs = count, run = even, line = keys * LANES, block = size, vectors = seen;
            }
    }

    // A window of the first axis, and all that a tile sees of the second.
    int64_t key_lines() const { return axes[0].window * axes[1].span(tile[1]); }

    void choose_tiles() {
        for (int a = 0; a < 2; ++a) tile[a] = axes[a].members(0);
        int64_t bytes = line * (p.dim + width) * sizeof(float);
        for (;;) {  // smaller, until the panels fit the cache and there is work for all threads
            for (int a = 0; a < 2; ++a) tiles[a] = ceil_div(axes[a].members(0), tile[a]);
            tasks = p.batch * p.heads * groups[0] * groups[1] * groups[2] * runs * tiles[0] * tiles[1];
            bool large = key_lines() * bytes > CACHE && tile[1] >= 2 * axes[1].window;
            bool few = threads > 1 && tasks < 4 * threads && tile[0] * tile[1] > 1;
            if (!large && !few) break;
            int axis = large || tile[0] == 1 || (tile[1] > 1 && tile[1] * axes[0].window > tile[0] * axes[1].window);
            tile[axis] = ceil_div(tile[axis], 2);
        }
        lines = key_lines();
    }
};

// Buffers of one thread.
struct Workspace {
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory;
    float *keys, *values, *bias, *extra_keys, *extra_values, *extra_bias, *query, *scores, *zeros;
    int64_t pitch, rows;
    std::vector<const float*> panels;
    std::vector<int64_t> lines;

    explicit Workspace(const Plan& plan) {
        const int64_t extra = plan.extra_blocks * LANES, slots = plan.lines * plan.line;
        pitch = plan.window_lines * plan.vectors * LANES + extra;
        rows = ceil_div(plan.run, plan.block) * plan.block;
        const int64_t sizes[] = {slots * plan.p.dim, slots * plan.width, slots,
                                 extra * plan.p.dim, extra * plan.width, extra,
                                 rows * plan.query_width, rows * pitch, plan.p.dim + LANES};
        float** places[] = {&keys, &values, &bias, &extra_keys, &extra_values, &extra_bias, &query, &scores, &zeros};
        int64_t total = 0;
        for (int64_t size : sizes) total += ceil_div(size, 16) * 16;
        memory.reset(static_cast<float*>(std::aligned_alloc(64, total * sizeof(float))));
        if (!memory) throw std::bad_alloc();
        float* next = memory.get();
        for (int i = 0; i < 9; ++i) *places[i] = next, next += ceil_div(sizes[i], 16) * 16;
        std::fill_n(zeros, plan.p.dim, 0.0f);
        std::fill_n(query, rows * plan.query_width, 0.0f);
        panels.resize(std::max(plan.window_lines * plan.vectors, plan.extra_blocks));
        lines.resize(plan.window_lines);
    }
};

constexpr float LOG2E = 1.44269504f;

// What a thread is at. Coordinates i, j, k and lines are counted inside a dilation group.
struct Task {
    const Plan& plan;
    const Problem& p;
    Workspace& w;
    int64_t batch, head, group[3], n[3];
    const float *query, *key, *value, *bias;

    Task(const Plan& plan, Workspace& workspace) : plan(plan), p(plan.p), w(workspace) {}

    // Token of a position, from the start of the grid.
    int64_t place(int64_t i, int64_t j, int64_t k) const {
        const int64_t at[] = {i, j, k};
        int64_t token = 0;
        for (int a = 0; a < 3; ++a) token = token * p.length[a] + group[a] + at[a] * p.dilation[a];
        return token;
    }

    // `count` tokens -> keys [dim][line], rows of values, biases. What the buffers hold beyond them is not read, or
    // hidden by `soften`.
    template <class Token>
    void pack(int64_t count, Token token, int64_t line, float* keys, float* values, float* biases) {
        for (int64_t from = 0; from < count; from += LANES) {
            const float* rows[LANES];
            for (int i = 0; i < LANES; ++i)
                rows[i] = from + i < count ? key + token(from + i) * p.key_strides[2] : w.zeros;
            pack_keys(rows, p.dim, keys + from, line);
        }
        for (int64_t i = 0; i < count; ++i) {
            const float* row = value + token(i) * p.value_strides[2];
            copy(row, p.value_dim, values + i * plan.width);
            if (bias) biases[i] = bias[token(i)] * LOG2E;
        }
    }

    // Turns a row of scores, of keys from `from` on in every line, into weights over the largest, 0 outside of
    // [first, last); returns 1 / sum.
    float soften(float* row, int64_t window, int64_t from, int64_t first, int64_t last) {
        const float none = -std::numeric_limits<float>::infinity();
        const int64_t line = plan.vectors * LANES;
        const Ints lane = lanes();
        float* extra = row + window * line;
        Floats top = fill(none);
        auto visit = [&](float* at, const float* biases, int64_t first, int64_t last) {
            Floats x = load(at);
            if (bias) x += load(biases);
            x = ((lane >= (int32_t)first) & (lane < (int32_t)last)) ? x : fill(none);
            store(at, x);
            top = max(top, x);
        };
        for (int64_t b = 0, at = from; b < line; b += LANES, at += LANES)
            for (int64_t i = 0; i < window; ++i)
                visit(row + i * line + b, w.bias + w.lines[i] * plan.line + at, first - at, last - at);
        for (int64_t b = 0; b < plan.extra_blocks; ++b)
            visit(extra + b * LANES, w.extra_bias + b * LANES, 0, plan.extra - b * LANES);
        top = max_of_lanes(top);
        Floats sums = {};
        for (float* at = row; at < extra + plan.extra_blocks * LANES; at += LANES) {
            Floats x = exp2(load(at) - top);
            store(at, x);
            sums += x;
        }
        return 1 / sum_of_lanes(sums);
    }

    void run(int64_t index) {
        auto take = [&](int64_t count) {
            int64_t x = index % count;
            index /= count;
            return x;
        };
        int64_t run_index = take(plan.runs), tile_index[2];
        for (int a = 1; a >= 0; --a) tile_index[a] = take(plan.tiles[a]);
        for (int a = 2; a >= 0; --a) group[a] = take(plan.groups[a]), n[a] = plan.axes[a].members(group[a]);
        head = take(p.heads), batch = index;

        int64_t begin[3], end[3];  // queries
        for (int a = 0; a < 3; ++a) {
            int64_t size = a == 2 ? plan.run : plan.tile[a];
            begin[a] = (a == 2 ? run_index : tile_index[a]) * size;
            end[a] = std::min(begin[a] + size, n[a]);
            if (begin[a] >= end[a]) return;
        }
        query = p.query + batch * p.query_strides[0] + head * p.query_strides[1];
        key = p.key + batch * p.key_strides[0] + head * p.key_strides[1];
        value = p.value + batch * p.value_strides[0] + head * p.value_strides[1];
        bias = p.bias ? p.bias + batch * p.bias_stride : nullptr;
        float* out = p.out + (batch * p.heads + head) * plan.grid * p.value_dim;

        int64_t low[3], high[3];  // keys
        for (int a = 0; a < 3; ++a) {
            low[a] = plan.axes[a].first(begin[a], n[a]);
            high[a] = plan.axes[a].last(end[a] - 1, n[a]);
        }
        pack(plan.extra, [&](int64_t k) { return k < p.start ? k : k + plan.grid; }, plan.extra_blocks * LANES,
             w.extra_keys, w.extra_values, w.extra_bias);

        const int64_t count = end[2] - begin[2];
        int64_t first[MAX_RUN], last[MAX_RUN];
        for (int64_t q = 0; q < count; ++q) {
            first[q] = plan.axes[2].first(begin[2] + q, n[2]) - low[2];
            last[q] = plan.axes[2].last(begin[2] + q, n[2]) - low[2];
        }
        int64_t next = low[0];
        for (int64_t i = begin[0]; i < end[0]; ++i) {
            const int64_t until = plan.axes[0].last(i, n[0]);
            for (next = std::max(next, plan.axes[0].first(i, n[0])); next < until; ++next)
                for (int64_t j = low[1]; j < high[1]; ++j) pack_line(next, j, low, high);
            for (int64_t j = begin[1]; j < end[1]; ++j) attend(i, j, begin[2], count, low, high, first, last, out);
        }
    }

    // Where the buffers have a line of keys: the first axis goes round.
    int64_t slot(int64_t i, int64_t j, const int64_t* low, const int64_t* high) const {
        return i % plan.axes[0].window * (high[1] - low[1]) + j - low[1];
    }

    void pack_line(int64_t i, int64_t j, const int64_t* low, const int64_t* high) {
        const int64_t from = p.start + place(i, j, low[2]), step = p.dilation[2];
        const int64_t at = slot(i, j, low, high) * plan.line;
        pack(high[2] - low[2], [=](int64_t k) { return from + k * step; }, plan.line, w.keys + at * p.dim,
             w.values + at * plan.width, w.bias + at);
    }

    // The queries [k, k + count) of the line at i, j.
    void attend(int64_t i, int64_t j, int64_t k, int64_t count, const int64_t* low, const int64_t* high,
                const int64_t* first, const int64_t* last, float* out) {
        int64_t window = 0;
        for (int64_t y = plan.axes[0].first(i, n[0]); y < plan.axes[0].last(i, n[0]); ++y)
            for (int64_t x = plan.axes[1].first(j, n[1]); x < plan.axes[1].last(j, n[1]); ++x)
                w.lines[window++] = slot(y, x, low, high);

        const float factor = float(p.scale) * LOG2E;  // the softmax is of powers of two
        int64_t target = place(i, j, k);
        for (int64_t q = 0; q < count; ++q) {
            const float* from = query + (p.start + target + q * p.dilation[2]) * p.query_strides[2];
            copy(from, p.dim, w.query + q * plan.query_width, factor);
        }
        const int64_t line = plan.vectors * LANES, blocks = ceil_div(count, plan.block);
        int64_t from[MAX_RUN], none[MAX_RUN] = {}, panels = 0;
        for (int64_t b = 0; b < blocks; ++b) from[b] = std::min(first[b * plan.block], plan.line - line);
        for (int64_t l = 0; l < window; ++l)
            for (int64_t v = 0; v < plan.vectors; ++v)
                w.panels[panels++] = w.keys + w.lines[l] * plan.line * p.dim + v * LANES;
        score(blocks, from, panels, plan.line, w.scores);
        for (int64_t b = 0; b < plan.extra_blocks; ++b) w.panels[b] = w.extra_keys + b * LANES;
        score(blocks, none, plan.extra_blocks, plan.extra_blocks * LANES, w.scores + window * line);
        float inverse[MAX_RUN];
        float* targets[MAX_RUN];
        for (int64_t q = 0; q < count; ++q) {
            inverse[q] = soften(w.scores + q * w.pitch, window, from[q / plan.block], first[q], last[q]);
            targets[q] = out + (target + q * p.dilation[2]) * p.value_dim;
        }
        for (int64_t column = 0; column < plan.width; column += COLUMNS * LANES)
            for (int64_t q = 0; q < count;) {
                int64_t step = count - q >= ROWS ? ROWS : 1, skip = from[q / plan.block];
                const float* weights = w.scores + q * w.pitch;
                Sums sums = {weights, w.values + skip * plan.width, w.lines.data(), w.pitch, plan.width, line,
                             plan.line, window, first[q] - skip, last[q + step - 1] - skip, weights + window * line,
                             w.extra_values, plan.extra};
                (step == ROWS ? weigh_columns<ROWS> : weigh_columns<1>)(sums, column, inverse + q, targets + q,
                                                                        p.value_dim);
                q += step;
            }
    }

    void score(int64_t blocks, const int64_t* offsets, int64_t panels, int64_t line, float* scores) {
        (plan.block == QUERIES ? score_all<QUERIES> : score_all<QUERIES / 2>)(
            w.query, plan.query_width, blocks, w.panels.data(), offsets, panels, line, p.dim, scores, w.pitch);
    }
};

}  // namespace

// 0, or 1 where there is not enough memory.
extern "C" int neighborhood_attention(const Problem* problem) try {
    const Plan plan(*problem);
    const int64_t count = std::min(plan.threads, plan.tasks);
    std::vector<Workspace> workspaces;
    workspaces.reserve(count);
    for (int64_t i = 0; i < count; ++i) workspaces.emplace_back(plan);
    std::atomic<int64_t> next{0};
    auto work = [&](Workspace& workspace) {
        Task task(plan, workspace);
        for (int64_t i; (i = next++) < plan.tasks;) task.run(i);
    };
    std::vector<std::thread> threads;
    threads.reserve(count);
    try {
        for (int64_t i = 1; i < count; ++i) threads.emplace_back(work, std::ref(workspaces[i]));
    } catch (const std::system_error&) {
        // no more threads to be had: those there are do it all
    }
    work(workspaces[0]);
    for (std::thread& thread : threads) thread.join();
    return 0;
} catch (const std::exception&) {
    return 1;
}
