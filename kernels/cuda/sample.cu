/* From a row of logits to a token; the same choice as kernels/cpu/sample.c for the same draw.
 *
 * Penalties, bias, bans; then temperature, top_k, top_p, min_p; then one draw over the kept tokens
 * in ascending id. Nothing is sorted: a cut is a threshold, found by a radix descent (11 + 11 + 10
 * bits) over the logits' bits. Probabilities are summed as integers of 40 fractional bits, so the
 * order of the additions does not matter and a row's token repeats in any batch. One block a row;
 * for what must go in ascending id each warp owns one segment of the vocabulary. */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/philox.cuh"

#include <cfloat>

typedef unsigned long long mass_t;
enum { BUCKETS = 2048, THREADS_WIDE = 1024, THREADS_NARROW = 128 };
#define MASS_ONE 1099511627776.0f /* 2^40 */
#define MASS_ALL (~(mass_t)0)

struct sample_shared {
    unsigned low[BUCKETS], high[BUCKETS]; /* mass of each bucket, in two words */
    mass_t warp_mass[32], found_above;
    int warp_ties[32], found_bucket, n_taken;
    float scratch[34];
    float top_value[SAMPLE_LOGPROBS_MAX];
    int32_t top_token[SAMPLE_LOGPROBS_MAX], token;
};

/* One row as all threads of its block see it. */
struct sample_view {
    float *x;
    int vocab, lane, warp, n_warps, segment_first, segment_end;
    float max, inverse; /* weight = e^((x - max) * inverse) */
    struct sample_shared *s;
};

/* What is kept: keys above key, and the first `ties` tokens by id of exactly this key. */
struct sample_cut {
    uint32_t key;
    mass_t ties;
};

