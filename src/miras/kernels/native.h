// What the generated programs of `native` are made of. `real` is float or double; every tensor is of it, conditions too.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int W = BYTES / sizeof(real);                                     // numbers of a vector register
typedef real vec __attribute__((vector_size(BYTES)));
typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

INLINE vec load(const real *x) { return *(const loose *)x; }
INLINE void store(real *x, vec y) { *(loose *)x = y; }
#if defined(__AVX512F__)
INLINE void stream(real *x, vec y) { _mm512_stream_si512((__m512i *)x, (__m512i)y); }
#elif defined(__AVX__)
INLINE void stream(real *x, vec y) { _mm256_stream_si256((__m256i *)x, (__m256i)y); }
#elif defined(__SSE2__)
INLINE void stream(real *x, vec y) { _mm_stream_si128((__m128i *)x, (__m128i)y); }
#endif

// ---- functions of a number, without branches, so that loops over them become vectors

INLINE float bits_to(int32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
INLINE int32_t bits_of(float x) { int32_t y; std::memcpy(&y, &x, 4); return y; }

INLINE float exp_(float x) {
    float bounded = x < -104.f ? -104.f : (x > 89.f ? 89.f : x);
    float n = (bounded * 1.44269504f + 12582912.f) - 12582912.f;            // the nearest whole number
    float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.f / 5040;
    y = y * r + 1.f / 720;
    y = y * r + 1.f / 120;
    y = y * r + 1.f / 24;
    y = y * r + 1.f / 6;
    y = y * r + .5f;
    y = y * r + 1.f;
    y = y * r + 1.f;
    int32_t whole = (int32_t)n, half = whole >> 1;
    y = y * bits_to((half + 127) << 23) * bits_to((whole - half + 127) << 23);
    return x != x ? x : y;
}
INLINE float log_(float x) {
    float scaled = x < 1.17549435e-38f ? x * 8388608.f : x;
    int32_t bits = bits_of(scaled), n = (bits - 0x3f3504f3) >> 23;          // mantissa from sqrt(1/2) to sqrt(2)
    float m = bits_to(bits - n * 8388608), s = (m - 1.f) / (m + 1.f), s2 = s * s;
    float y = 2.f / 9;
    y = y * s2 + 2.f / 7;
    y = y * s2 + 2.f / 5;
    y = y * s2 + 2.f / 3;
    float k = (float)n - (x < 1.17549435e-38f ? 23.f : 0.f);
    y = (y * s2 * s + k * -2.12194440e-4f) + 2.f * s + k * 0.693359375f;
    float limit = std::numeric_limits<float>::infinity();
    y = x == 0.f ? -limit : (x == limit ? x : y);
    return x >= 0.f ? y : std::numeric_limits<float>::quiet_NaN();
}
// 1 - exp(-x Q(x)), Q fitted to less than 2e-8; beyond 4 it is 1 in single precision.
INLINE float erf_(float x) {
    float t = x < 0.f ? -x : x;
    t = t > 4.f ? 4.f : t;
    float q = 3.143997e-05f;
    q = q * t - 3.0880011e-04f;
    q = q * t + 1.03239353e-03f;
    q = q * t + 5.3694858e-04f;
    q = q * t - 1.958397497e-02f;
    q = q * t + 1.0291962051e-01f;
    q = q * t + 6.3659773183e-01f;
    q = q * t + 1.12838025162f;
    float y = 1.f - exp_(-t * q);
    return x < 0.f ? -y : y;
}
INLINE float tanh_(float x) { return 1.f - 2.f / (1.f + exp_(2.f * x)); }
INLINE float pow_(float x, float y) { return exp_(y * log_(x)); }
INLINE float sin_(float x) { return std::sin(x); }
INLINE float cos_(float x) { return std::cos(x); }

INLINE double exp_(double x) { return std::exp(x); }
INLINE double log_(double x) { return std::log(x); }
INLINE double erf_(double x) { return std::erf(x); }
INLINE double tanh_(double x) { return std::tanh(x); }
INLINE double pow_(double x, double y) { return std::pow(x, y); }
INLINE double sin_(double x) { return std::sin(x); }
INLINE double cos_(double x) { return std::cos(x); }

INLINE real sqrt_(real x) { return std::sqrt(x); }
INLINE real abs_(real x) { return x < 0 ? -x : x; }
INLINE real sign_(real x) { return x > 0 ? real(1) : (x < 0 ? real(-1) : x); }
INLINE real max_(real x, real y) { return x != x ? x : (x > y ? x : y); }
INLINE real min_(real x, real y) { return x != x ? x : (x < y ? x : y); }

// ---- matrix products: C [M, N] by rows, A [M, K] and B [K, N] anywhere

// R rows and V vectors of C, B by rows.
template <int R, int V, int K, int AM, int AK, int BK, int CM>
INLINE void panel(const real *a, const real *b, real *c) {
    vec sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) sum[i][j] = vec{};
    for (int k = 0; k < K; k++) {
        vec row[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) row[j] = load(b + k * BK + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
#pragma GCC unroll 8
            for (int j = 0; j < V; j++) sum[i][j] += a[i * AM + k * AK] * row[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) store(c + i * CM + j * W, sum[i][j]);
}

template <int V, int M, int K, int AM, int AK, int BK, int CM>
INLINE void column(const real *a, const real *b, real *c) {
    constexpr int R = BYTES == 64 ? 8 : 4;
    for (int i = 0; i + R <= M; i += R) panel<R, V, K, AM, AK, BK, CM>(a + i * AM, b, c + i * CM);
    constexpr int rest = M % R;
    if constexpr (rest > 0) panel<rest, V, K, AM, AK, BK, CM>(a + (M - rest) * AM, b, c + (M - rest) * CM);
}

// B by rows.
template <int M, int N, int K, int AM, int AK, int BK, int CM>
void product_rows(const real *a, const real *b, real *c) {
    constexpr int V = BYTES == 64 ? 3 : 2;
    int j = 0;
    if constexpr (N / W >= V)
        for (; j + V * W <= N; j += V * W) column<V, M, K, AM, AK, BK, CM>(a, b + j, c + j);
    for (; j + W <= N; j += W) column<1, M, K, AM, AK, BK, CM>(a, b + j, c + j);
    if constexpr (N % W > 0)
        for (int i = 0; i < M; i++) {
            real sum[N % W] = {};
            for (int k = 0; k < K; k++)
                for (int n = 0; n < N % W; n++) sum[n] += a[i * AM + k * AK] * b[k * BK + j + n];
            for (int n = 0; n < N % W; n++) c[i * CM + j + n] = sum[n];
        }
}

// The numbers of two vectors in turn: of their first halves, and of their second ones.
INLINE void interleave(vec a, vec b, vec &low, vec &high) {
#if defined(__clang__)
    for (int n = 0; n < W / 2; n++) {
        low[2 * n] = a[n], low[2 * n + 1] = b[n];
        high[2 * n] = a[n + W / 2], high[2 * n + 1] = b[n + W / 2];
    }
#else
    typedef std::conditional<sizeof(real) == 4, int32_t, int64_t>::type whole;
    typedef whole index __attribute__((vector_size(BYTES)));
    index first, second;
    for (int n = 0; n < W; n++) first[n] = n / 2 + n % 2 * W, second[n] = first[n] + W / 2;
    low = __builtin_shuffle(a, b, first);
    high = __builtin_shuffle(a, b, second);
#endif
}

// W vectors as the columns of the matrix that they are the rows of.
INLINE void turn(vec *x) {
#pragma GCC unroll 4
    for (int n = 1; n < W; n *= 2) {
        vec y[W];
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; i++) interleave(x[i], x[i + W / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
}

// B by columns, B [K, N] at b[n * BN + k]: W rows of C^T at a time, whose vectors run along M, turned when they are done.
template <int M, int N, int K, int AM, int AK, int BN, int CM>
void product_columns(const real *a, const real *b, real *c) {
    alignas(64) real packed[K * W];
    for (int i = 0; i < M; i += W) {
        const real *side = packed;
        constexpr int SK = AM == 1 ? AK : W;
        if constexpr (AM == 1) {
            side = a + i;
        } else {
            int k = 0;
            if constexpr (AK == 1)
                for (; k + W <= K; k += W) {
                    vec x[W];
                    for (int m = 0; m < W; m++) x[m] = load(a + (i + m) * AM + k);
                    turn(x);
                    for (int m = 0; m < W; m++) store(packed + (k + m) * W, x[m]);
                }
            for (; k < K; k++)
                for (int m = 0; m < W; m++) packed[k * W + m] = a[(i + m) * AM + k * AK];
        }
        for (int j = 0; j < N; j += W) {
            vec sum[W];
#pragma GCC unroll 16
            for (int n = 0; n < W; n++) sum[n] = vec{};
            for (int k = 0; k < K; k++) {
                vec x = load(side + k * SK);
#pragma GCC unroll 16
                for (int n = 0; n < W; n++) sum[n] += b[(j + n) * BN + k] * x;
            }
            turn(sum);
#pragma GCC unroll 16
            for (int m = 0; m < W; m++) store(c + (i + m) * CM + j, sum[m]);
        }
    }
}

// The same where A has rows enough that it pays to turn B, V vectors wide at a time, and go on as if it lay by rows.
template <int V, int M, int K, int AM, int AK, int BN, int CM>
INLINE void column_turned(const real *a, const real *b, real *c) {
    alignas(64) real packed[K * V * W];
    for (int j = 0; j < V; j++)
        for (int k = 0; k < K; k += W) {
            vec x[W];
#pragma GCC unroll 16
            for (int n = 0; n < W; n++) x[n] = load(b + (j * W + n) * BN + k);
            turn(x);
#pragma GCC unroll 16
            for (int n = 0; n < W; n++) store(packed + (k + n) * V * W + j * W, x[n]);
        }
    column<V, M, K, AM, AK, V * W, CM>(a, packed, c);
}

template <int M, int N, int K, int AM, int AK, int BN, int CM>
void product_turned(const real *a, const real *b, real *c) {
    constexpr int V = BYTES == 64 ? 3 : 2, rest = N / W % V;
    int j = 0;
    for (; j + V * W <= N; j += V * W) column_turned<V, M, K, AM, AK, BN, CM>(a, b + j * BN, c + j);
    if constexpr (rest > 0) column_turned<rest, M, K, AM, AK, BN, CM>(a, b + j * BN, c + j);
}

// One row of A and of C, B by rows: enough sums at once that none waits for its own last step.
template <int N, int K, int AK, int BK>
void row_by_rows(const real *a, const real *b, real *c) {
    constexpr int V = std::min(N / W, 16), U = K % std::max(16 / V, 1) == 0 ? std::max(16 / V, 1) : 1;
    for (int j = 0; j + V * W <= N; j += V * W) {
        vec sum[U][V] = {};
        for (int k = 0; k < K; k += U)
#pragma GCC unroll 16
            for (int u = 0; u < U; u++)
#pragma GCC unroll 16
                for (int n = 0; n < V; n++) sum[u][n] += a[(k + u) * AK] * load(b + (k + u) * BK + j + n * W);
#pragma GCC unroll 16
        for (int n = 0; n < V; n++) {
            vec total = sum[0][n];
#pragma GCC unroll 16
            for (int u = 1; u < U; u++) total += sum[u][n];
            store(c + j + n * W, total);
        }
    }
    constexpr int rest = N % (V * W);
    if constexpr (rest > 0) product_rows<1, rest, K, 0, AK, BK, rest>(a, b + N - rest, c + N - rest);
}

// One row of A and of C, B by columns: W dot products at a time.
template <int N, int K, int BN>
void row_by_columns(const real *a, const real *b, real *c) {
    for (int j = 0; j < N; j += W) {
        vec sum[W] = {};
        for (int k = 0; k < K; k += W) {
            vec x = load(a + k);
#pragma GCC unroll 16
            for (int n = 0; n < W; n++) sum[n] += x * load(b + (j + n) * BN + k);
        }
        // As `turn` would move them, but added up on the way: half as many vectors after each step.
#pragma GCC unroll 4
        for (int n = W / 2; n > 0; n /= 2)
#pragma GCC unroll 16
            for (int i = 0; i < n; i++) {
                vec low, high;
                interleave(sum[i], sum[i + n], low, high);
                sum[i] = low + high;
            }
        store(c + j, sum[0]);
    }
}

// Number by number.
template <int M, int N, int K, int AM, int AK, int BK, int BN>
void product_dots(const real *a, const real *b, real *c) {
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            real sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int k = 0; k < K; k++) sum += a[i * AM + k * AK] * b[k * BK + j * BN];
            c[i * N + j] = sum;
        }
}

template <int M, int N, int K, int AM, int AK, int BK, int BN>
INLINE void product(const real *__restrict a, const real *__restrict b, real *__restrict c) {
    if constexpr (N == 1 && M > 1) {
        product<1, M, K, 0, BK, AK, AM>(b, a, c);
    } else if constexpr (M == 1 && BN == 1 && N >= W) {
        row_by_rows<N, K, AK, BK>(a, b, c);
    } else if constexpr (M == 1 && AK == 1 && BK == 1 && N % W == 0 && K % W == 0) {
        row_by_columns<N, K, BN>(a, b, c);
    } else if constexpr (BN == 1) {
        product_rows<M, N, K, AM, AK, BK, N>(a, b, c);
    } else if constexpr (BK == 1 && M >= 2 * W && K % W == 0 && N % W == 0) {
        product_turned<M, N, K, AM, AK, BN, N>(a, b, c);
    } else if constexpr (BK == 1 && M % W == 0 && N % W == 0) {
        product_columns<M, N, K, AM, AK, BN, N>(a, b, c);
    } else {
        product_dots<M, N, K, AM, AK, BK, BN>(a, b, c);
    }
}

// Ask for large pages, since memory that is written for the first time is made page by page.
INLINE void large_pages(real *x, long count) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, begin = ((uintptr_t)x + page - 1) / page * page, end = (uintptr_t)(x + count) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// A copy of numbers that are not read again for long: past the caches, where a store would first fetch what it overwrites.
template <long COUNT>
INLINE void keep(real *to, const real *from) {
#if defined(__SSE2__)
    if (COUNT % W == 0 && (uintptr_t)to % BYTES == 0) {
        for (long i = 0; i < COUNT; i += W) stream(to + i, load(from + i));
        _mm_sfence();
        return;
    }
#endif
    std::memcpy(to, from, COUNT * sizeof(real));
}

// ---- rows of the batch, shared among threads; each thread has `arena` numbers to itself

// Whether all rows are done: on as many threads as can be started, none if there is no memory.
template <class Work>
INLINE bool for_rows(long rows, long threads, long arena, Work work) {
    std::atomic<long> next{0};
    auto run = [&] {
        real *memory = (real *)std::aligned_alloc(64, (arena * sizeof(real) + 127) / 64 * 64);
        if (memory == nullptr) return;
        for (long row; (row = next++) < rows;) work(row, memory);
        std::free(memory);
    };
    std::vector<std::thread> others;
    try {
        for (long i = 1; i < std::min(rows, threads); i++) others.emplace_back(run);
    } catch (const std::exception &) {
    }
    run();
    for (auto &other : others) other.join();
    return next >= rows;
}
