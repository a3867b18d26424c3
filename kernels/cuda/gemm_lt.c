/* cuBLASLt: opened at run time, its proposals timed once for each shape and bucket of rows.
 *
 * The library speaks of columns first: row-major D[rows][n_out] = X W^T is its D'[n_out][rows] =
 * op(W') X' with W' = W transposed. Buckets are powers of two; what was fastest at a bucket's upper
 * end serves it all. Knows shapes and types, never weights' formats. */
#include "base/log.h"
#include "base/mem.h"
#include "kernels/cuda/cuda.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

enum { SHAPES_MAX = 128, BUCKETS_MAX = 18, PROPOSALS_MAX = 8, TIMED_RUNS = 3 };
static const size_t WORKSPACE_BYTES = (size_t)32 << 20, TUNE_BYTES_MAX = (size_t)256 << 20;
static const char library_name[] = "libcublasLt.so.13";

#define LT_FUNCTIONS(X)                                                                            \
    X(cublasLtCreate)                                                                              \
    X(cublasLtDestroy) X(cublasLtMatmulDescCreate) X(cublasLtMatmulDescDestroy)                    \
        X(cublasLtMatmulDescSetAttribute) X(cublasLtMatrixLayoutCreate)                            \
            X(cublasLtMatrixLayoutDestroy) X(cublasLtMatrixLayoutSetAttribute)                     \
                X(cublasLtMatmulPreferenceCreate) X(cublasLtMatmulPreferenceDestroy)               \
                    X(cublasLtMatmulPreferenceSetAttribute) X(cublasLtMatmulAlgoGetHeuristic)      \
                        X(cublasLtMatmul)

struct shape {
    int64_t n_out, n_in, w_stride;
    enum dtype type, out_type;
    bool has_bias, has_scales;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, out;
    cublasLtMatmulAlgo_t algo[BUCKETS_MAX];
    int n_buckets;
};

struct lt {
    struct cuda_backend *backend;
    cudaStream_t stream;
    void *library, *workspace;
    cublasLtHandle_t handle;
    struct shape shapes[SHAPES_MAX];
    int n_shapes;
#define X(name) __typeof__(name) *name;
    LT_FUNCTIONS(X)
#undef X
};

/* Beside the plugin first, then wherever the loader looks. */
static void *library_open(void)
{
    Dl_info self;
    char own[PATH_MAX], path[PATH_MAX + sizeof library_name + 2];
    if (dladdr((const void *)library_open, &self) && strlen(self.dli_fname) < sizeof own) {
        memcpy(own, self.dli_fname, strlen(self.dli_fname) + 1);
        snprintf(path, sizeof path, "%s/%s", dirname(own), library_name);
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library) return library;
    }
    return dlopen(library_name, RTLD_NOW | RTLD_LOCAL);
}

static enum err functions_find(struct lt *lt)
{
#define X(name)                                                                                    \
    *(void **)&lt->name = dlsym(lt->library, #name);                                               \
    if (!lt->name) FAIL(ERR_DEVICE, "%s has no %s", library_name, #name);
    LT_FUNCTIONS(X)
#undef X
    return OK;
}

enum err lt_open(struct cuda_backend *b, struct lt **out)
{
    struct lt *lt;
    enum err e;
    TRY(MEM_NEW(&lt));
    lt->backend = b;
    lt->stream = b->stream;
    lt->library = library_open();
    if (!lt->library) FAIL_OUT(ERR_DEVICE, "%s", dlerror());
    TRY_OUT(functions_find(lt));
    cublasStatus_t status = lt->cublasLtCreate(&lt->handle);
    if (status != CUBLAS_STATUS_SUCCESS)
        FAIL_OUT(ERR_DEVICE, "%s: status %d when created", library_name, (int)status);
    TRY_OUT(cuda_check(cudaMalloc(&lt->workspace, WORKSPACE_BYTES), "the workspace of cuBLASLt"));
out:
    if (e)
        lt_close(lt);
    else
        *out = lt;
    return e;
}

static void shape_fini(struct lt *lt, struct shape *s)
{
    if (s->w) lt->cublasLtMatrixLayoutDestroy(s->w);
    if (s->x) lt->cublasLtMatrixLayoutDestroy(s->x);
    if (s->out) lt->cublasLtMatrixLayoutDestroy(s->out);
    if (s->desc) lt->cublasLtMatmulDescDestroy(s->desc);
    memset(s, 0, sizeof *s);
}

void lt_close(struct lt *lt)
{
    if (!lt) return;
    for (int i = 0; i < lt->n_shapes; i++)
        shape_fini(lt, &lt->shapes[i]);
    if (lt->handle && !lt->backend->failed) lt->cublasLtDestroy(lt->handle);
    cuda_free(lt->backend, lt->workspace);
    /* The library stays open: it keeps threads and exit handlers of its own. */
    mem_free(lt);
}

static cudaDataType_t library_type(enum dtype t)
{
    switch (t) {
    case DTYPE_F32:
        return CUDA_R_32F;
    case DTYPE_F16:
        return CUDA_R_16F;
    case DTYPE_BF16:
        return CUDA_R_16BF;
    case DTYPE_I32:
        return CUDA_R_32I;
    case DTYPE_I8:
        return CUDA_R_8I;
    default:
        return CUDA_R_8F_E4M3;
    }
}

static bool desc_set(struct lt *lt, struct shape *s, cublasLtMatmulDescAttributes_t a,
                     const void *value, size_t bytes)
{
    return lt->cublasLtMatmulDescSetAttribute(s->desc, a, value, bytes) == CUBLAS_STATUS_SUCCESS;
}

static bool shape_init(struct lt *lt, struct shape *s)
{
    bool whole = s->type == DTYPE_I8;
    cublasComputeType_t compute = whole ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F;
    cudaDataType_t scale = whole ? CUDA_R_32I : CUDA_R_32F, in = library_type(s->type),
                   bias = library_type(s->out_type);
    cublasOperation_t transposed = CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    cublasLtMatmulMatrixScale_t outer = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    if (lt->cublasLtMatmulDescCreate(&s->desc, compute, scale)) return false;
    if (!desc_set(lt, s, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed)) return false;
    if (s->has_bias &&
        (!desc_set(lt, s, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) ||
         !desc_set(lt, s, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias, sizeof bias)))
        return false;
    if (s->has_scales &&
        (!desc_set(lt, s, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &outer, sizeof outer) ||
         !desc_set(lt, s, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &outer, sizeof outer)))
        return false;
    uint64_t k = (uint64_t)s->n_in, m = (uint64_t)s->n_out;
    return !lt->cublasLtMatrixLayoutCreate(&s->w, in, k, m, s->w_stride) &&
           !lt->cublasLtMatrixLayoutCreate(&s->x, in, k, 1, s->n_in) &&
           !lt->cublasLtMatrixLayoutCreate(&s->out, library_type(s->out_type), m, 1, s->n_out);
}

static bool layout_resize(struct lt *lt, cublasLtMatrixLayout_t layout, int64_t cols,
                          int64_t stride)
{
    uint64_t n = (uint64_t)cols;
    return !lt->cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_COLS, &n,
                                                 sizeof n) &&
           !lt->cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_LD, &stride,
                                                 sizeof stride);
}

