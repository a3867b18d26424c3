#!/usr/bin/env python3
"""What deploy/, docker/ and the documents name exists in the program.

Goal: no manifest, script or page tells a user of a flag, route, port or file that is not there.
Method: collects --flags after `heddle VERB` in deploy/, docker/, README.md and docs/, and asks the
built program's --help; probes must be routes of the front; COPY sources must exist.
"""
import os
import re
import subprocess
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
os.chdir(ROOT)
HEDDLE = os.path.join(os.environ.get("HEDDLE_BINARY_DIR", "build/release"), "heddle")
VERBS = ["serve", "coordinator", "worker", "chat", "inspect", "tokenize", "plan", "doctor"]


def files_below(*folders):
    for folder in folders:
        if os.path.isfile(folder):
            yield folder
        for at, _, names in os.walk(folder):
            yield from (os.path.join(at, name) for name in names)


def known_flags(verb):
    text = subprocess.run([HEDDLE, verb, "--help"], capture_output=True, text=True).stdout
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", text))
    return flags | {"no-" + f for f in flags} | {"help"} | set(re.findall(r"(?<=[ ])-([a-z]{1,8})\b", text))


def calls(text):
    """Each `heddle VERB …` command as (verb, its words); lines joined at backslashes."""
    text = re.sub(r"\\\n\s*", " ", text)
    for m in re.finditer(r"heddle[\"',\s]+(%s)\b([^\n]*)" % "|".join(VERBS), text):
        yield m.group(1), m.group(2)


def yaml_args(text):
    """Kubernetes: args: ["VERB", "--flag", …] or a list of - items."""
    for m in re.finditer(r"args:\s*\n((?:\s*-\s+.*\n)+)", text):
        words = [w.strip().lstrip("- ").strip("\"'") for w in m.group(1).splitlines()]
        if words and words[0] in VERBS:
            yield words[0], " ".join(words[1:])


def main():
    wrong, checked = [], 0
    flags = {verb: known_flags(verb) for verb in VERBS}
    routes = "\n".join(open(f, errors="replace").read() for f in files_below("coordinator/front") if f.endswith(".c"))
    for path in files_below("deploy", "docker", "README.md", "docs"):
        text = open(path, errors="replace").read()
        for verb, words in list(calls(text)) + list(yaml_args(text)):
            for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", words):
                checked += 1
                if flag not in flags[verb]:
                    wrong.append(f"{path}: heddle {verb} has no --{flag}")
        for route in re.findall(r"path:\s*(/[a-z/]+)\s*$", text, re.M):
            checked += 1
            if path.startswith("deploy") and f'"{route}"' not in routes:
                wrong.append(f"{path}: no route {route}")
        if os.path.basename(path).startswith("Dockerfile"):
            for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.M):
                checked += 1
                if not os.path.exists(source):
                    wrong.append(f"{path}: COPY {source} does not exist")
    if checked < 20:
        wrong.append(f"only {checked} names found to check: the patterns no longer match")
    print("\n".join(wrong) or f"{checked} names exist")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
