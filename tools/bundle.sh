#!/usr/bin/env bash
# One folder that runs on any Linux with glibc 2.36 or newer: the program, its CUDA plugin if it was
# built, and every shared library they need except glibc's own. ./dev bundle
#   build/bundle/heddle          the program; looks for lib/ beside itself (its RPATH, set when linked)
#   build/bundle/heddle_cuda.so  the plugin; cuBLASLt and NCCL come from the machine with the GPU
#   build/heddle-bundle.tar.xz   the folder, packed; 60 MB at most
# ./dev bundle --gpu puts the programs of the GPU suite beside them (build/bundle/tests/cuda), for a
# machine with a GPU and without compilers: there tools/gpu_suite.sh uses the bundle by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/release bundle=build/bundle packed=build/heddle-bundle.tar.xz
bytes_max=$((60 * 1000 * 1000))
stop() { echo "bundle: $*" >&2; exit 1; }
[ -x "$build/heddle" ] || stop "no $build/heddle; ./dev build first"

rm -rf "$bundle"
mkdir -p "$bundle/lib"
cp "$build/heddle" "$bundle/heddle"
if [ "${1:-}" = --gpu ]; then
  mkdir -p "$bundle/tests/cuda"
  ninja -C "$build" --quiet bench_{cuda,steps} test_cuda_{ops,attention,sample,moe,steps,worker}
  cp "$build"/tests/cuda/{bench_{cuda,steps},test_cuda_{ops,attention,sample,moe,steps,worker}} "$bundle/tests/cuda/"
fi
[ -f "$build/heddle_cuda.so" ] && cp "$build/heddle_cuda.so" "$bundle/"

# glibc belongs to the machine: mixing two of them ends in crashes.
is_glibc() { [[ "$1" =~ ^(ld-linux.*|libc|libm|libdl|libpthread|librt|libresolv|libutil|libanl|libnsl)\.so ]]; }
needed_of() { ldd "$1" 2>/dev/null | awk '$2 == "=>" {print $1, $3}'; }
missing=$(ldd "$bundle/heddle" | awk '/not found/ {print $1}')
[ -z "$missing" ] || stop "not found: $missing"
for object in "$bundle/heddle" "$bundle"/*.so "$bundle"/tests/cuda/*; do
  [ -e "$object" ] || continue
  while read -r name path; do
    is_glibc "$name" || [ -e "$bundle/lib/$name" ] || cp -L "$path" "$bundle/lib/$name"
  done < <(needed_of "$object")
done
# What Open MPI opens by name at run time: its own plugins and their needs.
mpi=$(dirname "$(ldconfig -p | awk '/libmpi\.so/ {print $NF; exit}')")
if [ -d "$mpi/openmpi/lib/openmpi3" ]; then
  mkdir -p "$bundle/lib/openmpi3"
  for part in "$mpi/openmpi/lib/openmpi3"/mca_{btl_self,btl_sm,btl_tcp,btl_vader,pml_ob1,coll_basic,coll_tuned,coll_self,ess_singleton,ess_pmi,ess_env,pmix_*,rcache_grdma,mpool_hugepage,shmem_mmap,allocator_*,bml_r2}.so; do
    [ -e "$part" ] && cp -L "$part" "$bundle/lib/openmpi3/"
  done
fi
strip --strip-unneeded "$bundle"/lib/*.so* "$bundle/heddle" "$bundle"/tests/cuda/* 2>/dev/null || true

# A library that names a folder of its own (DT_RUNPATH) would not look in the program's; that tag
# becomes one that the loader ignores, and the program's RPATH holds for all.
python3 - "$bundle"/lib/*.so* <<'PYTHON'
import struct
import sys

for path in sys.argv[1:]:
    data = bytearray(open(path, "rb").read())
    offset, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    for section in range(count):
        kind, _, _, at, size = struct.unpack_from("<IQQQQ", data, offset + section * 64 + 4)
        for entry in range(at, at + size, 16) if kind == 6 else ():
            if struct.unpack_from("<q", data, entry)[0] in (15, 29):
                struct.pack_into("<q", data, entry, 21)
    open(path, "wb").write(data)
PYTHON

# No symbol newer than glibc 2.36.
newest=$(find "$bundle" -type f \( -name '*.so*' -o -name 'heddle*' \) -exec objdump -T {} + 2>/dev/null |
  grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -1)
[ "$(printf '%s\nGLIBC_2.36\n' "$newest" | sort -V | tail -1)" = GLIBC_2.36 ] || stop "needs $newest, newer than glibc 2.36"

# It starts somewhere else, in an empty environment, and takes nothing but glibc from outside.
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
cp -a "$bundle" "$elsewhere/moved"
env -i "$elsewhere/moved/heddle" --version >/dev/null || stop "the moved bundle does not start"
outside=$(env -i ldd "$elsewhere/moved/heddle" 2>/dev/null | awk '$2 == "=>" {print $1, $3}' |
  while read -r name path; do
    is_glibc "$name" || case "$path" in "$elsewhere"/*) ;; *) echo "$name" ;; esac
  done)
[ -z "$outside" ] || stop "taken from outside the bundle: $outside"

tar -C build -cf - "$(basename "$bundle")" | xz -T0 -6 >"$packed"
size=$(stat -c %s "$packed")
[ "$size" -le "$bytes_max" ] || stop "$packed has $size bytes, at most $bytes_max"
echo "$packed: $((size / 1000)) kB; needs glibc ${newest#GLIBC_}"