static cublasStatus_t run(struct lt *lt, struct shape *s, const struct gemm *g,
                          const cublasLtMatmulAlgo_t *algo)
{
    static const float one = 1.0f, zero = 0.0f;
    static const int32_t one_i = 1, zero_i = 0;
    bool whole = s->type == DTYPE_I8;
    if (!layout_resize(lt, s->x, g->rows, g->x_stride) ||
        !layout_resize(lt, s->out, g->rows, g->out_stride))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (s->has_bias &&
        !desc_set(lt, s, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g->bias, sizeof g->bias))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (s->has_scales &&
        (!desc_set(lt, s, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &g->w_scales, sizeof g->w_scales) ||
         !desc_set(lt, s, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &g->x_scales, sizeof g->x_scales)))
        return CUBLAS_STATUS_INVALID_VALUE;
    return lt->cublasLtMatmul(lt->handle, s->desc, whole ? (const void *)&one_i : &one, g->w, s->w,
                              g->x, s->x, whole ? (const void *)&zero_i : &zero, g->out, s->out,
                              g->out, s->out, algo, lt->workspace, WORKSPACE_BYTES, lt->stream);
}

/* The library's proposals for a number of rows, best first; returns how many. */
static int proposals(struct lt *lt, struct shape *s, int64_t rows,
                     cublasLtMatmulHeuristicResult_t *out)
{
    cublasLtMatmulPreference_t p;
    int n = 0;
    uint32_t align = 16;
    if (!layout_resize(lt, s->x, rows, s->type == DTYPE_BF16 ? s->n_in : s->w_stride) ||
        !layout_resize(lt, s->out, rows, s->n_out) || lt->cublasLtMatmulPreferenceCreate(&p))
        return 0;
    lt->cublasLtMatmulPreferenceSetAttribute(p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &WORKSPACE_BYTES, sizeof WORKSPACE_BYTES);
    static const cublasLtMatmulPreferenceAttributes_t aligned[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 3; i++)
        lt->cublasLtMatmulPreferenceSetAttribute(p, aligned[i], &align, sizeof align);
    if (lt->cublasLtMatmulAlgoGetHeuristic(lt->handle, s->desc, s->w, s->x, s->out, s->out, p,
                                           PROPOSALS_MAX, out, &n))
        n = 0;
    lt->cublasLtMatmulPreferenceDestroy(p);
    return n;
}

/* Milliseconds of one run, or a negative number when it fails. */
static float time_one(struct lt *lt, struct shape *s, const struct gemm *g,
                      const cublasLtMatmulAlgo_t *algo, cudaEvent_t from, cudaEvent_t to)
{
    float ms = -1;
    if (run(lt, s, g, algo) != CUBLAS_STATUS_SUCCESS) return -1;
    cudaEventRecord(from, lt->stream);
    for (int i = 0; i < TIMED_RUNS; i++)
        run(lt, s, g, algo);
    cudaEventRecord(to, lt->stream);
    if (cudaEventSynchronize(to) != cudaSuccess ||
        cudaEventElapsedTime(&ms, from, to) != cudaSuccess)
        return -1;
    return ms / TIMED_RUNS;
}

