#!/usr/bin/env python3
"""Goal: the tests of the CUDA backend notice mistakes. Method: each row of MUTANTS is one mistake
put into one source file; the file is compiled for the emulation, linked with the rest of the plugin,
and the named test must fail. A row whose text is gone from the source is an error too. Beside them,
each barrier of each kernel is left out once, and each wait for the kernels before comes too late
once, in the plugin that is watched for races.
Usage: mutants.py CONFIG [FILE], a JSON file that the build writes. Every twelfth mistake is tried;
HEDDLE_MUTANTS=all tries every one, which takes half an hour and more."""
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading

# file, what is there, what is put there, the test that must fail ("whole": its slow cases too)
MUTANTS = [
    ("norm.cu", "squares = block_sum(sums.y, scratch);", "squares = sums.y;", "ops"),
    ("norm.cu", "v[j] = bf16_round(v[j] + d[j]);", "v[j] = v[j] - d[j];", "ops"),
    ("norm.cu", "int n = min(8, c.cols - i);\n        float v[8], d[8];", "int n = 8;\n        float v[8], d[8];", "ops"),
    ("act.cu", "load8(up, in + c.cols + i", "load8(up, in + i", "ops"),
    ("embed.cu", "id >= 0 && id < n_rows", "true", "ops"),
    ("prep.cu", "? c.feedback[slot] : 0", "? c.feedback[0] : 0", "steps"),
    ("prep.cu", "for (int p = 0; p < part; p++)", "for (int p = 1; p < part; p++)", "attention"),
    ("quantize.cu", "if (raw.col_scale) v *= raw.col_scale[c];", "", "ops"),
    ("quantize.cu", "i < cols ? code_of", "i < cols - 1 ? code_of", "ops"),
    ("rope.cu", "head[second] = y * c + x * s;", "head[second] = y * c - x * s;", "attention"),
    ("rope.cu", "row = slot % kv.block_size", "row = slot % 16", "attention"),
    ("rope.cu", "swizzled(dim, row, i / 8)", "swizzled(dim, 0, i / 8)", "attention"),
    ("rope.cu", "<< (j * 8)", "<< (j * 8 % 24)", "attention"),
    ("rope.cu", "*(float4 *)(head + i + 4) = {v[4],", "*(float4 *)(head + i + 4) = {v[0],", "attention"),
    ("embed.cu", "if (known) load8", "load8", "ops"),
    ("embed.cu", "v[j] += add[j];", "v[j] = add[j];", "ops"),
    ("embed.cu", "aligned ? words / 8 * 8 : 0;", "aligned ? (words + 7) / 8 * 8 : 0;", "ops"),
    ("embed.cu", "aligned ? words / 8 * 8 : 0;", "words / 8 * 8;", "ops"),
    ("embed.cu", "rows_aligned(x) && x.cols % 8 == 0", "x.cols % 8 == 0", "ops"),
    ("embed.cu", "rows_aligned(x) && x.cols % 8 == 0", "rows_aligned(x)", "ops"),
    ("embed.cu", "rows_aligned(out) && rows_aligned(x);", "rows_aligned(out);", "ops"),
    ("embed.cu", "rows_aligned(out) && rows_aligned(x);", "rows_aligned(x);", "ops"),
    ("rope.cu", "if (lane == 0) scales[first + row] = scale;", "", "attention"),
    ("attention.cu", "cp_async_wait<shape::STAGES - 1>();", "cp_async_wait<shape::STAGES>();", "attention"),
    ("attention.cu", "if (BULK) mbar_wait(full + i % shape::STAGES, i / shape::STAGES & 1);", "", "attention"),
    ("attention.cu", "i / shape::STAGES & 1);", "(i / shape::STAGES + 1) & 1);", "attention"),
    ("attention.cu", "if (key_first + 16 > w.len) values_clear", "if (false) values_clear", "attention"),
    ("attention.cu", "__syncthreads(); /* the ring becomes the place to merge in */", "", "attention"),
    ("attention.cu", "w->tile_end = low + min(n, ((int)blockIdx.z + 1) * each);", "w->tile_end = low + n;", "attention"),
    ("attention.cu", "by = m == -INFINITY ? 0.0f : exp2f(m - most);\n            sum += c.split_ml", "by = 1;\n            sum += c.split_ml", "attention"),
    ("common.cuh", "(code ^ 0x80u)) - 8388736.0f", "code) - 8388736.0f", "attention"),
    ("attention.cuh", "key < rule.limit[r] ?", "key <= rule.limit[r] ?", "attention"),
    ("attention.cuh", "key >= rule.low[r] &&", "", "attention"),
    ("attention.cuh", "l[r] = l[r] * keep + sum;", "l[r] = l[r] + sum;", "attention"),
    ("prefill.cu", "before + row_token(w, warp_last) + 1;", "before + row_token(w, warp_first) + 1;", "attention"),
    ("prefill.cu", "+ 1 - c.args.window : 0;\n    auto", "+ 65 - c.args.window : 0;\n    auto", "attention"),
    ("prefill.cu", "        cp_async_wait<0>();\n        __sync", "        cp_async_wait<1>();\n        __sync", "attention"),
    ("prefill.cu", "(before + w.token_last + shape::KEYS) / shape::KEYS", "(before + w.token_last) / shape::KEYS", "attention"),
    ("prefill.cu", "bool take = token < w.len;\n        int at = take ? token : 0, offset = at % c.kv.block_size;\n        struct block_rows from = rows_at(c.kv, w.table[at / c.kv.block_size], blockIdx.y, offset, 2);", "bool take = true;\n        int at = min(token, w.len - 1), offset = at % c.kv.block_size;\n        struct block_rows from = rows_at(c.kv, w.table[0], blockIdx.y, offset, 2);", "attention"),
    ("sample.cu", "(atomicAdd(to, low) + low < low)", "(atomicAdd(to, low) * 0)", "sample"),
    ("sample.cu", "tie && ties + __popc", "tie && __popc", "sample"),
    ("sample.cu", "if (w < v.warp) before += s->warp_mass[w];", "", "sample"),
    ("sample.cu", "x == x ? fminf(x, FLT_MAX) : -INFINITY", "x", "sample"),
    ("sample.cu", "*x > 0 ? *x / by : *x * by", "*x / by", "sample"),
    ("sample.cu", "s->top_token[j] < s->top_token[v.lane]", "s->top_token[j] > s->top_token[v.lane]", "sample"),
    ("gemm.cuh", "cp_async_wait<GEMM_RING - 2>();", "cp_async_wait<GEMM_RING - 1>();", "ops"),
    ("gemm.cuh", "__syncthreads(); /* this stage is there, and the one before is free */", "", "ops"),
    ("gemm.cuh", "aligned && (k + 8 <= n_in || !take)", "aligned", "ops"),
    ("gemm.cuh", "at / INT4_GROUP]", "0]", "ops"),
    ("gemm.cuh", "stage_multiply<ROWS>(sums, stage(step), stage(step) + shape::X, row_warp, col_warp, lane);\n        widen(step + GEMM_RING - 1);", "widen(step + GEMM_RING - 1);\n        stage_multiply<ROWS>(sums, stage(step + 1), stage(step) + shape::X, row_warp, col_warp, lane);", "ops"),
    ("gemm.cuh", "CODE4_ZERO = CODE4_PLUS + 8", "CODE4_ZERO = CODE4_PLUS + 7", "ops"),
    ("gemm.cuh", "m.zeros)[at >> group_shift]", "m.zeros)[at >> 7]", "int4"),
    ("gemm_int4.cu", "c.zeros)[at >> c.group_shift]", "c.zeros)[0]", "int4"),
    ("gemm_int4.cu", "dependency_wait();\n        return;", "return;", "int4"),
    ("gemm_int4.cu", "if (from >= 0) v =", "if (from > 0) v =", "int4"),
    ("gemm.cuh", "word >> (i * 4 - 19)", "word >> (i * 4 - 18)", "ops"),
    ("gemm_int4.cu", "gemv_fetch<GROUPS>(ring[i], c, col_first, at + GEMV_AHEAD * WARP_LANES * 32);", "gemv_fetch<GROUPS>(ring[i], c, col_first, at + WARP_LANES * 32);", "ops"),
    ("copy.cu", "pairs.from[blockIdx.x] * block_bytes", "pairs.to[blockIdx.x] * block_bytes", "attention"),
    ("step.c", "    event_wait(b, s);\n    cuda_trace", "    cuda_trace", "steps"),
    ("step.c", "s->begun_us > (int64_t)b->wait_ms_max * 1000", "s->begun_us < 0", "steps"),
    ("sample.c", "if (cuda_sync(base)) return;", "", "sample whole"),
    ("sample.c", "count[tokens[i]] = 0;", "", "sample"),
    ("matmul.c", "if (b->quantized.of == out.data) b->quantized.of = NULL;", "", "ops"),
    ("kv.c", "if (call.n_tiles)", "if (false)", "attention"),
    ("kv.c", "n * n_blocks <= SPLIT_BLOCKS * b->n_sms", "true", "attention"),
    ("pack.c", "codes[i / 2] & 0x0f) | code << 4", "codes[i / 2] & 0x0f) | code << 3", "ops"),
    ("graph.c", "b->capture_refused = false;", "b->capture_refused = true;", "steps"),
    ("graph.c", "b->capturing = false;\n    b->quantized.of = NULL;", "b->capturing = false;", "ops"),
    ("graph.c", "    b->quantized.of = NULL;\n    if (!b->failed) cuda_tiles", "    if (!b->failed) cuda_tiles", "ops"),
    ("graph.c", "    b->quantized.of = NULL; /* what is recorded", "    /* what is recorded", "ops"),
    ("graph.c", "cuda_tiles_prepare(b, &b->batch_host, g->group);", ";", "attention"),
    ("overlap.c", "kernels_overlap = r == cudaSuccess && token == 2;", "", "steps"),
    ("trace.c", "last->worked, s->begun)", "last->begun, s->begun)", "steps"),
    ("trace.c", "s->begun, s->worked)", "last->worked, s->worked)", "steps"),
    ("step.c", "    cuda_trace_begin(b, s, batch);", "", "steps"),
    ("step.c", "if (b->capturing && is_long) {", "if (false) {", "attention"),
    ("gemm_int4.cu", "[at / INT4_GROUP]", "[at / INT4_GROUP / 2]", "ops"),
    ("gemm_int4.cu", "c.scales_16)[group]", "c.scales_16)[0]", "ops"),
    ("pack.c", "if (error < best_error)", "if (true)", "ops"),
    ("moe.cu", "best = left[i], at = i;", "best = left[i], at = i + 1 < n ? i + 1 : i;", "moe"),
    ("moe.cu", "(other == best && other_at < at)", "(other == best && other_at > at)", "moe"),
    ("moe.cu", "left[at] = -INFINITY;", "left[at] = left[at];", "moe"),
    ("moe.cu", "all = renormalize ? chosen : warp_sum(all);", "all = chosen;", "moe"),
    ("moe.cu", "from[i] == from[i] ? __expf(from[i] - first) : 0", "__expf(from[i] - first)", "moe"),
    ("moe.cu", "if (tid >= d) at += other;", "at += other;", "moe"),
    ("moe.cu", "offsets[n_experts] = at;", "offsets[n_experts] = at - 1;", "moe"),
    ("moe.cu", "y + (row * top_k + k) * y_stride", "y + (row + k) * y_stride", "moe"),
    ("moe.c", "up.x_rows_per = k;", "up.x_rows_per = 1;", "moe"),
    ("moe.c", "down.x_rows_per = 1;", "down.x_rows_per = k;", "moe"),
    ("moe.c", "slice_of(scores, first, n));", "scores);", "moe whole"),
    ("gemm.cuh", "if (c.matrices) matrix = c.matrices[expert];", "if (c.matrices) matrix = c.matrices[0];", "moe"),
    ("gemm.cuh", "sums[i][j] * matrix.scales[col]", "sums[i][j] * matrix.scales[0]", "moe"),
    ("gemm.cuh", "words[j / 2] >> (j % 2 * 16)", "words[j / 2] >> (j / 4 * 16)", "moe"),
    ("gemm.cuh", "(j < 4 ? w.x : w.y) >> (j % 4 * 8)", "(j < 4 ? w.y : w.x) >> (j % 4 * 8)", "moe"),
    ("gemm.cuh", "c.matrices ? c.offsets[expert + 1]", "c.matrices ? c.offsets[expert + 1] + 1", "moe"),
]


