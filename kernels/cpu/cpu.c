/* The CPU as a backend: opens it, picks the instruction set, and gives the table of operations. */
#include "base/log.h"
#include "base/mem.h"
#include "kernels/cpu/attention.h"

#include <cpuid.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ALLOC_HEADER = 64, ALLOC_HUGE = 1 << 20 };

static const char *const isa_names[CPU_ISA_COUNT] = {"reference", "avx2", "avx512",
                                                     "vnni",      "bf16", "amx"};
static const struct matmul_kernels *const isa_matmuls[CPU_ISA_COUNT] = {
    &matmul_reference, &matmul_avx2, &matmul_avx512, &matmul_vnni, &matmul_bf16, &matmul_amx};

static const struct attention_kernels *const isa_attentions[CPU_ISA_COUNT] = {
    [CPU_ISA_AVX2] = &attention_avx2,
    [CPU_ISA_AVX512] = &attention_avx512,
    [CPU_ISA_VNNI] = &attention_vnni,
    [CPU_ISA_BF16] = &attention_bf16};

static const struct row_kernels *const isa_rows[CPU_ISA_COUNT] = {
    &rows_plain, &rows_avx2, &rows_avx512, &rows_avx512, &rows_avx512, &rows_avx512};

/* The unit is there, and the system lets this process use its registers. */
static bool amx_runs(void)
{
    enum { LEAF_FEATURES = 7, BF16 = 1 << 22, TILE = 1 << 24, INT8 = 1 << 25 };
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl, Linux 5.16 */
    unsigned a, b, c, d, needed = BF16 | TILE | INT8;
    return __get_cpuid_count(LEAF_FEATURES, 0, &a, &b, &c, &d) && (d & needed) == needed &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static bool isa_runs(enum cpu_isa isa)
{
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (isa) {
    case CPU_ISA_REFERENCE:
        return true;
    case CPU_ISA_AVX2:
        return avx2;
    case CPU_ISA_AVX512:
        return avx512;
    case CPU_ISA_VNNI:
        return avx512 && __builtin_cpu_supports("avx512vnni");
    case CPU_ISA_BF16:
    case CPU_ISA_AMX:
        return avx512 && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512bf16") && (isa == CPU_ISA_BF16 || amx_runs());
    default:
        return false;
    }
}

static enum err isa_choose(const char *name, enum cpu_isa *out)
{
    enum cpu_isa best = CPU_ISA_COUNT - 1;
    while (!isa_runs(best))
        best--;
    if (!name) {
        *out = best;
        return OK;
    }
    for (enum cpu_isa isa = 0; isa < CPU_ISA_COUNT; isa++) {
        if (strcmp(name, isa_names[isa])) continue;
        if (!isa_runs(isa))
            FAIL(ERR_DEVICE, "instruction set '%s' asked for, but this CPU has '%s' at best", name,
                 isa_names[best]);
        *out = isa;
        return OK;
    }
    FAIL(ERR_UNSUPPORTED,
         "unknown instruction set '%s': reference, avx2, avx512, vnni, bf16 or amx", name);
}

/* Each format takes its kernels from the best ISA that has them. */
static void matmul_choose(struct cpu_backend *cpu)
{
    for (int format = 0; format < FORMATS; format++)
        for (int isa = CPU_ISA_REFERENCE; isa <= (int)cpu->isa; isa++) {
            const struct matmul_kernels *k = isa_matmuls[isa];
            if (k && k->panel[format]) {
                cpu->matmul.panel[format] = k->panel[format];
                cpu->matmul.rows_max[format] = k->rows_max[format];
                cpu->matmul.row_major[format] = k->row_major[format];
            }
            if (k && k->pack_rows[format]) cpu->matmul.pack_rows[format] = k->pack_rows[format];
        }
}

static void attention_choose(struct cpu_backend *cpu)
{
    cpu->attention_span = SPAN;
    for (int dtype = 0; dtype < DTYPE_COUNT; dtype++)
        for (int isa = CPU_ISA_REFERENCE; isa <= (int)cpu->isa; isa++) {
            const struct attention_kernels *k = isa_attentions[isa];
            if (!k || !k->chunk[dtype]) continue;
            cpu->attention_kernels.chunk[dtype] = k->chunk[dtype];
            cpu->attention_kernels.rows_max[dtype] = k->rows_max[dtype];
            cpu->attention_kernels.query[dtype] = k->query[dtype];
        }
    cpu->attention = cpu->isa == CPU_ISA_REFERENCE ? NULL : &cpu->attention_kernels;
}

static void cpu_close(struct backend *b)
{
    if (!b) return;
    struct cpu_backend *cpu = cpu_of(b);
    pool_destroy(cpu->pool);
    mem_free_huge(cpu->activations.words, cpu->words_bytes);
    mem_free(cpu->activations.correction);
    mem_free(cpu->activations.row_scale);
    mem_free_huge(cpu->attention_partial, ATTENTION_PARTIAL_BYTES);
    mem_free(cpu->unit_start);
    mem_free(cpu->feedback);
    mem_free(cpu->moe_scratch);
    mem_free(cpu);
}

/* Every operation finds its scratch large enough. */
static size_t scratch_bytes(int vocab_size)
{
    size_t bytes = MATMUL_SCRATCH_BYTES;
    bytes = NORM_SCRATCH_BYTES > bytes ? NORM_SCRATCH_BYTES : bytes;
    bytes = sample_scratch_bytes(vocab_size) > bytes ? sample_scratch_bytes(vocab_size) : bytes;
    return attention_scratch_bytes() > bytes ? attention_scratch_bytes() : bytes;
}

static enum err cpu_open(const struct backend_options *options, struct backend **out)
{
    enum err e = OK;
    struct cpu_backend *cpu = NULL;
    if (options->n_tokens_max < 0 || options->n_slots_max < 0 || options->vocab_size < 0 ||
        options->n_threads < 0)
        FAIL(ERR_INVALID, "backend options: %d slots, %d tokens of vocabulary, %d threads",
             options->n_slots_max, options->vocab_size, options->n_threads);
    TRY_OUT(MEM_NEW(&cpu));
    cpu->head.ops = &backend_cpu;
    cpu->head.activation_dtype = DTYPE_F32;
    cpu->options = *options;
    cpu->options.isa = NULL; /* the caller's string need not live on */
    TRY_OUT(isa_choose(options->isa, &cpu->isa));
    matmul_choose(cpu);
    attention_choose(cpu);
    cpu->rows = isa_rows[cpu->isa];
    cpu->n_seqs_max = options->n_tokens_max; /* each sequence of a step has a token */
    TRY_OUT(MEM_NEW_ARRAY(cpu->n_seqs_max + 1, &cpu->unit_start));
    TRY_OUT(mem_alloc_huge(ATTENTION_PARTIAL_BYTES, (void **)&cpu->attention_partial));
    TRY_OUT(MEM_NEW_ARRAY(options->n_slots_max, &cpu->feedback));
    int n_threads = options->n_threads ? options->n_threads : pool_cores();
    TRY_OUT(pool_create(n_threads, scratch_bytes(options->vocab_size), &cpu->pool));
    log_debug("device cpu: %s, %d threads", isa_names[cpu->isa], n_threads);
    *out = &cpu->head;
    cpu = NULL;
out:
    cpu_close(cpu ? &cpu->head : NULL);
    return e;
}

static enum err cpu_memory(struct backend *b, size_t *out_free, size_t *out_total)
{
    char line[256];
    unsigned long long value, available = 0, total = 0;
    (void)b;
    FILE *f = fopen("/proc/meminfo", "re");
    if (!f) FAIL(ERR_IO, "/proc/meminfo cannot be read");
    while (fgets(line, sizeof line, f)) {
        if (sscanf(line, "MemTotal: %llu", &value) == 1) total = value << 10;
        if (sscanf(line, "MemAvailable: %llu", &value) == 1) available = value << 10;
    }
    fclose(f);
    /* a container's limit counts when it is the smaller one */
    unsigned long long limit = 0, used = 0;
    f = fopen("/sys/fs/cgroup/memory.max", "re");
    if (f && fscanf(f, "%llu", &limit) != 1) limit = 0;
    if (f) fclose(f);
    f = limit ? fopen("/sys/fs/cgroup/memory.current", "re") : NULL;
    if (f && fscanf(f, "%llu", &used) != 1) used = 0;
    if (f) fclose(f);
    if (limit && limit < total) total = limit;
    if (limit && limit - (used < limit ? used : limit) < available)
        available = limit - (used < limit ? used : limit);
    *out_free = (size_t)available;
    *out_total = (size_t)total;
    return OK;
}

/* Large tensors get huge pages; a line before each keeps its size. */
static enum err cpu_alloc(struct backend *b, size_t bytes, void **out)
{
    size_t total;
    unsigned char *p;
    (void)b;
    if (!size_add(bytes, ALLOC_HEADER, &total)) FAIL(ERR_NO_MEMORY, "a tensor of %zu bytes", bytes);
    TRY(total < ALLOC_HUGE ? mem_alloc_aligned(64, total, (void **)&p)
                           : mem_alloc_huge(total, (void **)&p));
    memcpy(p, &total, sizeof total);
    *out = p + ALLOC_HEADER;
    return OK;
}

static void cpu_release(struct backend *b, void *mem)
{
    size_t total;
    pool_quiesce(cpu_of(b)->pool);
    if (!mem) return;
    unsigned char *p = (unsigned char *)mem - ALLOC_HEADER;
    memcpy(&total, p, sizeof total);
    if (total < ALLOC_HUGE)
        mem_free(p);
    else
        mem_free_huge(p, total);
}

static enum err cpu_upload(struct backend *b, void *dst, const void *src, size_t bytes)
{
    (void)b;
    if (bytes) memcpy(dst, src, bytes);
    return OK;
}

static int cpu_block_size_default(struct backend *b)
{
    (void)b;
    return 32;
}

static void cpu_batch_begin(struct backend *b, const struct batch *batch)
{
    ASSERT(batch->n_tokens >= 0 && batch->n_seqs >= 0 && batch->n_rows_out >= 0);
    (void)b;
}

static void cpu_feed(struct backend *b, int32_t slot, int32_t token)
{
    ASSERT(slot >= 0 && slot < cpu_of(b)->options.n_slots_max);
    cpu_of(b)->feedback[slot] = token;
}

/* Operations have run when they return: a ticket is done as soon as it is given out. */
static uint64_t cpu_step_end(struct backend *b)
{
    return ++cpu_of(b)->ticket;
}

static enum err cpu_ticket_wait(struct backend *b, uint64_t ticket)
{
    ASSERT_CMP(ticket, <=, cpu_of(b)->ticket);
    return OK;
}

static enum err cpu_sync(struct backend *b)
{
    pool_quiesce(cpu_of(b)->pool);
    return OK;
}

const struct backend_ops backend_cpu = {
    .abi = BACKEND_ABI,
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .memory = cpu_memory,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .upload = cpu_upload,
    .download = cpu_upload,
    .weight_create = cpu_weight_create,
    .weight_create_int4 = cpu_weight_create_int4,
    .weight_destroy = cpu_weight_destroy,
    .weight_bytes = cpu_weight_bytes,
    .table_create = cpu_table_create,
    .block_size_default = cpu_block_size_default,
    .kv_bytes = cpu_kv_bytes,
    .kv_create = cpu_kv_create,
    .kv_destroy = cpu_kv_destroy,
    .batch_begin = cpu_batch_begin,
    .embed = cpu_embed,
    .add_positions = cpu_add_positions,
    .add_norm = cpu_add_norm,
    .add = cpu_add,
    .scale = cpu_scale,
    .matmul = cpu_matmul,
    .activate = cpu_activate,
    .qkv_prepare = cpu_qkv_prepare,
    .attend = cpu_attend,
    .gather = cpu_gather,
    .sample = cpu_sample,
    .feed = cpu_feed,
    .kv_copy = cpu_kv_copy,
    .kv_save = cpu_kv_save,
    .kv_load = cpu_kv_load,
    .step_end = cpu_step_end,
    .ticket_wait = cpu_ticket_wait,
    .sync = cpu_sync,
    .matmul_argmax = cpu_matmul_argmax,
    .norm_matmul = cpu_norm_matmul,
    .feed_forward = cpu_feed_forward,
    .norm_matmul_argmax = cpu_norm_matmul_argmax,
    .moe_create = cpu_moe_create,
    .moe_destroy = cpu_moe_destroy,
    .moe_forward = cpu_moe_forward,
    .packed_layout = CPU_PACKED_LAYOUT,
    .weight_export = cpu_weight_export,
    .packed_sizes = cpu_packed_sizes,
    .weight_import = cpu_weight_import,
    .packed_digest = cpu_packed_digest,
    .packed_row = cpu_packed_row,
    .weight_adopt = cpu_weight_adopt,
    .weight_settle = cpu_weight_settle,
    .kv_settle = cpu_kv_settle,
};
