#!/usr/bin/env python3
"""The house rules that a machine can check.

Goal: a file includes only its own folder and floors below; functions fit a screen; the banned names
do not appear; every file says what it is; nothing half-done is left behind.
Method: reads the tracked sources as text, and ctags' view of functions where ctags is installed.
"""
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
os.chdir(ROOT)

FLOORS = {"base": 0, "proto": 1, "kernels": 1, "parallel": 2, "worker": 3, "coordinator": 3, "cli": 4}
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 700
BANNED = (r"\b(malloc|calloc|realloc|free|strdup|strndup|strcpy|strcat|sprintf|vsprintf|atoi|atol|atof"
          r"|strtok|gets|alloca|rand|srand)\s*\(")


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", *patterns], capture_output=True, text=True)
    if listed.returncode == 0:
        return [f for f in listed.stdout.splitlines() if os.path.exists(f)]
    found = []
    for folder, dirs, names in os.walk("."):  # an archive without git
        dirs[:] = [d for d in dirs if d not in ("build", ".git")]
        found += [os.path.relpath(os.path.join(folder, n)) for n in names]
    endings = tuple(p.lstrip("*") for p in patterns)
    return [f for f in found if f.endswith(endings)]


def read(path):
    with open(path, errors="replace") as f:
        return f.read()


def strip(text):
    """Blanks comments and strings, keeping line numbers."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)


def check_floors(path, text, wrong):
    own = path.split("/")[0]
    if own not in FLOORS:
        return
    for number, line in enumerate(text.splitlines(), 1):
        m = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
        if not m:
            continue
        target = m.group(1).split("/")[0]
        if "/" not in m.group(1):
            if own == "kernels" and "cuda" in path:
                continue
            wrong.append(f"{path}:{number}: include names its folder: \"{own}/…/{m.group(1)}\"")
        elif target in FLOORS and target != own and FLOORS[target] >= FLOORS[own]:
            wrong.append(f"{path}:{number}: {own}/ may not include {target}/")


def check_names(path, text, wrong):
    own = path.split("/")[0]
    if own not in FLOORS or path == "base/mem.c" or "/cuda/" in path:
        return
    bare = strip(text)
    for number, line in enumerate(bare.splitlines(), 1):
        m = re.search(BANNED, line)
        if m and not re.search(r"(->|\.)\s*" + m.group(1), line):
            wrong.append(f"{path}:{number}: {m.group(1)}() is banned; see base/mem.h and base/buf.h")
    if path != "proto/rpc_grpc.c" and re.search(r"#\s*include\s*<grpc/", text):
        wrong.append(f"{path}: only proto/rpc_grpc.c includes <grpc/…>")


def check_heading(path, text, wrong):
    if not re.match(r"\s*(/\*|//|#!)", text):
        wrong.append(f"{path}: does not open with what it is")


def check_left_over(path, text, wrong):
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            wrong.append(f"{path}:{number}: left over: {line.strip()[:80]}")


def check_functions(files, wrong):
    if not shutil.which("ctags"):
        print("ctags is not installed: function lengths not checked")
        return
    out = subprocess.run(["ctags", "--languages=C,C++,CUDA", "--langmap=CUDA:.cu.cuh", "--fields=+ne",
                          "--kinds-C=f", "--kinds-C++=f", "-f", "-", *files], capture_output=True, text=True)
    for row in out.stdout.splitlines():
        m = re.search(r"line:(\d+).*end:(\d+)", row)
        if m and int(m.group(2)) - int(m.group(1)) + 1 > FUNCTION_LINES_MAX:
            name, path = row.split("\t")[:2]
            wrong.append(f"{path}:{m.group(1)}: {name} has {int(m.group(2)) - int(m.group(1)) + 1} lines")


def check_dead_files(wrong):
    """A header that nothing includes is dead."""
    sources = tracked("*.c", "*.h", "*.cc", "*.cu", "*.cuh", "*.cpp")
    everything = "\n".join(read(f) for f in sources)
    for path in tracked("*.h", "*.cuh"):
        if path.startswith("proto/include/"):
            continue
        if f'"{path}"' not in everything and f"/{os.path.basename(path)}\"" not in everything \
                and f'"{os.path.basename(path)}"' not in everything and f"<{os.path.basename(path)}>" not in everything:
            wrong.append(f"{path}: nothing includes it")


def check_words(wrong):
    """The project speaks of itself alone: no path of a machine it was written on."""
    marks = ["/" + "work/", "/" + "farm/", "." + "library"]
    for path in tracked("*"):
        if path.startswith(("models/", "tests/golden/", "tests/corpus/")) or os.path.getsize(path) > 2_000_000:
            continue
        text = read(path)
        for mark in marks:
            if mark in text:
                wrong.append(f"{path}: names '{mark}'")


def main():
    wrong = []
    sources = tracked("*.c", "*.h", "*.cc", "*.cu", "*.cuh", "*.cpp")
    for path in sources:
        text = read(path)
        check_floors(path, text, wrong)
        check_names(path, text, wrong)
        check_heading(path, text, wrong)
        check_left_over(path, text, wrong)
        lines = text.count("\n")
        if lines > FILE_LINES_MAX:
            wrong.append(f"{path}: {lines} lines, more than {FILE_LINES_MAX}")
    check_functions(sources, wrong)
    check_dead_files(wrong)
    check_words(wrong)
    print("\n".join(wrong) or f"{len(sources)} files keep the house rules")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