# Which test meets the barriers of a file.
BARRIER_TESTS = {"attention.cu": "attention", "prefill.cu": "attention", "attention.cuh": "attention", "rope.cu": "attention",
                 "sample.cu": "sample", "moe.cu": "moe", "gemm_int4.cu": "int4",
                 "copy.cu": "attention"}
BARRIER = re.compile(r"__sync(threads|warp)\(\);")
WAIT = re.compile(r"dependency_wait\(\);(?!\s*return)")  # one before a return is late already
WAIT_LATE = "struct late { ~late() { dependency_wait(); } } late_;"


def barrier_mutants(source):
    """A row for each barrier: the file with that one left out. A row for each wait for the kernels before:
    the file with that one at the end of its kernel."""
    rows = []
    for name in sorted(os.listdir(source)):
        text = open(os.path.join(source, name)).read() if name.endswith((".cu", ".cuh")) else ""
        places = [(found, ";") for found in BARRIER.finditer(text)]
        for found, instead in places + [(found, WAIT_LATE) for found in WAIT.finditer(text)]:
            line = text.count("\n", 0, found.start()) + 1
            without = text[:found.start()] + instead + text[found.end():]
            rows.append((name, "%s of line %d" % (found.group(), line), without, BARRIER_TESTS.get(name, "ops"), True))
    return rows