static __device__ __forceinline__ uint32_t order_key(float x)
{
    uint32_t u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
static __device__ __forceinline__ float key_value(uint32_t key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
static __device__ __forceinline__ float weight_of(const struct sample_view &v, float x)
{
    return __expf((x - v.max) * v.inverse);
}
static __device__ __forceinline__ mass_t mass_of(float weight) { return (mass_t)(weight * MASS_ONE); }

static __device__ __forceinline__ mass_t warp_mass_sum(mass_t m)
{
    for (int d = 16; d; d >>= 1) m += __shfl_xor_sync(FULL_WARP, m, d);
    return m;
}
static __device__ __forceinline__ mass_t warp_mass_before(mass_t m, int lane)
{
    mass_t sum = m;
    for (int d = 1; d < 32; d <<= 1) {
        mass_t other = __shfl_up_sync(FULL_WARP, sum, d);
        if (lane >= d) sum += other;
    }
    return sum - m;
}

static __device__ void penalize(float *x, const struct sample_task &t, int32_t n_output)
{
    float by = t.repetition_penalty, value = *x > 0 ? *x / by : *x * by;
    if (n_output) value -= (float)n_output * t.frequency_penalty + t.presence_penalty;
    *x = value;
}

/* pending: a token generated that the host does not know yet, -1 = none; its edit may be there. */
static __device__ void apply_penalties(const struct sample_view &v, const struct sample_task &t,
                                       const struct sample_edit *edits, int32_t pending)
{
    if (threadIdx.x == 0) v.s->n_taken = 0;
    __syncthreads();
    for (int i = t.edits[EDIT_PENALTY] + threadIdx.x; i < t.edits[EDIT_PENALTY + 1]; i += blockDim.x) {
        bool again = edits[i].token == pending;
        penalize(&v.x[edits[i].token], t, edits[i].n_output + again);
        if (again) atomicAdd(&v.s->n_taken, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0 && pending >= 0 && pending < v.vocab && !v.s->n_taken) penalize(&v.x[pending], t, 1);
    __syncthreads();
}

static __device__ void apply_edits(const struct sample_view &v, const struct sample_task &t,
                                   const struct sample_edit *edits, int32_t pending)
{
    apply_penalties(v, t, edits, pending);
    for (int i = t.edits[EDIT_BIAS] + threadIdx.x; i < t.edits[EDIT_BIAS + 1]; i += blockDim.x)
        atomicAdd(&v.x[edits[i].token], edits[i].bias);
    __syncthreads();
    for (int i = t.edits[EDIT_BAN] + threadIdx.x; i < t.edits[EDIT_BAN + 1]; i += blockDim.x)
        atomicExch(&v.x[edits[i].token], -INFINITY); /* a client may ban a token twice */
    const uint32_t *mask = (const uint32_t *)(edits + t.mask);
    for (int i = threadIdx.x; t.mask >= 0 && i < v.vocab; i += blockDim.x)
        if (mask[i / 32] >> (i % 32) & 1) v.x[i] = -INFINITY;
    __syncthreads();
}

/* NaN becomes -inf and +inf the largest float; returns the largest logit. */
static __device__ float clean_max(const struct sample_view &v)
{
    float most = -INFINITY;
    for (int i = threadIdx.x; i < v.vocab; i += blockDim.x) {
        float x = v.x[i], clean = x == x ? fminf(x, FLT_MAX) : -INFINITY;
        if (!(x == clean)) v.x[i] = clean;
        most = fmaxf(most, clean);
    }
    return block_max(most, v.s->scratch);
}

/* The lowest id whose logit is value. */
static __device__ int32_t first_equal(const struct sample_view &v, float value)
{
    int first = v.vocab;
    for (int i = threadIdx.x; i < v.vocab && first == v.vocab; i += blockDim.x)
        if (v.x[i] == value) first = i;
    for (int d = 16; d; d >>= 1) first = min(first, __shfl_xor_sync(FULL_WARP, first, d));
    if (v.lane == 0) v.s->warp_ties[v.warp] = first;
    __syncthreads();
    for (int w = 0; w < v.n_warps; w++) first = min(first, v.s->warp_ties[w]);
    return first < v.vocab ? first : 0;
}

/* The bucket, from the highest down, where the running mass first reaches target; if rounding left
 * the target just out of reach, the lowest bucket that has mass. */
static __device__ void bucket_find(const struct sample_view &v, int n_buckets, mass_t above, mass_t target)
{
    struct sample_shared *s = v.s;
    int each = n_buckets / blockDim.x > 1 ? n_buckets / blockDim.x : 1, first = n_buckets - 1 - (int)threadIdx.x * each;
    mass_t mine = 0;
    for (int b = first; b > first - each && b >= 0; b--) mine += s->low[b] + ((mass_t)s->high[b] << 32);
    mass_t before = warp_mass_before(mine, v.lane);
    if (v.lane == 31) s->warp_mass[v.warp] = before + mine;
    if (threadIdx.x == 0) s->found_bucket = -1;
    __syncthreads();
    mass_t total = above;
    for (int w = 0; w < v.n_warps; w++) {
        if (w < v.warp) before += s->warp_mass[w];
        total += s->warp_mass[w];
    }
    if (target > total) target = total;
    before += above;
    if (mine && before < target && before + mine >= target) {
        int b = first;
        for (;; b--) {
            mass_t m = s->low[b] + ((mass_t)s->high[b] << 32);
            if (before + m >= target) break;
            before += m;
        }
        s->found_bucket = b;
        s->found_above = before;
    }
    __syncthreads();
}

/* The key at which the mass of the largest keys first reaches target; only keys >= floor count. */
static __device__ struct sample_cut cut_at_mass(const struct sample_view &v, uint32_t floor, mass_t target,
                                                bool weighted)
{
    struct sample_shared *s = v.s;
    uint32_t prefix = 0, mask = 0;
    mass_t above = 0;
    for (int level = 0; level < 3; level++) {
        int shift = level == 0 ? 21 : level == 1 ? 10 : 0, n_buckets = level == 2 ? 1024 : 2048;
        for (int b = threadIdx.x; b < n_buckets; b += blockDim.x) s->low[b] = s->high[b] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < v.vocab; i += blockDim.x) {
            uint32_t key = order_key(v.x[i]);
            if ((key & mask) != prefix || key < floor) continue;
            mass_t m = weighted ? mass_of(weight_of(v, v.x[i])) : 1;
            if (m == 0) continue;
            unsigned low = (unsigned)m, *to = &s->low[key >> shift & (n_buckets - 1)];
            unsigned carry = (unsigned)(m >> 32) + (atomicAdd(to, low) + low < low);
            if (carry) atomicAdd(to + BUCKETS, carry); /* high lies behind low */
        }
        __syncthreads();
        bucket_find(v, n_buckets, above, target);
        if (s->found_bucket < 0) return {0, MASS_ALL}; /* no mass at all */
        above = s->found_above;
        prefix |= (uint32_t)s->found_bucket << shift;
        mask |= (uint32_t)(n_buckets - 1) << shift;
    }
    if (!weighted) return {prefix, MASS_ALL};
    mass_t each = mass_of(weight_of(v, key_value(prefix)));
    return {prefix, each ? (target - above + each - 1) / each : MASS_ALL};
}

static __device__ __forceinline__ bool is_kept(const struct sample_cut &cut, uint32_t key, mass_t m, float weight,
                                               float weight_min)
{
    return key >= cut.key && m > 0 && weight >= weight_min;
}

/* Mass of the kept tokens, and its share of each warp's segment in s->warp_mass. Ties count as far
 * as they are kept, in ascending id. */
static __device__ mass_t kept_mass(const struct sample_view &v, const struct sample_cut &cut, float weight_min)
{
    mass_t mine = 0, each = 0;
    int n_ties = 0;
    for (int i = v.segment_first + v.lane; i < v.segment_end; i += 32) {
        uint32_t key = order_key(v.x[i]);
        float weight = weight_of(v, v.x[i]);
        mass_t m = mass_of(weight);
        if (!is_kept(cut, key, m, weight, weight_min)) continue;
        if (key == cut.key) n_ties++, each = m;
        else mine += m;
    }
    mine = warp_mass_sum(mine);
    for (int d = 16; d; d >>= 1) {
        n_ties += __shfl_xor_sync(FULL_WARP, n_ties, d);
        each = max(each, __shfl_xor_sync(FULL_WARP, each, d));
    }
    if (v.lane == 0) v.s->warp_ties[v.warp] = n_ties;
    __syncthreads();
    mass_t before = 0;
    for (int w = 0; w < v.warp; w++) before += v.s->warp_ties[w];
    mass_t left = cut.ties > before ? cut.ties - before : 0;
    mine += each * (left < (mass_t)n_ties ? left : (mass_t)n_ties);
    if (v.lane == 0) v.s->warp_mass[v.warp] = mine;
    __syncthreads();
    mass_t total = 0;
    for (int w = 0; w < v.n_warps; w++) total += v.s->warp_mass[w];
    return total;
}

/* After kept_mass: the token where the running mass exceeds target, found by the warp that owns it. */
static __device__ void walk(const struct sample_view &v, const struct sample_cut &cut, float weight_min, mass_t target)
{
    mass_t sum = 0, ties = 0;
    for (int w = 0; w < v.warp; w++) sum += v.s->warp_mass[w], ties += v.s->warp_ties[w];
    if (target < sum || target >= sum + v.s->warp_mass[v.warp]) return;
    for (int base = v.segment_first; base < v.segment_end; base += 32) {
        int i = base + v.lane;
        float x = i < v.segment_end ? v.x[i] : -INFINITY, weight = weight_of(v, x);
        uint32_t key = order_key(x);
        mass_t m = mass_of(weight);
        bool kept = i < v.segment_end && is_kept(cut, key, m, weight, weight_min), tie = kept && key == cut.key;
        unsigned tied = __ballot_sync(FULL_WARP, tie);
        if (!kept || (tie && ties + __popc(tied & ((1u << v.lane) - 1)) >= cut.ties)) m = 0;
        ties += __popc(tied);
        mass_t before = sum + warp_mass_before(m, v.lane);
        if (m && before <= target && target < before + m) v.s->token = i;
        sum += warp_mass_sum(m);
        if (sum > target) return;
    }
}

static __device__ int32_t draw(const struct sample_view &v, const struct sample_task &t)
{
    struct sample_cut cut = {0, MASS_ALL};
    if (t.top_k > 0 && t.top_k < v.vocab) cut = cut_at_mass(v, 0, (mass_t)t.top_k, false);
    if (t.top_p < 1.0f) {
        double share = (double)kept_mass(v, cut, 0) * (double)t.top_p;
        mass_t target = share > 1 ? (mass_t)ceil(share) : 1;
        cut = cut_at_mass(v, cut.key, target, true);
    }
    mass_t total = kept_mass(v, cut, t.min_p);
    if (total == 0) return first_equal(v, v.max);
    if (threadIdx.x == 0) v.s->token = -1;
    __syncthreads();
    walk(v, cut, t.min_p, (mass_t)((double)total * (double)philox_at(t.seed, t.position, 0)));
    __syncthreads();
    return v.s->token >= 0 ? v.s->token : first_equal(v, v.max);
}

/* Collects the n largest, ties by lower id, then ranks them: one warp, a lane an entry. */
static __device__ void top_list(const struct sample_view &v, int n, float log_total, struct sample_result *out)
{
    struct sample_shared *s = v.s;
    uint32_t least = cut_at_mass(v, 0, (mass_t)n, false).key;
    int n_ties = 0;
    if (threadIdx.x == 0) s->n_taken = 0;
    __syncthreads();
    for (int i = v.segment_first + v.lane; i < v.segment_end; i += 32) {
        uint32_t key = order_key(v.x[i]);
        n_ties += key == least;
        if (key <= least) continue;
        int at = atomicAdd(&s->n_taken, 1);
        s->top_value[at] = v.x[i], s->top_token[at] = i;
    }
    for (int d = 16; d; d >>= 1) n_ties += __shfl_xor_sync(FULL_WARP, n_ties, d);
    if (v.lane == 0) s->warp_ties[v.warp] = n_ties;
    __syncthreads();
    int at = s->n_taken;
    for (int w = 0; w < v.warp; w++) at += s->warp_ties[w];
    for (int base = v.segment_first; base < v.segment_end && at < n; base += 32) {
        int i = base + v.lane;
        bool tie = i < v.segment_end && order_key(v.x[i]) == least;
        unsigned tied = __ballot_sync(FULL_WARP, tie);
        int place = at + __popc(tied & ((1u << v.lane) - 1));
        if (tie && place < n) s->top_value[place] = v.x[i], s->top_token[place] = i;
        at += __popc(tied);
    }
    __syncthreads();
    if (v.warp == 0 && v.lane < n) {
        int rank = 0;
        float mine = s->top_value[v.lane];
        for (int j = 0; j < n; j++)
            rank += s->top_value[j] > mine || (s->top_value[j] == mine && s->top_token[j] < s->top_token[v.lane]);
        out->top_tokens[rank] = s->top_token[v.lane];
        out->top_logprobs[rank] = mine - log_total;
    }
    if (threadIdx.x == 0) out->n_top = n;
}

static __device__ void logprobs(const struct sample_view &v, const struct sample_task &t, int32_t token,
                                struct sample_result *out)
{
    float sum = 0, log_total = 0;
    for (int i = threadIdx.x; i < v.vocab; i += blockDim.x) sum += __expf(v.x[i] - v.max);
    sum = block_sum(v.max == -INFINITY ? 0.0f : sum, v.s->scratch);
    if (v.max > -INFINITY) log_total = v.max + logf(sum);
    if (threadIdx.x == 0) out->logprob = v.x[token] - log_total;
    int n = min(min(t.n_logprobs, (int)SAMPLE_LOGPROBS_MAX), v.vocab);
    if (n > 0) top_list(v, n, log_total, out);
}

static __global__ void __launch_bounds__(THREADS_WIDE)
    sample_kernel(float *logits, int64_t stride, int vocab, const struct sample_task *tasks,
                  const struct sample_edit *edits, struct sample_result *results, int32_t *feedback, int32_t n_slots)
{
    dependency_wait();
    struct sample_task t = tasks[blockIdx.x];
    struct sample_result *out = results + blockIdx.x;
    int warp = threadIdx.x / WARP_LANES, n_warps = blockDim.x / WARP_LANES;
    int segment = (vocab + n_warps * 32 - 1) / (n_warps * 32) * 32;
    struct sample_view v = {logits + blockIdx.x * stride, vocab, (int)threadIdx.x % WARP_LANES, warp, n_warps,
                            min(vocab, warp * segment), min(vocab, (warp + 1) * segment), 0, 0,
                            (struct sample_shared *)cuda_smem};
    apply_edits(v, t, edits, t.n_pending && t.slot >= 0 && t.slot < n_slots ? feedback[t.slot] : -1);
    v.max = clean_max(v);
    v.inverse = 1.0f / t.temperature;
    int32_t token;
    if (t.forced_token >= 0 && t.forced_token < vocab)
        token = t.forced_token;
    else if (t.temperature <= 0 || v.max == -INFINITY || !(v.inverse < FLT_MAX))
        token = first_equal(v, v.max);
    else
        token = draw(v, t);
    if (threadIdx.x == 0) {
        out->token = token;
        out->logprob = 0;
        out->n_top = 0;
        if (t.slot >= 0 && t.slot < n_slots) feedback[t.slot] = token;
    }
    if (t.n_logprobs >= 0) logprobs(v, t, token, out);
}

int launch_sample(struct tensor logits, const struct sample_task *tasks, const struct sample_edit *edits, int n_rows,
                  struct sample_result *results, int32_t *feedback, int32_t n_slots, void *stream)
{
    int threads = logits.cols > 4096 ? THREADS_WIDE : THREADS_NARROW;
    return LAUNCH(sample_kernel, dim3((unsigned)n_rows), dim3(threads), sizeof(struct sample_shared), stream,
                  (float *)logits.data, logits.stride, (int)logits.cols, tasks, edits, results, feedback, n_slots);
}