/* Index of the fastest; 0, the library's own choice, when there is no memory to try in. */
static int fastest(struct lt *lt, struct shape *s, struct gemm g,
                   const cublasLtMatmulHeuristicResult_t *list, int n)
{
    size_t x_bytes = (size_t)(g.rows * g.x_stride) * dtype_bytes(g.type);
    size_t out_bytes = (size_t)(g.rows * g.out_stride) * dtype_bytes(g.out_type),
           scales = (size_t)g.rows * 4;
    cudaEvent_t from = NULL, to = NULL;
    uint8_t *memory = NULL;
    int best = 0;
    float best_ms = -1;
    x_bytes = (x_bytes + 255) / 256 * 256;
    out_bytes = (out_bytes + 255) / 256 * 256;
    if (n < 2 || !g.w || x_bytes + out_bytes > TUNE_BYTES_MAX) return 0;
    if (cudaMalloc((void **)&memory, x_bytes + out_bytes + scales) != cudaSuccess) return 0;
    cudaMemsetAsync(memory, 0, x_bytes + out_bytes + scales, lt->stream);
    g.x = memory;
    g.out = memory + x_bytes;
    if (s->has_scales) g.x_scales = (const float *)(memory + x_bytes + out_bytes);
    if (!cudaEventCreateWithFlags(&from, cudaEventDefault) &&
        !cudaEventCreateWithFlags(&to, cudaEventDefault))
        for (int i = 0; i < n; i++) {
            float ms = time_one(lt, s, &g, &list[i].algo, from, to);
            if (ms >= 0 && (best_ms < 0 || ms < best_ms)) best = i, best_ms = ms;
        }
    if (from) cudaEventDestroy(from);
    if (to) cudaEventDestroy(to);
    cudaStreamSynchronize(lt->stream);
    cudaFree(memory);
    log_debug("cuBLASLt %lld x %lld %s, %lld rows: proposal %d of %d, %.4f ms", (long long)g.n_out,
              (long long)g.n_in, dtype_name(g.type), (long long)g.rows, best, n, (double)best_ms);
    return best;
}

static struct shape *shape_find(struct lt *lt, const struct gemm *g)
{
    for (int i = 0; i < lt->n_shapes; i++) {
        struct shape *s = &lt->shapes[i];
        if (s->n_out == g->n_out && s->n_in == g->n_in && s->w_stride == g->w_stride &&
            s->type == g->type && s->out_type == g->out_type && s->has_bias == !!g->bias &&
            s->has_scales == !!g->w_scales)
            return s;
    }
    return NULL;
}

/* Bucket i serves up to 2^i rows. */
static int bucket_of(const struct shape *s, int64_t rows)
{
    int i = 0;
    while (i < s->n_buckets - 1 && (int64_t)1 << i < rows)
        i++;
    return i;
}

static bool shape_tune(struct lt *lt, struct shape *s, const struct gemm *gemm)
{
    cublasLtMatmulHeuristicResult_t list[PROPOSALS_MAX];
    for (int i = 0; i < BUCKETS_MAX; i++) {
        struct gemm g = *gemm;
        bool last = (int64_t)1 << i >= gemm->rows || i == BUCKETS_MAX - 1;
        g.rows = last ? gemm->rows : (int64_t)1 << i;
        g.x_stride = s->type == DTYPE_BF16 ? s->n_in : s->w_stride;
        g.out_stride = s->n_out;
        int n = proposals(lt, s, g.rows, list);
        if (n == 0) return false;
        s->algo[i] = list[fastest(lt, s, g, list, n)].algo;
        s->n_buckets = i + 1;
        if (last) return true;
    }
    return true;
}

bool lt_prepare(struct lt *lt, const struct gemm *gemm)
{
    if (shape_find(lt, gemm)) return true;
    if (lt->n_shapes == SHAPES_MAX || !gemm->n_in || !gemm->n_out) return false;
    struct shape *s = &lt->shapes[lt->n_shapes];
    *s = (struct shape){.n_out = gemm->n_out,
                        .n_in = gemm->n_in,
                        .w_stride = gemm->w_stride,
                        .type = gemm->type,
                        .out_type = gemm->out_type,
                        .has_bias = gemm->bias,
                        .has_scales = gemm->w_scales};
    if (shape_init(lt, s) && shape_tune(lt, s, gemm)) {
        lt->n_shapes++;
        return true;
    }
    shape_fini(lt, s);
    return false;
}

cudaError_t lt_matmul(struct lt *lt, const struct gemm *gemm)
{
    struct shape *s = shape_find(lt, gemm);
    if (!s) return cudaErrorInvalidValue;
    cublasStatus_t status = run(lt, s, gemm, &s->algo[bucket_of(s, gemm->rows)]);
    if (status != CUBLAS_STATUS_SUCCESS) status = run(lt, s, gemm, NULL); /* the library chooses */
    return status == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