def shell(command, **kwargs):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def sources_of(config, name, folder):
    """The files to compile when `name` is changed: itself, or one kernel that includes it."""
    users = {"attention.cuh": ["attention.cu", "prefill.cu"], "gemm.cuh": ["gemm.cu", "gemm_int4.cu"],
             "common.cuh": ["norm.cu", "act.cu", "attention.cu", "prefill.cu"]}
    return [os.path.join(folder, f) for f in users.get(name, [name])]


def build(config, mutant, work):
    name, old, new, watched = mutant[0], mutant[1], mutant[2], len(mutant) > 4
    folder = os.path.join(work, "kernels", "cuda")
    os.makedirs(folder)
    for f in os.listdir(config["source"]):
        text = open(os.path.join(config["source"], f)).read()
        if f == name:
            if not watched and old not in text:
                return "the text is not in the source any more"
            text = new if watched else text.replace(old, new)
        open(os.path.join(folder, f), "w").write(text)
    objects = list(config["watched_objects" if watched else "objects"])
    sanitize = ["-fsanitize=thread"] if watched else [f for f in config["sanitize"] if "address" in f or "thread" in f]
    sanitize = [f.replace(",undefined", ",alignment") for f in sanitize] + ["-fno-sanitize-recover=alignment"]
    changed = sources_of(config, name, folder)
    if "attention.cu" in name or name == "prefill.cu":  # few sizes of heads in both, so that they agree
        changed = [os.path.join(folder, f) for f in ("attention.cu", "prefill.cu")]
    for path in changed:
        stem, is_c = os.path.basename(path), path.endswith(".c")
        object_path = os.path.join(work, stem + ".o")
        compiler = [config["cc"], "-std=gnu11"] if is_c else [config["cxx"], "-std=gnu++20", "-x", "c++", *config["flags"], "-DHEDDLE_HEAD_DIMS_FEW"]
        done = shell([*compiler, "-w", "-O1", "-fPIC", "-D_GNU_SOURCE", "-ffp-contract=off", *sanitize, "-I", work,
                      "-I", config["emu"], "-I", config["emu"] + "/include", "-I", config["root"], "-c", path, "-o", object_path])
        if done.returncode:
            return "it does not compile: " + done.stdout[-400:]
        objects = [object_path if os.path.basename(o) == stem + ".o" else o for o in objects]
    plugin = os.path.join(work, "heddle_cuda.so")
    done = shell([config["cxx"], "-shared", *config["sanitize"], "-o", plugin, *objects, *config["libraries"],
                  "-Wl,--version-script=" + config["map"], "-L" + config["emulated"], "-lcudart_emulated",
                  "-Wl,-rpath," + config["emulated"]])
    os.symlink(config["emulated"] + "/libcublasLt.so.13", work + "/libcublasLt.so.13")
    return "it does not link: " + done.stdout[-400:] if done.returncode else None


