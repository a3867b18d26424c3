#!/usr/bin/env python3
"""Goal: no kernel spills registers or runs out of shared memory. Method: reads what ptxas said when
nvcc compiled the plugin (-Xptxas -v), kept beside the objects. Skipped where there is no nvcc."""
import glob
import re
import sys

REGISTERS_MAX = {"decode_kernel": 232, "prefill_kernel": 240, "gemm_kernel": 128, "sample_kernel": 64}
EXPECTED = {"attention", "prefill", "norm", "act", "rope", "sample", "prep", "embed", "gemm", "gemm_int4", "moe", "quantize", "copy"}


def kernels(path):
    """Yields (kernel, architecture, registers, spilled bytes, stack bytes)."""
    name = arch = None
    spilled = stack = 0
    for line in open(path):
        found = re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line)
        if found:
            name, arch = found.groups()
        found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if found:
            stack, spilled = int(found.group(1)), int(found.group(2)) + int(found.group(3))
        found = re.search(r"Used (\d+) registers", line)
        if found:
            yield name, arch, int(found.group(1)), spilled, stack


def main():
    reports = glob.glob(sys.argv[1] + "/*.ptxas")
    if not reports:
        print("skipped: the plugin was not compiled by nvcc")
        return 77
    missing = EXPECTED - {re.sub(r".*/|\.ptxas", "", r) for r in reports}
    faults, n = ["no report of %s.cu" % m for m in missing], 0
    for report in reports:
        for name, arch, registers, spilled, _ in kernels(report):
            n += 1
            limit = next((v for k, v in REGISTERS_MAX.items() if k in name), 255)
            if spilled:
                faults.append("%s (%s) spills %d bytes" % (name, arch, spilled))
            if registers > limit:
                faults.append("%s (%s) uses %d registers, at most %d" % (name, arch, registers, limit))
    print("%d kernels, %d faults" % (n, len(faults)))
    print("\n".join(faults))
    return 1 if faults or not n else 0


sys.exit(main())