def fails(test, env):
    """Whether the test fails; it is ended at its first failure, and after two minutes of computing or ten
    of waiting."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    with subprocess.Popen([test], env=env, preexec_fn=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        waited = threading.Timer(600, run.kill)
        waited.start()
        for line in run.stdout:
            if "[  ERROR   ]" in line or "[  FAILED  ]" in line:
                run.kill()
        waited.cancel()
        return run.wait() != 0


def caught(config, mutant):
    """None when the test failed, as it must; else what went wrong."""
    with tempfile.TemporaryDirectory() as work:
        problem = build(config, mutant, work)
        if problem:
            return problem
        env = dict(os.environ, HEDDLE_PLUGIN_DIR=work, HEDDLE_CUDA_QUICK="1", ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0")
        test, _, whole = mutant[3].partition(" ")
        if whole:
            del env["HEDDLE_CUDA_QUICK"]
        return None if fails(config["tests"] + "/test_cuda_" + test, env) else "MISSED: test_cuda_%s passes" % test


def main():
    config = json.load(open(sys.argv[1]))
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    missed = 0
    problem = caught(config, ("norm.cu", "", "", "ops"))  # without a mistake the same build must pass
    if not (problem or "").startswith("MISSED"):
        print("test_cuda_ops fails without any mistake: %s" % problem)
        return 1
    chosen = MUTANTS + barrier_mutants(config["source"])
    chosen = chosen if only or os.environ.get("HEDDLE_MUTANTS") == "all" else chosen[::12]
    for number, mutant in enumerate(chosen):
        if only not in mutant[0] or number < first:
            continue
        problem = caught(config, mutant)
        missed += problem is not None
        print("%3d %-14s %-50.50s %s" % (number, mutant[0], mutant[1].split("\n")[0], problem or "caught"), flush=True)
    return 1 if missed else 0


sys.exit(main())
